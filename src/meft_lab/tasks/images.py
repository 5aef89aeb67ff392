"""The rows of an image task: which splits, which classes, in which order, and what is held out for validation.

Where a task has no validation rows, either a share of the training rows is held out, the same rows in every run, or
the test rows stand in, which is said.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, Value

from meft.errors import ConfigError, DataError
from meft.training.data.base import LABEL, TaskData, TaskSpec

from .image_files import Labelled, class_names, image_folder_splits, read_image_folder, some
from .image_tasks import IMAGE_TASKS, from_hub
from .pixels import IMAGE, MIRROR, ROW

_HOLDOUT_SEED = 0  # of its own, so that runs of different seeds hold out the same rows


def load_images(
    name: str,
    data_dir: str | Path | None,
    splits: Sequence[str] = ("train", "validation"),
    *,
    labels: Sequence[str] | None = None,
    trained: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    validation_share: float | None = None,
    cache_dir: str | None = None,
) -> TaskData:
    """Reads splits of an image task.

    Example:
        >>> data = load_images("imagefolder", "pets")  # pets/train/cat/1.png, pets/validation/cat/2.png, ...
        >>> data.spec.labels
        ('cat', 'dog')
        >>> data.splits["train"][0]
        {'image': {'bytes': None, 'path': 'pets/train/cat/1.png'}, 'label': 0, 'row': 0, 'mirror': True}

    Args:
        name: A key of `IMAGE_TASKS`.
        data_dir: For `imagefolder` a folder with `train`, `validation` and `test`, each with one folder a class, which
            the other tasks take too; for those also the unpacked archive: CIFAR as PNG batches or its binary version,
            SVHN's .mat files. `None` takes the hub's dataset.
        splits: Any of `"train"`, `"validation"` and `"test"`.
        labels: The classes to take, in the order of the model's outputs. Rows of other classes are left out, and
            counted in the notes. `None` takes all.
        trained: The classes that a model was trained for here, which these rows need not all have.
        outputs: How a model calls its outputs: where these are the task's classes, their order is taken.
        validation_share: Hold out this share of every class's training rows for validation.
        cache_dir: Where the hub's files are kept.

    Returns:
        Rows with `image` as stored (`bytes`, `path`) and `label`, where there are labels. Training rows also have
        their number, `row`, and `mirror`, whether a mirrored image is of the same class.

    Raises:
        ConfigError: There is no such task, class, or share.
        DataError: Files or labels are missing, validation rows have a class that training rows lack, or a file is no
            image.
    """
    if name not in IMAGE_TASKS:
        raise ConfigError(f"task is {name!r}; the image tasks are {', '.join(IMAGE_TASKS)}.")
    source = _source(name, None if data_dir is None else Path(data_dir), cache_dir)
    origins, notes = _origins(name, source, splits, validation_share)
    read = {split: source.read(split) for split in dict.fromkeys(origins.values())}
    _check_labelled(source, read)
    names = tuple(trained) if trained and labels is None else _classes(source, read, labels, outputs)
    tables = {split: _table(rows, names, IMAGE_TASKS[name].mirror) for split, rows in read.items()}
    for split, table in tables.items():
        notes += _left_out(source, split, len(table), len(read[split].images), names)
    chosen = {split: tables[origin] for split, origin in origins.items()}
    if validation_share is not None and "train" in tables:
        held_out = _hold_out(tables["train"], validation_share)
        chosen |= {split: rows for split, rows in held_out.items() if split in origins}
    for split in chosen.keys() - {"train"}:
        kept = [column for column in chosen[split].column_names if column in (IMAGE, LABEL)]
        chosen[split] = chosen[split].select_columns(kept)
    return TaskData(TaskSpec(name, names, ("accuracy",)), chosen, tuple(notes))


@dataclass(frozen=True)
class _Source:
    """Where the rows of a task come from.

    Attributes:
        place: For messages.
        splits: The splits that there are.
        read: Reads one of them.
        classes: The classes of the training rows, where the classes are the user's own.
    """

    place: str
    splits: tuple[str, ...]
    read: Callable[[str], Labelled]
    classes: tuple[str, ...] = ()


def _source(name: str, folder: Path | None, cache_dir: str | None) -> _Source:
    task = IMAGE_TASKS[name]
    if folder is None:
        if task.hub is None:
            raise ConfigError(f"task is {name!r} without --data_dir; give the folder that has train and validation.")
        return _Source(task.hub, ("train", "test"), partial(from_hub, task, cache_dir=cache_dir))
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"data_dir is {str(folder)!r}, which {what}. Give the folder that holds the images.")
    found = image_folder_splits(folder)
    if found:
        classes = class_names(found["train"]) if "train" in found else ()
        return _Source(str(folder), tuple(found), lambda split: read_image_folder(found[split]), classes)
    if task.read is None:
        inside = sorted(path.name for path in folder.iterdir())
        raise DataError(
            f"{folder} has no folder train, validation or test; it contains {some(inside)}. Put the images of each "
            f"class into a folder of its own: {folder}/train/cat/1.png, say."
        )
    read = task.read
    return _Source(str(folder), ("train", "test"), lambda split: read(folder, split, task.labels))


def _origins(
    name: str, source: _Source, splits: Sequence[str], share: float | None
) -> tuple[dict[str, str], list[str]]:
    """For each split that is wanted the one whose rows it takes, and what to say about that."""
    if share is not None:
        if not 0 < share < 1:
            raise ConfigError(f"validation_share is {share}; it must lie between 0 and 1, 0.1 say.")
        if "validation" in source.splits:
            raise ConfigError(
                f"validation_share is {share}, but {source.place} has validation rows. Leave --validation_share out."
            )
    origins, notes = {split: split for split in splits}, []
    if "validation" in origins and "validation" not in source.splits:
        origins["validation"] = "test" if share is None else "train"
        if share is None and "test" in source.splits:
            notes.append(
                f"{name} has no validation rows here, so its test rows stand in for them. --validation_share 0.1 holds "
                "out a tenth of the training rows instead."
            )
    for split, origin in origins.items():
        if origin not in source.splits:
            hint = " Or hold out training rows with --validation_share 0.1." if split == "validation" else ""
            raise DataError(
                f"{source.place} has no {split} rows; it has {some(source.splits)}. Add the folder {split} with one "
                f"folder a class.{hint}"
            )
    return origins, notes


def _check_labelled(source: _Source, read: dict[str, Labelled]) -> None:
    for split, rows in read.items():
        if rows.names is None and split != "test":
            raise DataError(
                f"The {split} rows of {source.place} have no labels. Put the images of each class into a folder of its "
                f"own: {source.place}/{split}/cat/1.png, say."
            )


def _classes(
    source: _Source, read: dict[str, Labelled], labels: Sequence[str] | None, outputs: Sequence[str] | None
) -> tuple[str, ...]:
    """The classes to take, in the order of the model's outputs."""
    known = source.classes or next(iter(read.values())).classes
    if labels is not None:
        _check_labels(labels, {*known, *(name for rows in read.values() for name in rows.classes)})
        return tuple(labels)
    for split, rows in read.items():
        extra = [name for name in rows.classes if name not in known]
        if extra:
            raise DataError(
                f"The {split} rows of {source.place} have the class {extra[0]!r}, which the training rows lack; they "
                f"have {some(known)}. Add images of it to them, remove it, or name the classes to take with --labels."
            )
    if len(known) < 2:
        raise DataError(
            f"{source.place} has {some(known)} as its only class; there is nothing to learn. Add images of another."
        )
    return _order(known, outputs)


