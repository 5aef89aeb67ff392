"""Precision: memory, time and score by the dtype of the weights and of the arithmetic of the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from meft.methods.registry import METHODS
from meft.options import check_choice, check_integer
from meft.parsing import option

from . import figures
from .base import Column, Found, Request, Row, Study
from .report import plain, ratio, score, size
from .trained import costs_cell, training_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What the words of `meft train` are; (weights, autocast).
PRECISIONS = {
    "float32": ("float32", None),
    "bfloat16-autocast": ("float32", "bf16"),
    "float16-autocast": ("float32", "fp16"),
    "bfloat16": ("bfloat16", None),
    "float16": ("float16", None),
}


@dataclass
class Grid:
    """The precisions."""

    _argument_group_name = "precision"

    methods: list[str] = field(default_factory=lambda: ["meft1"], metadata={"help": "Methods."})
    precisions: list[str] = field(
        default_factory=lambda: list(PRECISIONS),
        metadata={
            "help": f"Of {', '.join(PRECISIONS)}: the dtype of the weights, or that of mixed precision over float32 "
            "weights."
        },
    )
    rounds: int = option("Timed steps.", 5)


def rows(request: Request) -> list[Row]:
    grid = request.parsed()[Grid]
    check_integer("rounds", grid.rounds, 1)
    found = []
    for name in grid.precisions:
        check_choice("precisions", name, tuple(PRECISIONS))
        if name == "float16-autocast" and not torch.cuda.is_available():
            request.say("float16-autocast is left out: the Trainer has it on a GPU only.")
            continue
        for method in grid.methods:
            check_choice("methods", method, tuple(METHODS))
            label = f"{method}, {name}"
            words = ("--method", method, *_words(name))
            cells = [costs_cell(request, label, words, grid.rounds), *training_cells(request, label, words)]
            found.append(Row({"method": method, "precision": name}, tuple(cells)))
    return found


def _words(name: str) -> tuple[str, ...]:
    dtype, autocast = PRECISIONS[name]
    mixed = [word for kind in ("bf16", "fp16") for word in (f"--{kind}", str(kind == autocast).lower())]
    return ("--dtype", dtype, *mixed)


def draw(found: Sequence[Found]) -> Figure:
    several = len({row["method"] for row in found}) > 1
    names = [f"{row['method']}, {row['precision']}" if several else row["precision"] for row in found]
    colours = [figures.COLOURS[list(PRECISIONS).index(row["precision"])] for row in found]
    figure = figures.new(13, 1.8 + 0.42 * len(found))
    panels = figure.subplots(1, 3)
    memory = [None if row.get("activation_bytes") is None else row["activation_bytes"] / figures.MIB for row in found]
    figures.bars(panels[0], names, memory, "{:.1f}", colours)
    figures.bars(panels[1], names, [row.get("time_ratio") for row in found], "{:.2f}", colours)
    figures.bars(panels[2], names, [row.get("score") for row in found], "{:.3f}", colours)
    labels = ("peak of activations, MiB", "time of a step / full fine-tuning", figures.score_label(found))
    for axes, label in zip(panels, labels, strict=True):
        axes.set_xlabel(label)
    for axes in panels[1:]:
        axes.set_yticklabels([])
    methods = ", ".join(dict.fromkeys(row["method"] for row in found))
    figure.suptitle(f"Precision: memory, time and score of {methods}")
    return figure


STUDY = Study(
    name="precision",
    title="Precision: memory, time and score by dtype",
    sentence="Trains in each dtype: memory, time and score.",
    grid=Grid,
    kind="training",
    rows=rows,
    columns=(
        Column("method", "method"),
        Column("precision", "precision"),
        Column("peak of activations", "activation_bytes", size),
        Column("full fine-tuning", "full_activation_bytes", size),
        Column("time / full", "time_ratio", ratio),
        Column("score", "score", score),
        Column("sd over seeds", "score_sd", plain),
    ),
    draw=draw,
    notes=(
        "float32, bfloat16 and float16: dtype of the pretrained weights; what is trained stays in float32, as PEFT has "
        "it. Autocast: mixed precision over float32 weights. Time and memory of full fine-tuning are those in the "
        "same precision. On processors without arithmetic of 16 bits those dtypes take longer, not less.",
    ),
    quick={"precisions": ("float32", "bfloat16"), "rounds": 1},
)
