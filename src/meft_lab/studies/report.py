"""A study's table, for the terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from meft.storage.results import format_bytes
from meft.storage.terminal import markdown_table

from .base import Column, Found

if TYPE_CHECKING:
    from .base import Study


def table(study: Study, results: Found) -> Table:
    """The table printed at the end of a study."""
    shown = Table(title=study.title, title_justify="left", caption="\n".join(study.notes), caption_justify="left")
    columns = _used(study.columns, results["rows"])
    for column in columns:
        shown.add_column(column.heading, justify="left" if column.form is str else "right", overflow="fold")
    for row in results["rows"]:
        shown.add_row(*(_cell(column, row) for column in columns))
    return shown


def markdown(study: Study, results: Found) -> str:
    """The study as a page: table, notes, figure, and where it comes from."""
    columns = _used(study.columns, results["rows"])
    lines = [f"# {study.title}", "", study.sentence, ""]
    if results["quick"]:
        lines += ["**A smoke run with --quick: its figures mean nothing.**", ""]
    cells = [[_cell(column, row) for column in columns] for row in results["rows"]]
    left = [place for place, column in enumerate(columns) if column.form is str]
    lines += markdown_table([column.heading for column in columns], cells, left=left)
    lines += ["", *(f"{note}\n" for note in study.notes)]
    problems = dict.fromkeys(row["problem"] for row in results["rows"] if row.get("problem"))
    lines += [*(f"Stopped: {problem}\n" for problem in problems)]
    lines += [f"![{study.title}]({study.name}.svg)", ""]
    machine = ", ".join(f"{name} {value}" for name, value in results["hardware"].items())
    libraries = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    of_model = f" Model: {results['model']}." if results["model"] else ""
    lines += [f"Measured {results['date'][:10]} by `{results['command']}` on {machine}; {libraries}.{of_model}", ""]
    return "\n".join(lines)


def number(value: float | None) -> str:
    """A magnitude or an error: two digits."""
    if value is None:
        return "not finite"
    if value == 0:
        return "0"
    return f"{value:.1e}" if not 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


def score(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def size(value: int | None) -> str:
    return format_bytes(value)


def yes_no(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def plain(value: Any) -> str:
    """A number of the grid, as short as it can be told."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _used(columns: Sequence[Column], rows: Sequence[Found]) -> list[Column]:
    """Those columns that any row has something for."""
    return [column for column in columns if any(column.key in row for row in rows)]


def _cell(column: Column, row: Found) -> str:
    if column.key not in row:
        return "stopped" if row.get("problem") else ""
    return column.form(row[column.key])
