"""What every command shows alike: progress bars, and tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(console: Console, *, width: int = 0, remaining: bool = True) -> Progress:
    """A bar that says what is being done, how much of it is done and how long it takes; gone when all is done.

    Args:
        console: Where it is drawn.
        width: The least width of the description, in characters.
        remaining: Show the time that is left, rather than the time that has passed.
    """
    time = TimeRemainingColumn() if remaining else TimeElapsedColumn()
    description = TextColumn(f"{{task.description:<{width}}}" if width else "{task.description}")
    return Progress(description, BarColumn(), MofNCompleteColumn(), time, console=console, transient=True)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """The lines of a table in Markdown.

    Args:
        heads: What stands over the columns.
        rows: The cells; a bar in one is escaped.
        left: The columns that are aligned on the left; numbers are on the right.
    """
    rule = ["---" if column in left else "---:" for column in range(len(heads))]
    return [_line(heads), _line(rule), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
