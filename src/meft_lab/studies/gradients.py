"""How right are the gradients: rebuilt against stored activations, float against exact arithmetic, in three dtypes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meft.engine.couplings import COUPLINGS
from meft.loading.arguments import ModelArguments
from meft.loading.pretrained import load_pretrained
from meft.methods.registry import apply_method
from meft.options import check_choice, check_integer
from meft.parsing import option
from meft.verification.batches import random_batch, text_batch

from . import figures
from .base import Cell, Column, FolderArguments, Found, Parsed, Request, Row, Study, Tick
from .probes import adapter_gradients, gradient_distance, verified, without_dropout
from .report import number, yes_no

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DTYPES = ("float32", "bfloat16", "float16")
ARITHMETICS = ("exact", "float")


@dataclass
class Grid:
    """What is compared, and on what."""

    _argument_group_name = "gradients"

    couplings: list[str] = field(default_factory=lambda: list(COUPLINGS), metadata={"help": "Couplings."})
    dtypes: list[str] = field(
        default_factory=lambda: list(DTYPES), metadata={"help": "Of the weights: float32, bfloat16, float16."}
    )
    batch_size: int = option("Rows of the batch.", 4)
    seq_length: int = option("Tokens of a row.", 32)
    text_file: str | None = option("A file with a text a line, instead of random tokens.")

    def check(self) -> None:
        """Raises ConfigError if a value is not valid."""
        for coupling in self.couplings:
            check_choice("couplings", coupling, COUPLINGS)
        for dtype in self.dtypes:
            check_choice("dtypes", dtype, DTYPES)
        check_integer("batch_size", self.batch_size, 1)
        check_integer("seq_length", self.seq_length, 2)


def rows(request: Request) -> list[Row]:
    parsed = request.parsed()
    grid = parsed[Grid]
    grid.check()
    found = []
    for coupling in grid.couplings:
        for dtype in grid.dtypes:
            for arithmetic in ARITHMETICS:
                values = {"coupling": coupling, "dtype": dtype, "arithmetic": arithmetic}
                shared = {"batch_size": grid.batch_size, "seq_length": grid.seq_length, "text_file": grid.text_file}
                settings = {
                    **{name: str(value) for name, value in asdict(parsed[ModelArguments]).items()},
                    "gradients": values | shared | {"seed": parsed[FolderArguments].seed},
                }
                cell = Cell(
                    f"{coupling}, {dtype}, {arithmetic}",
                    settings,
                    partial(_compare, parsed, coupling, dtype, arithmetic),
                )
                found.append(Row(values, (cell,)))
    return found


def _compare(parsed: Parsed, coupling: str, dtype: str, arithmetic: str, tick: Tick) -> Found:
    """Gradients of one network against those of float64 with stored activations, the best that can be had."""
    base, batch = _subject(parsed)
    precision, seed = getattr(torch, dtype), parsed[FolderArguments].seed
    build = partial(_coupled, base, coupling, seed)
    truth = adapter_gradients(build("float", "cached", torch.float64), batch)
    tick(0.2)
    cached = adapter_gradients(build(arithmetic, "cached", precision), batch)
    tick(0.4)
    reversible_model = build(arithmetic, "reversible", precision)
    reversible = adapter_gradients(reversible_model, batch)
    tick(0.6)
    report = verified(reversible_model, batch)
    return {
        "cached_error": gradient_distance(cached, truth),
        "reversible_error": gradient_distance(reversible, truth),
        "difference": gradient_distance(reversible, cached),
        "reconstruction_error": report["reconstruction_error"],
        "bitwise": report["bitwise"],
    }


def _subject(parsed: Parsed) -> tuple[Any, Mapping[str, Tensor]]:
    """The pretrained model without dropout, whose masks would differ between dtypes, and a batch."""
    grid, arguments, seed = parsed[Grid], parsed[ModelArguments], parsed[FolderArguments].seed
    torch.manual_seed(seed)
    base, task = load_pretrained(arguments, arguments.model_name_or_path, "SEQ_CLS")
    without_dropout(base)
    sizes = {"batch_size": grid.batch_size, "seq_length": grid.seq_length, "seed": seed}
    if grid.text_file is None:
        return base, random_batch(base, task, **sizes)
    return base, text_batch(arguments, arguments.model_name_or_path, base, task, grid.text_file, **sizes)


def _coupled(base: Any, coupling: str, seed: int, arithmetic: str, backward: str, dtype: torch.dtype) -> nn.Module:
    """The same weights and adapters in any dtype."""
    torch.manual_seed(seed)
    model = apply_method(copy.deepcopy(base), coupling, task_type="SEQ_CLS", arithmetic=arithmetic, backward=backward)
    return model.to(dtype)


def draw(found: Sequence[Found]) -> Figure:
    couplings = list(dict.fromkeys(row["coupling"] for row in found))
    dtypes = list(dict.fromkeys(row["dtype"] for row in found))
    figure = figures.new(max(6.5, 2.9 * len(couplings)), 4.2)
    panels = figure.subplots(1, len(couplings), squeeze=False, sharey=True)[0]
    series = [
        ("exact", "cached_error", "exact, stored activations"),
        ("exact", "reversible_error", "exact, rebuilt"),
        ("float", "cached_error", "float, stored activations"),
        ("float", "reversible_error", "float, rebuilt"),
    ]
    ceiling = 10.0
    for axes, coupling in zip(panels, couplings, strict=True):
        for index, (arithmetic, key, label) in enumerate(series):
            rows_ = [row for row in found if row["coupling"] == coupling and row["arithmetic"] == arithmetic]
            heights = [ceiling if row[key] is None else min(row[key], ceiling) for row in rows_]
            places = [dtypes.index(row["dtype"]) + 0.13 * (index - 1.5) for row in rows_]
            axes.plot(places, heights, figures.MARKERS[index], color=figures.COLOURS[index], label=label, markersize=7)
        axes.set_yscale("log")
        axes.set_ylim(top=2 * ceiling)
        axes.set_xticks(range(len(dtypes)), dtypes)
        axes.set_xlim(-0.5, len(dtypes) - 0.5)
        axes.set_title(coupling, fontsize="medium")
        figures.tidy(axes)
    panels[0].set_ylabel(f"relative error of the gradient, at most {ceiling:g}")
    figure.suptitle("Error of the gradient against float64 with stored activations")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    return figure


def _error(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else number(value)


STUDY = Study(
    name="gradients",
    title="Gradients: rebuilt against stored activations, float against exact arithmetic",
    sentence="Compares gradients with rebuilt and with stored activations, in float and exact arithmetic, by dtype.",
    grid=Grid,
    kind="model",
    rows=rows,
    columns=(
        Column("coupling", "coupling"),
        Column("dtype", "dtype"),
        Column("arithmetic", "arithmetic"),
        Column("stored activations, error", "cached_error", _error),
        Column("rebuilt, error", "reversible_error", _error),
        Column("rebuilt against stored", "difference", _error),
        Column("streams, error", "reconstruction_error", _error),
        Column("streams bit-equal", "bitwise", yes_no),
    ),
    draw=draw,
    notes=(
        "Errors are relative, over the gradient of all adapters as one vector: against the same network in "
        "float64, float arithmetic and stored activations. Dropout is off.",
    ),
    quick={"couplings": ("meft1", "momentum"), "dtypes": ("float32", "bfloat16"), "batch_size": 2, "seq_length": 8},
)
