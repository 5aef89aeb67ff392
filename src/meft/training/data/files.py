"""The user's own rows with named text and label columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from datasets import Dataset

from meft.errors import ConfigError, DataError

from .base import TaskData, TaskSpec, listed, to_rows
from .lines import Row, excerpt
from .sources import read_split

# Fewer classes than these are believed whatever the number of rows.
_MANY_CLASSES = 20


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
        self.raw = [row for _, row in numbered]
        columns = list(dict.fromkeys(name for _, row in numbered for name in row))
        self.columns = columns
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
                    f"{self.where(line)} has the label {excerpt(label)!r}; the labels are {listed(spec.labels)}. "
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
        raise DataError(f"{self.path} has no column {name!r}; its columns are {listed(columns)}.{hint}")

    def _texts(self, name: str, columns: list[str], numbered: Sequence[tuple[int, Row]]) -> list[str]:
        self._require(name, columns, "text_column")
        for line, row in numbered:
            if not isinstance(row.get(name), str):
                raise DataError(
                    f"{self.where(line)} has {row.get(name)!r} in column {name!r}, where a text is expected. "
                    "Mend or remove that line."
                )
            self._check_unicode(line, name, row[name])
        texts = [row[name] for _, row in numbered]
        if not any(map(str.strip, texts)):
            raise DataError(
                f"Every row of {self.path} has an empty text in column {name!r}. Its columns are {listed(columns)}; "
                "give the one that holds the texts as --text_column."
            )
        return texts

    def _check_unicode(self, line: int, name: str, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{self.where(line)} has text in column {name!r} that is no Unicode: "
                f"{error.object[error.start]!r} alone is half a character. Mend or remove that line."
            ) from error

    def _label(self, line: int, row: Row) -> str:
        value = row.get(self.options.label_column)
        if value is None or value == "" or isinstance(value, (list, dict)):
            raise DataError(
                f"{self.where(line)} has no label: column {self.options.label_column!r} holds {value!r}. "
                "Mend or remove that line."
            )
        self._check_unicode(line, self.options.label_column, str(value))
        return str(value)

    def _number(self, line: int, label: str) -> float:
        number = _as_number(label)
        if number is None:
            raise DataError(
                f"{self.where(line)} has the label {excerpt(label)!r}, which is no finite number, beside "
                "--regression. Mend that line, or leave --regression out to predict classes."
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
    _check_classes(source, distinct, all(number is not None for number in numbers.values()))
    if len(distinct) < 2:
        raise DataError(
            f"Every row of {source.path} has the label {distinct[0]!r}; there is nothing to learn. Give rows of at "
            "least two labels, or name all labels with --labels."
        )
    return tuple(distinct)


def _check_classes(source: _Table, distinct: list[str], numbers: bool) -> None:
    """Refuses labels of which nearly every row has its own: they are numbers, texts or names, and no classes."""
    labels = source.labels or []
    if len(distinct) < _MANY_CLASSES or 2 * len(distinct) <= len(labels):
        return
    column = source.options.label_column
    others = {
        name: len(values)
        for name in source.columns
        if name != column and 1 < len(values := {str(row.get(name)) for row in source.raw}) < _MANY_CLASSES
    }
    meant = "The labels are numbers: give --regression to predict them. " if numbers else ""
    if others:
        meant += f"Or is the label in column {min(others, key=lambda name: others[name])!r}? Give --label_column. "
    raise DataError(
        f"The {len(labels)} rows of {source.path} have {len(distinct)} different labels in column {column!r} "
        f"({listed(distinct, 3)}), which is no classification: most classes have a single row. {meant}If every one is "
        "a class, name them all with --labels."
    )


def _as_number(label: str) -> float | None:
    try:
        number = float(label)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None
