"""The user's own rows with named text and label columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from datasets import Dataset

from meft.errors import ConfigError, DataError

from .base import TaskData, TaskSpec, to_rows
from .lines import Row
from .sources import read_split


@dataclass(frozen=True)
class FileOptions:
    """Which columns hold what.

    Attributes:
        text_columns: The names of the column with the text, or of the two columns of a pair.
        label_column: The name of the column with the label.
        labels: All label names, in the order of their indices. `None`: the distinct labels of the training rows,
            numbers by size, anything else by alphabet.
        regression: Whether the label is a number to be predicted.
    """

    text_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...] | None = None
    regression: bool = False

    def __post_init__(self) -> None:
        if len(self.text_columns) not in (1, 2):
            raise ConfigError(
                f"text_column is {' '.join(self.text_columns) or 'empty'}, {len(self.text_columns)} names; give one, "
                "or two for a pair of texts."
            )
        if self.regression and self.labels:
            raise ConfigError(f"labels is {', '.join(self.labels)} beside --regression; leave one of them out.")
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ConfigError(
                f"labels is {', '.join(self.labels)}; give at least two names, all different from one another."
            )


def load_files(files: dict[str, str | Path], options: FileOptions, *, cache_dir: str | None = None) -> TaskData:
    """Reads the user's own files.

    Example:
        >>> data = load_files({"train": "reviews.csv"}, FileOptions(("review",), "stars"))
        >>> data.spec.labels
        ('1', '2', '3', '4', '5')

    Args:
        files: A file, a folder or a name on the hub for each of `"train"`, `"validation"` and `"test"` that is wanted.
            Test rows need no labels.
        options: The columns and labels.
        cache_dir: Where the hub's files are kept.

    Raises:
        DataError: A file is missing, empty or malformed, has no such column, or has a label that the others lack;
            the message gives the line.
    """
    tables = {split: _Table(Path(path), split, options, cache_dir) for split, path in files.items()}
    labels = _label_names(tables, options)
    metrics = ("pearson", "spearman") if options.regression else ("accuracy", "f1_macro")
    spec = TaskSpec("files", labels, metrics, regression=options.regression)
    return TaskData(spec, {split: table.rows(spec) for split, table in tables.items()})


class _Table:
    """One file, read and checked but for its labels."""

    def __init__(self, path: Path, split: str, options: FileOptions, cache_dir: str | None) -> None:
        source = read_split(str(path), split, cache_dir)
        self.path, self.unit, self.options = source.name, source.unit, options
        numbered = source.rows
        self.lines = [line for line, _ in numbered]
        columns = list(dict.fromkeys(name for _, row in numbered for name in row))
        self.texts = [self._texts(name, columns, numbered) for name in options.text_columns]
        self.labels: list[str] | None = None
        if split != "test" or options.label_column in columns:
            self._require(options.label_column, columns, "label_column")
            self.labels = [self._label(line, row) for line, row in numbered]

    def rows(self, spec: TaskSpec) -> Dataset:
        if self.labels is None:
            return to_rows(self.texts, None)
        if spec.regression:
            numbers = [self._number(*pair) for pair in zip(self.lines, self.labels, strict=True)]
            return to_rows(self.texts, numbers, regression=True)
        index = {name: place for place, name in enumerate(spec.labels)}
        for line, label in zip(self.lines, self.labels, strict=True):
            if label not in index:
                raise DataError(
                    f"{self.where(line)} has the label {label!r}; the labels are {', '.join(spec.labels)}. "
                    "Mend that line, or name every label with --labels."
                )
        return to_rows(self.texts, [index[label] for label in self.labels])

    def where(self, line: int) -> str:
        return f"{self.unit} {line} of {self.path}"

    def _require(self, name: str, columns: list[str], option: str) -> None:
        if name in columns:
            return
        close = get_close_matches(name, columns, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else f" Give one of them as --{option}."
        raise DataError(f"{self.path} has no column {name!r}; its columns are {', '.join(columns)}.{hint}")

    def _texts(self, name: str, columns: list[str], numbered: Sequence[tuple[int, Row]]) -> list[str]:
        self._require(name, columns, "text_column")
        for line, row in numbered:
            if not isinstance(row.get(name), str):
                raise DataError(
                    f"{self.where(line)} has {row.get(name)!r} in column {name!r}, where a text is expected. "
                    "Mend or remove that line."
                )
        return [row[name] for _, row in numbered]

    def _label(self, line: int, row: Row) -> str:
        value = row.get(self.options.label_column)
        if value is None or value == "" or isinstance(value, (list, dict)):
            raise DataError(
                f"{self.where(line)} has no label: column {self.options.label_column!r} holds {value!r}. "
                "Mend or remove that line."
            )
        return str(value)

    def _number(self, line: int, label: str) -> float:
        number = _as_number(label)
        if number is None:
            raise DataError(
                f"{self.where(line)} has the label {label!r}, which is no finite number, beside --regression. "
                "Mend that line, or leave --regression out to predict classes."
            )
        return number


def _label_names(tables: dict[str, _Table], options: FileOptions) -> tuple[str, ...]:
    if options.regression:
        return ()
    if options.labels is not None:
        return options.labels
    source = tables.get("train") or next(iter(tables.values()))
    if source.labels is None:
        raise DataError(f"{source.path} has no labels to learn the label names from. Give them with --labels.")
    distinct = sorted(set(source.labels))
    numbers = {label: _as_number(label) for label in distinct}
    if all(number is not None for number in numbers.values()):
        distinct.sort(key=lambda label: (numbers[label], label))
        fraction = next((label for label in distinct if not float(label).is_integer()), None)
        if fraction is not None:
            raise DataError(
                f"The labels of {source.path} are numbers such as {fraction}. Give --regression to predict the number, "
                "or --labels to treat each value as a class."
            )
    if len(distinct) < 2:
        raise DataError(
            f"Every row of {source.path} has the label {distinct[0]!r}; there is nothing to learn. Give rows of at "
            "least two labels, or name all labels with --labels."
        )
    return tuple(distinct)


def _as_number(label: str) -> float | None:
    try:
        number = float(label)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None
