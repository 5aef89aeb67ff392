"""Lines of files as rows: CSV, TSV, JSON lines, and one JSON array.

CSV files are quoted as spreadsheets and pandas write them; TSV files are read like those of GLUE, without quoting.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meft.errors import DataError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
Row = dict[str, Any]


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
    if path.suffix.lower() == ".json" and (rows := _whole_json(path)) is not None:
        yield from enumerate(rows, start=1)
        return
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.strip())
            except RecursionError as error:
                raise DataError(
                    f"Line {number} of {path} is nested too deeply: {excerpt(line)}. Every line must be one JSON "
                    'object, such as {"text": "...", "label": "..."}.'
                ) from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"Line {number} of {path} is not valid JSON ({error.msg} at column {error.colno}): "
                    f"{excerpt(line)}. Every line must be one JSON object."
                ) from error
            except ValueError as error:
                raise DataError(f"Line {number} of {path} cannot be read: {error}. Mend that line.") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"Line {number} of {path} is a JSON {type(row).__name__}: {excerpt(line)}. Every line must be one "
                    'JSON object, such as {"text": "...", "label": "..."}.'
                )
            yield number, row


def _whole_json(path: Path) -> list[Row] | None:
    """The rows of a file that is one JSON array of objects, on however many lines; None for JSON lines."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return None
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not valid JSON ({error.msg} at line {error.lineno}, column {error.colno}). Mend it there."
        ) from error
    odd = next((index for index, row in enumerate(rows, start=1) if not isinstance(row, dict)), None)
    if odd is not None:
        raise DataError(
            f"Row {odd} of {path} is a JSON {type(rows[odd - 1]).__name__}: {excerpt(str(rows[odd - 1]))}. Every row "
            "must be one JSON object."
        )
    return rows


def excerpt(line: str, length: int = 60) -> str:
    line = line.strip()
    return line if len(line) <= length else f"{line[:length]}..."
