"""The user's own rows: CSV, TSV or JSON lines with named text and label columns.

CSV files are quoted as spreadsheets and pandas write them; TSV files are read like those of GLUE, without quoting.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from datasets import Dataset

from meft.errors import ConfigError, DataError

from .base import TaskData, TaskSpec, listed, require_file, to_rows

# Fewer classes than these are believed whatever the number of rows.
_MANY_CLASSES = 20
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
Row = dict[str, Any]


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


def load_files(files: dict[str, str | Path], options: FileOptions) -> TaskData:
    """Reads the user's own files.

    Example:
        >>> data = load_files({"train": "reviews.csv"}, FileOptions(("review",), "stars"))
        >>> data.spec.labels
        ('1', '2', '3', '4', '5')

    Args:
        files: A file for each of `"train"`, `"validation"` and `"test"` that is wanted. Test rows need no labels.
        options: The columns and labels.

    Raises:
        DataError: A file is missing, empty or malformed, has no such column, or has a label that the others lack;
            the message gives the line.
    """
    tables = {split: _Table(Path(path), split, options) for split, path in files.items()}
    labels = _label_names(tables, options)
    metrics = ("pearson", "spearman") if options.regression else ("accuracy", "f1_macro")
    spec = TaskSpec("files", labels, metrics, regression=options.regression)
    return TaskData(spec, {split: table.rows(spec) for split, table in tables.items()})


class _Table:
    """One file, read and checked but for its labels."""

    def __init__(self, path: Path, split: str, options: FileOptions) -> None:
        self.path, self.options = path, options
        numbered = list(read_rows(require_file(path, f"the {split} file")))
        if not numbered:
            raise DataError(f"{path} has no rows. Give a file with at least one row.")
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
                    f"Line {line} of {self.path} has the label {_excerpt(label)!r}; the labels are "
                    f"{listed(spec.labels)}. "
                    "Mend that line, or name every label with --labels."
                )
        return to_rows(self.texts, [index[label] for label in self.labels])

    def _require(self, name: str, columns: list[str], option: str) -> None:
        if name in columns:
            return
        close = get_close_matches(name, columns, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else f" Give one of them as --{option}."
        raise DataError(f"{self.path} has no column {name!r}; its columns are {listed(columns)}.{hint}")

    def _texts(self, name: str, columns: list[str], numbered: list[tuple[int, Row]]) -> list[str]:
        self._require(name, columns, "text_column")
        for line, row in numbered:
            if not isinstance(row.get(name), str):
                raise DataError(
                    f"Line {line} of {self.path} has {row.get(name)!r} in column {name!r}, where a text is expected. "
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
                f"Line {line} of {self.path} has text in column {name!r} that is no Unicode: "
                f"{error.object[error.start]!r} alone is half a character. Mend or remove that line."
            ) from error

    def _label(self, line: int, row: Row) -> str:
        value = row.get(self.options.label_column)
        if value is None or value == "" or isinstance(value, (list, dict)):
            raise DataError(
                f"Line {line} of {self.path} has no label: column {self.options.label_column!r} holds {value!r}. "
                "Mend or remove that line."
            )
        self._check_unicode(line, self.options.label_column, str(value))
        return str(value)

    def _number(self, line: int, label: str) -> float:
        number = _as_number(label)
        if number is None:
            raise DataError(
                f"Line {line} of {self.path} has the label {_excerpt(label)!r}, which is no finite number, beside "
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


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Line numbers (from 1) and rows of a file with one of `SUFFIXES`.

    Raises:
        DataError: The file has another suffix, or a line of it is malformed.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_json, ".json": _read_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} ends in {path.suffix or 'nothing'!r}; it must be one of {', '.join(SUFFIXES)}.")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    layout: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=not layout, **layout)
        try:
            header = next(reader, [])
            repeated = next((name for name in header if header.count(name) > 1), None)
            if repeated is not None:
                raise DataError(f"{path} has two columns {repeated!r}. Rename one of them.")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"Line {reader.line_num} of {path} has {len(cells)} columns, the header has {len(header)} "
                        f"({', '.join(header)}). Mend that line."
                    )
                yield reader.line_num, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"Line {reader.line_num} of {path} cannot be read: {error}. Mend that line.") from error


def _read_json(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.strip())
            except RecursionError as error:
                raise DataError(
                    f"Line {number} of {path} is nested too deeply: {_excerpt(line)}. Every line must be one JSON "
                    'object, such as {"text": "...", "label": "..."}.'
                ) from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"Line {number} of {path} is not valid JSON ({error.msg} at column {error.colno}): "
                    f"{_excerpt(line)}. Every line must be one JSON object."
                ) from error
            except ValueError as error:
                raise DataError(f"Line {number} of {path} cannot be read: {error}. Mend that line.") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"Line {number} of {path} is a JSON {type(row).__name__}: {_excerpt(line)}. Every line must be one "
                    'JSON object, such as {"text": "...", "label": "..."}.'
                )
            yield number, row


def _excerpt(line: str, length: int = 60) -> str:
    line = line.strip()
    return line if len(line) <= length else f"{line[:length]}..."
