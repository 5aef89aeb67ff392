"""The image tasks: where their images, labels and class names are.

CIFAR is of Krizhevsky (2009), SVHN of Netzer et al. (2011); both have training and test rows and no validation rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from meft.errors import DataError
from meft.training.data.base import require_file

from .image_files import Labelled, has_png_batches, read_binary, read_matlab, read_png_batches

FOLDER = "imagefolder"
_DIGITS = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class ImageTask:
    """Where the images and labels of one task are.

    Attributes:
        hub: The hub's dataset; `None` for the user's own folder.
        config: Which of its configurations.
        image, label: Its columns.
        labels: Names of the classes as the archives number them; empty where they stand in a file beside the images.
        mirror: Whether a mirrored image is of the same class: not so for digits.
        read: Reads a split of the task's own archive, unpacked into a folder.
    """

    hub: str | None = None
    config: str | None = None
    image: str = "image"
    label: str = "label"
    labels: tuple[str, ...] = ()
    mirror: bool = True
    read: Callable[[Path, str, Sequence[str]], Labelled] | None = None


def _archive(folder: Path, name: str, pickled: str) -> Path:
    """The folder of the archive's files, whether it or its parent was given."""
    if (folder / name).is_dir():
        return folder / name
    if folder.name == pickled or (folder / pickled).is_dir():
        raise DataError(
            f"{folder} holds the Python version of the archive, pickles that can run any code when they are read. "
            f"Give the binary version instead, the folder {name}."
        )
    return folder


def _read_cifar10(folder: Path, split: str, names: Sequence[str]) -> Labelled:
    if has_png_batches(folder):
        return read_png_batches(folder, split, names)
    folder = _archive(folder, "cifar-10-batches-bin", "cifar-10-batches-py")
    files = ["test_batch.bin"] if split == "test" else [f"data_batch_{number}.bin" for number in range(1, 6)]
    return read_binary([folder / file for file in files], names)


def _read_cifar100(folder: Path, split: str, names: Sequence[str]) -> Labelled:
    folder = _archive(folder, "cifar-100-binary", "cifar-100-python")
    listed = require_file(folder / "fine_label_names.txt", "the names of the classes").read_text("utf-8").split()
    return read_binary([folder / f"{split}.bin"], names or listed, label_bytes=2)


def _read_svhn(folder: Path, split: str, names: Sequence[str]) -> Labelled:
    return read_matlab(folder / f"{split}_32x32.mat", names)


_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_TASKS: dict[str, ImageTask] = {
    FOLDER: ImageTask(),
    "cifar10": ImageTask("uoft-cs/cifar10", image="img", labels=_CIFAR10, read=_read_cifar10),
    "cifar100": ImageTask("uoft-cs/cifar100", image="img", label="fine_label", read=_read_cifar100),
    "svhn": ImageTask("ufldl-stanford/svhn", "cropped_digits", labels=_DIGITS, mirror=False, read=_read_svhn),
}


def from_hub(task: ImageTask, split: str, cache_dir: str | None) -> Labelled:
    """Reads a split of the hub's dataset.

    Raises:
        DataError: It cannot be had, or has other columns.
    """
    try:
        rows: Any = datasets.load_dataset(task.hub, task.config, split=split, cache_dir=cache_dir)
    except (OSError, ConnectionError, ValueError) as error:
        raise DataError(
            f"{task.hub} ({split}) could not be had from the hub: {error} Without a network give local files with "
            "--data_dir."
        ) from error
    for column in (task.image, task.label):
        if column not in rows.column_names:
            raise DataError(f"{task.hub} has no column {column!r}; its columns are {', '.join(rows.column_names)}.")
    names = tuple(rows.features[task.label].names)
    images = rows.cast_column(task.image, datasets.Image(decode=False))[task.image]
    return Labelled(list(images), [names[index] for index in rows[task.label]], names)
