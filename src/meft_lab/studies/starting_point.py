"""Does a method have to start from the pretrained model? LoRA and (IA)3 from perturbed starts.

Both start as the pretrained model: one of LoRA's factors is zero, the vectors of (IA)3 are one. The paper (Liao, Tan
and Monz 2023, section 2.2) starts them elsewhere, and finds that the score falls with the distance: its starting-point
hypothesis, from which it derives how a reversible network must be initialised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from meft.errors import ConfigError
from meft.parsing import option

from . import figures
from .base import Column, Found, Request, Row, Study
from .report import number, plain, score
from .trained import Change, training_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Grid:
    """The starts."""

    _argument_group_name = "starting points"

    lora_scales: list[float] = field(
        default_factory=lambda: [0.0, 0.05, 0.1, 0.2],
        metadata={
            "help": "Standard deviations that both factors of LoRA are drawn with; 0 is LoRA's own start, one factor "
            "zero."
        },
    )
    ia3_values: list[float] = field(
        default_factory=lambda: [1.0, 0.8, 0.5, 0.0],
        metadata={"help": "What the vectors of (IA)3 start at; 1 is its own start."},
    )
    lora_learning_rate: float = option("Learning rate of LoRA.", 5e-4)
    ia3_learning_rate: float = option("Learning rate of (IA)3.", 5e-3)


def rows(request: Request) -> list[Row]:
    grid = request.parsed()[Grid]
    if any(scale < 0 for scale in grid.lora_scales):
        raise ConfigError(f"lora_scales is {grid.lora_scales}; a standard deviation must be 0 or more.")
    found = []
    for scale in grid.lora_scales:
        change = Change({"lora_scale": scale}, partial(draw_factors, std=scale)) if scale else None
        words = ("--method", "lora", "--learning_rate", str(grid.lora_learning_rate))
        cells = training_cells(request, f"LoRA, scale {scale:g}", words, change)
        found.append(Row({"method": "LoRA", "start": scale}, tuple(cells)))
    for value in grid.ia3_values:
        change = Change({"ia3_value": value}, partial(fill_vectors, value=value)) if value != 1 else None
        words = ("--method", "ia3", "--learning_rate", str(grid.ia3_learning_rate))
        cells = training_cells(request, f"(IA)3, value {value:g}", words, change)
        found.append(Row({"method": "(IA)3", "start": value}, tuple(cells)))
    return found


def draw_factors(model: nn.Module, std: float) -> None:
    """Draws both factors of every LoRA update from N(0, std^2)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.normal_(std=std)


def fill_vectors(model: nn.Module, value: float) -> None:
    """Sets every element of the vectors of (IA)3."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ia3_l." in name:
                parameter.fill_(value)


def draw(found: Sequence[Found]) -> Figure:
    points = {
        method: [
            (row["starting_point"], row["score"], f"{row['start']:g}")
            for row in found
            if row["method"] == method and row.get("score") is not None and row.get("starting_point") is not None
        ]
        for method in ("LoRA", "(IA)3")
    }
    labels = {"LoRA": "LoRA, by scale of both factors", "(IA)3": "(IA)3, by value of the vectors"}
    figure = figures.new(7.2, 4.4)
    axes = figure.subplots()
    for index, (method, places) in enumerate(points.items()):
        figures.labelled_points(axes, places, figures.COLOURS[index], figures.MARKERS[index], labels[method])
    axes.set_xlabel("starting-point deviation: relative change of the last hidden state")
    axes.set_ylabel(figures.score_label(found))
    axes.set_title("Score against the distance of the start from the pretrained model")
    axes.legend()
    return figure


STUDY = Study(
    name="starting-point",
    title="Starting point: score against the size of the initial perturbation",
    sentence="Starts LoRA and (IA)3 away from the pretrained model, and trains them.",
    grid=Grid,
    kind="training",
    rows=rows,
    columns=(
        Column("method", "method"),
        Column("start", "start", plain),
        Column("starting-point deviation", "starting_point", number),
        Column("score", "score", score),
        Column("sd over seeds", "score_sd", plain),
        Column("training loss", "train_loss", number),
    ),
    draw=draw,
    notes=(
        "Start: for LoRA the standard deviation of both factors (0: one factor is zero, as usual), for (IA)3 the value "
        "of its vectors (1 as usual). Deviation: relative change of the last hidden state on the first training batch.",
    ),
    quick={"lora_scales": (0.0, 0.2), "ia3_values": (1.0, 0.5)},
)
