"""The matrix as a table on the screen, and as the page of the documentation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timezone

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meft.storage.results import versions
from meft.storage.terminal import markdown_table

from .check import FAILED, FULL, REFUSED, WAYS, WORKS, Verdict
from .matrix import Row

_TITLES = {FULL: "full"}
_MARKS = {WORKS: "yes", REFUSED: "no", FAILED: "FAILED"}
_COLOURS = {WORKS: "green", REFUSED: "yellow", FAILED: "bold red"}
_LIBRARIES = ("torch", "transformers", "peft")

_EXPLANATION = """\
Every family is tried on a tiny model with random weights: a training step, exact reconstruction of every stream,
gradients equal to those of stored activations, generation with and without a key-value cache, saving and loading.

- **adapter beside**: the module that the parallel adapter of `MeftConfig` is put beside (`first:last` where the
  feed-forward is entered and left through two). Another one is chosen with `feedforward_module`.
- **meft1** to **momentum**: `coupling` of `MeftConfig`. **full**: full fine-tuning under
  `make_reversible(model)`, and so LoRA and other methods of PEFT.
- **yes**: all checks passed. **no**: refused with an `UnsupportedModelError` before the first training step, for the
  reason in the note.
- **other heads**: further Auto classes whose training step was checked under `meft1` and under **full**.
"""


def report(rows: Sequence[Row]) -> RenderableType:
    """The table printed by `meft families`, and the notes below it."""
    table = Table(title=f"Families of models, tried with {_libraries()}", title_justify="left")
    for heading in ("family", "layer", "adapter beside"):
        table.add_column(heading, overflow="fold")
    for way in WAYS:
        table.add_column(_TITLES.get(way, way), justify="center")
    for row in rows:
        marks = [_coloured(row.cells.get(way)) for way in WAYS]
        table.add_row(row.family.name, "\n".join(row.layers), "\n".join(row.feed_forward), *marks)
    said = [Text(f"{row.family.name}: {note}") for row in rows for note in notes(row)]
    return Group(table, *said)


def markdown(rows: Sequence[Row], command: str) -> str:
    """The page of the documentation."""
    titles = ["family", "layer", "adapter beside", *(_TITLES.get(way, way) for way in WAYS), "other heads", "note"]
    table = []
    for row in rows:
        marks = [_MARKS[row.cells[way].state] if way in row.cells else "" for way in WAYS]
        cells = [
            row.family.name,
            _codes(row.layers),
            _codes(row.feed_forward),
            *marks,
            ", ".join(_working_heads(row)),
            "<br>".join(notes(row)),
        ]
        table.append(cells)
    lines = markdown_table(titles, table, left=range(len(titles)))
    works = sum(cell.state == WORKS for row in rows for cell in row.cells.values())
    refused = sum(cell.state == REFUSED for row in rows for cell in row.cells.values())
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return (
        f"# Families of models\n\nWritten by `{command}` on {date} with {_libraries()}: {len(rows)} families, "
        f"{works} cells work, {refused} are refused. The same command tries them with the versions you have; "
        "`meft families --model_type NAME` tries any model type of Transformers.\n\n"
        f"{_EXPLANATION}\n" + "\n".join(lines) + "\n"
    )


def notes(row: Row) -> list[str]:
    """Reasons of refusals, each with the couplings it holds for, and whatever else a reader must know."""
    if row.problem:
        return [f"not tried: {row.problem}"]
    found = ["sizes guessed, since the model type is not in the catalogue"] if row.family.guessed else []
    if row.idle:
        found.append(f"not reached by the batch: {', '.join(row.idle)}")
    found += _grouped({way: cell.detail for way, cell in row.cells.items() if cell.state == WORKS and cell.detail})
    found += _grouped({way: _reason(detail) for way, detail in row.refusals.items()})
    heads = {f"{head} ({way})": cell for (head, way), cell in row.heads.items() if cell.state == REFUSED}
    found += _grouped({name: _reason(cell.detail) for name, cell in heads.items()})
    return found + _grouped({name: f"FAILED: {detail}" for name, detail in row.failures.items()})


def _grouped(reasons: dict[str, str]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(_TITLES.get(name, name))
    return [f"{'all' if len(group) == len(WAYS) else ', '.join(group)}: {reason}" for reason, group in names.items()]


def _reason(detail: str) -> str:
    """The first sentence of an error; what to do follows there, and is the same for all."""
    return re.split(r"(?<=[\w)\"'])\. (?=[A-Z])", detail, maxsplit=1)[0]


def _working_heads(row: Row) -> list[str]:
    heads = dict.fromkeys(head for head, _ in row.heads)
    return [head for head in heads if all(cell.state == WORKS for (name, _), cell in row.heads.items() if name == head)]


def _coloured(cell: Verdict | None) -> str:
    return "" if cell is None else f"[{_COLOURS[cell.state]}]{_MARKS[cell.state]}[/]"


def _codes(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names if name)


def _libraries() -> str:
    found = versions()
    return ", ".join(f"{name} {found[name]}" for name in ("meft", *_LIBRARIES))
