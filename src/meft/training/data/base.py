"""What every task hands to training: its rows, and how predictions are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from meft.errors import DataError

TEXT, TEXT_PAIR, LABEL = "text", "text_pair", "label"


@dataclass(frozen=True)
class TaskSpec:
    """The labels and metrics of a task.

    Attributes:
        name: The task's name, or `"files"` for the user's own rows.
        labels: Label names; the label with index i in the rows is `labels[i]`. Empty for regression, and for
            questions, each of which has choices of its own.
        metrics: Names of the metrics; the first is the main one.
        regression: Whether the label is a number to be predicted instead of a class.
    """

    name: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    regression: bool = False

    @property
    def outputs(self) -> int:
        """How many logits the model must have."""
        return len(self.labels) or 1


@dataclass(frozen=True)
class TaskData:
    """A task with its rows.

    Attributes:
        spec: Labels and metrics.
        splits: Rows by split: `"train"`, `"validation"` (for MNLI `"validation_matched"` and
            `"validation_mismatched"`), `"test"`. The columns of texts to be classified are `text`, `text_pair` where
            there are two, and `label` where the split has labels (an int64 index, or a float for regression); those of
            questions are `prompt`, `choices` and, where it is known, `answer`, the index of the right choice; those of
            images are `image` as stored, `label`, and in training `row` and `mirror` (`meft_lab.tasks.images`).
        notes: What the user should know about the rows, in sentences.
    """

    spec: TaskSpec
    splits: dict[str, Dataset]
    notes: tuple[str, ...] = field(default=())


def to_rows(
    texts: Sequence[Sequence[str]], labels: Sequence[int] | Sequence[float] | None, regression: bool = False
) -> Dataset:
    """Builds the rows of one split from one or two columns of texts and, where there are any, the labels."""
    columns: dict[str, Sequence[object]] = dict(zip((TEXT, TEXT_PAIR), texts, strict=False))
    if labels is not None:
        columns[LABEL] = [float(label) for label in labels] if regression else [int(label) for label in labels]
    return Dataset.from_dict(columns)


def require_file(path: Path, purpose: str) -> Path:
    """Returns `path` if it is a file with something in it.

    Raises:
        DataError: The file is missing or empty; the message says what else is in its folder.
    """
    if path.exists() and not path.is_file():
        kind = next((name for name, holds in _KINDS.items() if holds(path)), "no regular file")
        raise DataError(
            f"{path}, {purpose}, is {kind}. Give a file: rows are read again when a run goes on, so write what "
            "comes out of a pipe or a device to a file first."
        )
    if not path.is_file():
        here = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else None
        seen = f"{path.parent} does not exist" if here is None else f"{path.parent} contains {listed(here)}"
        raise DataError(f"{path}, {purpose}, does not exist; {seen}. Check the path.")
    if path.stat().st_size == 0:
        raise DataError(f"{path}, {purpose}, is empty (0 bytes). Give a file with at least one row.")
    return path


_KINDS: dict[str, Callable[[Path], bool]] = {
    "a folder": Path.is_dir,
    "a pipe": Path.is_fifo,
    "a device": lambda path: path.is_char_device() or path.is_block_device(),
    "a socket": Path.is_socket,
}


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names in a message: the first of them, and how many more there are."""
    all_names = list(names)
    more = f" and {len(all_names) - most} more" if len(all_names) > most else ""
    return ", ".join(map(_shortened, all_names[:most])) + more if all_names else "nothing"


def _shortened(name: str, length: int = 60) -> str:
    return name if len(name) <= length else f"{name[: length - 3]}..."
