"""Where the user's own rows lie: a file, a folder of files, a folder of `save_to_disk`, or a data set on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from meft.errors import ConfigError, DataError, first_line

from .base import require_file
from .lines import SUFFIXES, Row, read_rows

PARQUET = ".parquet"
_SAVED = ("state.json", "dataset_dict.json")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The names that a split goes by, in folders and on the hub.
_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "test"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Source:
    """The rows of one split.

    Attributes:
        name: What they are called in messages: the file, say.
        rows: The rows, and before each the number that messages give it: its line in a file of lines, else its place,
            from 1.
        unit: What that number counts, "Line" or "Row".
    """

    name: str
    rows: Sequence[tuple[int, Row]]
    unit: str = "Line"

    @property
    def columns(self) -> list[str]:
        """The names of all columns, in the order in which they first stand in a row."""
        return list(dict.fromkeys(name for _, row in self.rows for name in row))

    def where(self, number: int) -> str:
        """A row in messages: `Line 3 of chats.jsonl`."""
        return f"{self.unit} {number} of {self.name}"


def read_split(place: str, split: str, cache_dir: str | None = None) -> Source:
    """Reads the rows of one split; a place that has no splits is all of it.

    Example:
        >>> read_split("chats.jsonl", "train").columns
        ['messages']

    Args:
        place: A file (.jsonl, .json, .csv, .tsv, .parquet), a folder of such files or of `Dataset.save_to_disk`, or a
            name on the hub.
        split: Which rows to take of a place that has several splits: `"train"`, `"validation"` or `"test"`.
        cache_dir: Where the hub's files are kept.

    Raises:
        DataError: There is nothing there, it has no rows or no such split, or a file is malformed.
    """
    found = find_source(place, split, cache_dir) or find_source(place, "train", cache_dir)
    if found is None:
        raise DataError(f"{place} has no rows for {split}. Give a file of its own with --{split}_file.")
    return found


def find_source(place: str, split: str, cache_dir: str | None = None) -> Source | None:
    """As `read_split`; None for a place that does not say which of its rows these are."""
    path = Path(place)
    if path.is_dir():
        source = _folder(path, split)
    elif path.exists() or not _may_be_on_hub(place):
        source = read_file(path, split)
    else:
        source = _hub(place, split, cache_dir)
    if source is not None and not source.rows:
        raise DataError(f"{source.name} has no rows. Give a file with at least one row.")
    return source


def read_file(path: Path, split: str) -> Source:
    """The rows of one file.

    Raises:
        DataError: It is missing, empty or malformed.
    """
    require_file(path, f"the {split} file")
    if path.suffix.lower() == PARQUET:
        return Source(str(path), _numbered(_parquet(path)), "Row")
    return Source(str(path), list(read_rows(path)))


def _may_be_on_hub(place: str) -> bool:
    return bool(_HUB.fullmatch(place)) and Path(place).suffix.lower() not in (*SUFFIXES, PARQUET, ".txt")


def _numbered(rows: Dataset) -> list[tuple[int, Row]]:
    return list(enumerate(rows, start=1))


def _parquet(path: Path) -> Dataset:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return Dataset(pq.read_table(path))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no parquet file that can be read: {first_line(error)} Write it again.") from error


def _folder(folder: Path, split: str) -> Source | None:
    if any((folder / name).is_file() for name in _SAVED):
        return _saved(folder, split)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (*SUFFIXES, PARQUET))
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        raise DataError(
            f"{folder} holds no rows: there is no file in it that ends in {', '.join((*SUFFIXES, PARQUET))}. Give "
            "another folder, or one file."
        )
    named = {path: _split_of(path.relative_to(folder)) for path in files}
    if any(named.values()):
        wanted = next((name for name in _NAMES[split] if name in named.values()), None)
        files = [path for path in files if named[path] == wanted] if wanted else []
    elif split != "train":
        files = []
    if not files:
        return None
    sources = [read_file(path, split) for path in files]
    if len(sources) == 1:
        return sources[0]
    rows = [row for source in sources for _, row in source.rows]
    return Source(f"{folder} ({len(files)} files)", list(enumerate(rows, start=1)), "Row")


def _split_of(path: Path) -> str | None:
    """The split that a file's name or folder stands for: train.jsonl, data/train-00000-of-00002.parquet."""
    words = [re.split(r"[-_.]", part.lower())[0] for part in (*path.parent.parts, path.stem)]
    known = {name for names in _NAMES.values() for name in names}
    return next((word for word in reversed(words) if word in known), None)


def _saved(folder: Path, split: str) -> Source | None:
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} was written by save_to_disk and cannot be read: {first_line(error)} Write it again."
        ) from error
    return _chosen(found, str(folder), split)


def _hub(name: str, split: str, cache_dir: str | None) -> Source | None:
    try:
        with quiet_datasets():
            found = datasets.load_dataset(name, cache_dir=cache_dir)
    except Exception as error:  # whatever the hub's client raises: no such name, no network, a script
        raise DataError(
            f"{name} is no file or folder here, and could not be read from the hub: {first_line(error)} Check the "
            "name, or give the path of a file."
        ) from error
    return _chosen(found, name, split)


def _chosen(found: Any, name: str, split: str) -> Source | None:
    """The rows of a split of what `datasets` has loaded."""
    if isinstance(found, Dataset):
        return Source(name, _numbered(found), "Row") if split == "train" else None
    wanted = next((each for each in _NAMES[split] if each in found), None)
    if wanted is None and split == "train":
        raise DataError(f"{name} has the splits {', '.join(found)} and none called train. Save that one by itself.")
    return None if wanted is None else Source(f"{name} ({wanted})", _numbered(found[wanted]), "Row")


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without the progress bars of `datasets`, where what they say is not the user's doing."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def renamed(source: Source, columns: Sequence[str] | None) -> Source:
    """The rows with columns renamed as `--columns prompt=question completion=answer` says.

    Raises:
        ConfigError: A word is no pair of names.
        DataError: There is no such column.
    """
    if not columns:
        return source
    names: dict[str, str] = {}
    for word in columns:
        ours, equals, theirs = word.partition("=")
        if not (ours and equals and theirs):
            raise ConfigError(f"columns is {word!r}; give pairs of names such as prompt=question.")
        names[theirs] = ours
    missing = [theirs for theirs in names if theirs not in source.columns]
    if missing:
        raise DataError(
            f"{source.name} has no column {missing[0]!r}; its columns are {', '.join(source.columns)}. Give one of "
            "them in --columns."
        )
    taken = set(names.values())
    rows = [
        (number, {names.get(name, name): value for name, value in row.items() if name in names or name not in taken})
        for number, row in source.rows
    ]
    return Source(source.name, rows, source.unit)
