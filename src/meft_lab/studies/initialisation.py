"""How adapters should start: near zero, exactly at zero, or larger.

The paper draws both projections from N(0, 0.02^2), which leaves the adapters' output near zero; a larger draw moves the
start away from the pretrained model. With both projections at zero no gradient reaches either of them, since each one's
gradient is a product with the other; so "zero" here is the up-projection at zero, as in LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from meft.errors import ConfigError
from meft.methods.table import COUPLED_METHODS
from meft.options import INIT_STD, check_choice

from . import figures
from .base import Column, Found, Request, Row, Study
from .probes import ADAPTER
from .report import number, plain, score
from .trained import Change, training_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ADAPTED = ("adapter", *COUPLED_METHODS)


@dataclass
class Grid:
    """The initialisations."""

    _argument_group_name = "initialisation"

    methods: list[str] = field(
        default_factory=lambda: ["meft1"], metadata={"help": f"Methods with adapters: {', '.join(_ADAPTED)}."}
    )
    scales: list[float] = field(
        default_factory=lambda: [0.0, INIT_STD, 0.1, 0.3],
        metadata={
            "help": f"Standard deviations of both projections; {INIT_STD:g} is meft's own, 0 sets the up-projection "
            "to zero."
        },
    )


def rows(request: Request) -> list[Row]:
    grid = request.parsed()[Grid]
    if any(scale < 0 for scale in grid.scales):
        raise ConfigError(f"scales is {grid.scales}; a standard deviation must be 0 or more.")
    found = []
    for method in grid.methods:
        check_choice("methods", method, _ADAPTED)
        for scale in grid.scales:
            change = Change({"adapter_scale": scale}, partial(draw_adapters, std=scale)) if scale != INIT_STD else None
            cells = training_cells(request, f"{method}, scale {scale:g}", ("--method", method), change)
            found.append(Row({"method": method, "scale": scale, "start": _name(scale)}, tuple(cells)))
    return found


def draw_adapters(model: nn.Module, std: float) -> None:
    """Draws the projections of all adapters from N(0, std^2); with 0 the up-projections become zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ADAPTER not in name or not name.endswith("weight"):
                continue
            if std:
                parameter.normal_(std=std)
            elif "_up." in name:
                parameter.zero_()


def _name(scale: float) -> str:
    return "zero" if not scale else "near zero" if scale <= INIT_STD else "larger"


def draw(found: Sequence[Found]) -> Figure:
    figure = figures.new(7.2, 4.4)
    axes = figure.subplots()
    for index, method in enumerate(dict.fromkeys(row["method"] for row in found)):
        places = [
            (row["starting_point"], row["score"], f"{row['scale']:g}")
            for row in found
            if row["method"] == method and row.get("score") is not None and row.get("starting_point") is not None
        ]
        figures.labelled_points(axes, places, figures.COLOURS[index], figures.MARKERS[index], f"{method}, by scale")
    axes.set_xlabel("starting-point deviation: relative change of the last hidden state")
    axes.set_ylabel(figures.score_label(found))
    axes.set_title("Score against the initial scale of the adapters")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return figure


STUDY = Study(
    name="initialisation",
    title="Initialisation of the adapters: zero, near zero, larger",
    sentence="Draws the adapters near zero, larger, or at zero, and trains them.",
    grid=Grid,
    kind="training",
    rows=rows,
    columns=(
        Column("method", "method"),
        Column("start", "start"),
        Column("scale", "scale", plain),
        Column("starting-point deviation", "starting_point", number),
        Column("score", "score", score),
        Column("sd over seeds", "score_sd", plain),
        Column("training loss", "train_loss", number),
    ),
    draw=draw,
    notes=(
        "Scale: standard deviation of both projections; at 0 the up-projection is zero, so that the adapters' output "
        "is, and the down-projection is as usual. Deviation: relative change of the last hidden state on the first "
        "training batch, which the coupling causes besides the adapters.",
    ),
    quick={"scales": (0.0, INIT_STD)},
)