def _order(known: Sequence[str], outputs: Sequence[str] | None) -> tuple[str, ...]:
    """The classes as the model orders them, if it knows the very same: a hub model may well call truck 0."""
    by_lower_case = {name.lower(): name for name in known}
    order = [by_lower_case.get(str(name).lower(), "") for name in outputs or ()]
    return tuple(order) if sorted(order) == sorted(known) else tuple(known)


def _check_labels(labels: Sequence[str], known: Collection[str]) -> None:
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ConfigError(f"labels is {', '.join(labels)}; give at least two classes, all different from one another.")
    for name in labels:
        if known and name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"labels has {name!r}, which is no class of these images: {some(sorted(known))}.{hint}")


def _table(rows: Labelled, names: Sequence[str], mirror: bool) -> Dataset:
    """Rows of the classes `names` only; all of them where there are no labels."""
    columns: dict[str, tuple[Any, Sequence[Any]]] = {IMAGE: (datasets.Image(decode=False), rows.images)}
    if rows.names is not None:
        index = {name: place for place, name in enumerate(names)}
        pairs = [(image, index[name]) for image, name in zip(rows.images, rows.names, strict=True) if name in index]
        columns[IMAGE] = (datasets.Image(decode=False), [image for image, _ in pairs])
        columns[LABEL] = (Value("int64"), [label for _, label in pairs])
    count = len(columns[IMAGE][1])
    columns[ROW] = (Value("int64"), list(range(count)))
    columns[MIRROR] = (Value("bool"), [mirror] * count)
    features = Features({name: feature for name, (feature, _) in columns.items()})
    return Dataset.from_dict({name: values for name, (_, values) in columns.items()}, features=features)


def _left_out(source: _Source, split: str, kept: int, all_rows: int, names: Sequence[str]) -> list[str]:
    """What to say about rows of other classes."""
    if kept == all_rows:
        return []
    if not kept:
        raise DataError(
            f"{source.place} has no {split} rows of the classes {some(names)}. Choose others with --labels."
        )
    return [f"{all_rows - kept} of {all_rows} {split} rows are of other classes than {some(names)} and are left out."]


def _hold_out(rows: Dataset, share: float) -> dict[str, Dataset]:
    """The same share of every class, one row of each at least, drawn once and for all."""
    generator = np.random.default_rng(_HOLDOUT_SEED)
    labels = np.asarray(rows[LABEL])
    held: list[int] = []
    for label in np.unique(labels):
        own = generator.permutation(np.flatnonzero(labels == label))
        count = max(1, round(share * len(own)))
        if count >= len(own):
            raise DataError(
                f"A class has {len(own)} training rows, of which validation_share {share} leaves none to train on. "
                "Give a smaller share or more rows."
            )
        held += own[:count].tolist()
    kept = np.setdiff1d(np.arange(len(labels)), held)
    return {"train": rows.select(kept), "validation": rows.select(sorted(held))}
