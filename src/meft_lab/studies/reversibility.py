"""Partial reversibility: what each layer that is frozen, or keeps its activations, does to memory, time and score.

The lowest layers may be frozen: without adapters and without any backward pass. The highest may be cached: they keep
their activations, and need not be run again. Those between are rebuilt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from meft.errors import ConfigError
from meft.methods.table import COUPLED_METHODS
from meft.options import check_choice, check_integer
from meft.parsing import option

from . import figures
from .base import Column, Found, Request, Row, Study
from .report import plain, ratio, score, size
from .trained import costs_cell, depth_of, training_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Grid:
    """The divisions of the layers."""

    _argument_group_name = "reversibility"

    couplings: list[str] = field(default_factory=lambda: ["meft1"], metadata={"help": "Couplings."})
    divisions: list[str] = field(
        default_factory=list,
        metadata={
            "help": "frozen+cached numbers of layers, as 2+0 4+0 0+2; the others are reversible. Left out: none, a "
            "third and two thirds of either, a third of both, and all cached."
        },
    )
    rounds: int = option("Timed steps.", 5)


def rows(request: Request) -> list[Row]:
    grid = request.parsed()[Grid]
    check_integer("rounds", grid.rounds, 1)
    depth = depth_of(request)
    found = []
    for coupling in grid.couplings:
        check_choice("couplings", coupling, COUPLED_METHODS)
        for frozen, cached in _divisions(grid, depth):
            words = ["--method", coupling]
            words += ["--frozen_layers", str(frozen)] if frozen else []
            words += ["--cached_layers", str(cached)] if cached else []
            label = f"{coupling}, {frozen} frozen, {cached} cached"
            cells = [costs_cell(request, label, tuple(words), grid.rounds)]
            cells += training_cells(request, label, tuple(words))
            values = {
                "coupling": coupling,
                "reversible": depth - frozen - cached,
                "frozen": frozen,
                "cached": cached,
            }
            found.append(Row(values, tuple(cells)))
    return found


def _divisions(grid: Grid, depth: int) -> list[tuple[int, int]]:
    """Numbers of frozen and cached layers.

    Raises:
        ConfigError: One is not written as two numbers, or asks for more layers than there are.
    """
    third = max(1, depth // 3)
    usual = [(0, 0), (third, 0), (2 * third, 0), (0, third), (0, 2 * third), (third, third), (0, depth)]
    if not grid.divisions:
        return list(dict.fromkeys(pair for pair in usual if sum(pair) <= depth))
    found = []
    for text in grid.divisions:
        parts = text.split("+")
        if len(parts) != 2 or not all(part.isdigit() for part in parts) or sum(map(int, parts)) > depth:
            raise ConfigError(
                f"divisions has {text!r}; each is a number of frozen and one of cached layers, as 2+1, together at "
                f"most the {depth} layers of the model."
            )
        found.append((int(parts[0]), int(parts[1])))
    return found


def draw(found: Sequence[Found]) -> Figure:
    figure = figures.new(13, 4.4)
    panels = figure.subplots(1, 3)
    for index, coupling in enumerate(dict.fromkeys(row["coupling"] for row in found)):
        for turn, (title, wanted) in enumerate(_SERIES.items()):
            mine = [row for row in found if row["coupling"] == coupling and wanted(row)]
            style = (figures.COLOURS[2 * index + turn], figures.MARKERS[turn], f"{coupling}: {title}")
            for axes, key, scale in zip(
                panels, ("activation_bytes", "time_ratio", "score"), (1 / figures.MIB, 1, 1), strict=True
            ):
                places = [
                    (row["reversible"], scale * row[key], "" if turn < 2 else f"{row['frozen']}+{row['cached']}")
                    for row in mine
                    if row.get(key) is not None
                ]
                figures.labelled_points(axes, places, *style, joined=turn < 2)
    full = next((row["full_activation_bytes"] for row in found if row.get("full_activation_bytes")), None)
    if full:
        panels[0].axhline(full / figures.MIB, color="0.4", linestyle="--", linewidth=1, label="full fine-tuning")
    labels = ("peak of activations, MiB", "time of a step / full fine-tuning", figures.score_label(found))
    for axes, label, title in zip(panels, labels, ("Memory", "Time", "Score"), strict=True):
        axes.set_xlabel("reversible layers")
        axes.set_ylabel(label)
        axes.set_title(title, fontsize="medium")
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylim(bottom=0)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize="small", frameon=False)
    return figure


_SERIES = {
    "the others frozen": lambda row: row["cached"] == 0,
    "the others cached": lambda row: row["frozen"] == 0,
    "frozen+cached": lambda row: row["frozen"] > 0 and row["cached"] > 0,
}

STUDY = Study(
    name="reversibility",
    title="Partial reversibility: memory, time and score",
    sentence="Freezes or caches some of the layers: memory, time and score by the number of reversible ones.",
    grid=Grid,
    kind="training",
    rows=rows,
    columns=(
        Column("coupling", "coupling"),
        Column("reversible", "reversible", plain),
        Column("frozen", "frozen", plain),
        Column("cached", "cached", plain),
        Column("peak of activations", "activation_bytes", size),
        Column("full fine-tuning", "full_activation_bytes", size),
        Column("time / full", "time_ratio", ratio),
        Column("score", "score", score),
        Column("sd over seeds", "score_sd", plain),
    ),
    draw=draw,
    notes=(
        "Memory: exact peak of the live bytes of one step on the first training batch, gradients of weights left out. "
        "Time: medians of alternating steps in one process, as a ratio to full fine-tuning in the same precision.",
    ),
    quick={"divisions": ("0+0", "1+0", "0+2"), "rounds": 1},
)
