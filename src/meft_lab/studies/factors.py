"""The factors of the couplings: small ones stay near the pretrained model, and lose more when they are undone.

lam scales the first stream of meft1 to meft3, beta the second, gamma the difference of the streams of momentum. The
paper (section 3.2) chooses lam so small that the network starts near the pretrained one, and pays with the error of
dividing by it. Exact arithmetic has no such error, so that only start and score are left to choose by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from meft.engine.couplings import COUPLINGS, make_coupling
from meft.errors import ConfigError
from meft.options import check_choice
from meft.tuner.config import MeftConfig

from . import figures
from .base import Cell, Column, Found, Request, Row, Study, Tick
from .probes import largest_stream, verified
from .report import number, plain, score, yes_no
from .trained import ready, settings_of, training_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NONE = "none"
_TWO_FACTORS = ("meft1", "meft2", "meft3")


@dataclass
class Grid:
    """The grid."""

    _argument_group_name = "factors"

    couplings: list[str] = field(default_factory=lambda: list(COUPLINGS), metadata={"help": "Couplings."})
    lams: list[float] = field(
        default_factory=lambda: [0.1, 0.25, 0.5, 1.0],
        metadata={"help": "Factors of the first stream (meft1, meft2, meft3)."},
    )
    betas: list[float] = field(
        default_factory=lambda: [0.1, 0.5, 1.0],
        metadata={"help": "Factors of the second stream (meft1, meft2, meft3)."},
    )
    gammas: list[float] = field(
        default_factory=lambda: [0.0625, 0.125, 0.25, 0.5], metadata={"help": "Factors of momentum."}
    )
    scored: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Couplings that are trained, where at most one factor is not the coupling's own; none for no "
            "training. Left out: all."
        },
    )

    def check(self) -> None:
        """Raises ConfigError if a value is not valid."""
        for coupling in self.couplings:
            check_choice("couplings", coupling, COUPLINGS)
        for coupling in self.scored:
            if coupling not in (*self.couplings, NONE):
                raise ConfigError(
                    f"scored is {self.scored}, but {coupling!r} is none of the couplings of this study: "
                    f"{', '.join(self.couplings)}. Name some of these, or {NONE}."
                )


def rows(request: Request) -> list[Row]:
    grid = request.parsed()[Grid]
    grid.check()
    found = []
    for coupling, factors in _points(grid):
        words = ["--method", coupling]
        for name, value in factors.items():
            words += [f"--{name}", repr(value)]
        MeftConfig(coupling=coupling, **factors)  # refused now, not after other cells
        label = f"{coupling}, " + ", ".join(f"{name} {value:g}" for name, value in factors.items())
        cells = [_stability_cell(request, label, tuple(words))]
        scored = coupling in (grid.scored or grid.couplings)
        if scored and _away(coupling, factors) <= 1:
            cells += training_cells(request, label, _own_left_out(coupling, factors))
        found.append(Row({"coupling": coupling, **factors}, tuple(cells)))
    return found


def _points(grid: Grid) -> list[tuple[str, dict[str, float]]]:
    points: list[tuple[str, dict[str, float]]] = []
    for coupling in grid.couplings:
        if coupling in _TWO_FACTORS:
            points += [(coupling, {"lam": lam, "beta": beta}) for lam in grid.lams for beta in grid.betas]
        else:
            points += [(coupling, {"gamma": gamma}) for gamma in grid.gammas]
    return points


def _own(coupling: str) -> dict[str, float]:
    """The factors that a coupling has when none are given."""
    steps = make_coupling(coupling).steps
    if coupling not in _TWO_FACTORS:
        return {"gamma": steps[0].factor}
    return dict(zip(("lam", "beta"), (step.factor for step in steps), strict=True))


def _away(coupling: str, factors: dict[str, float]) -> int:
    return sum(_own(coupling)[name] != value for name, value in factors.items())


def _own_left_out(coupling: str, factors: dict[str, float]) -> tuple[str, ...]:
    """The words without what would be chosen anyway, so that other studies' trainings are the same cells."""
    words = ["--method", coupling]
    for name, value in factors.items():
        words += [f"--{name}", repr(value)] if _own(coupling)[name] != value else []
    return tuple(words)


def _stability_cell(request: Request, label: str, words: tuple[str, ...]) -> Cell:
    """Looks at the model before any training, in float32 without mixed precision."""
    words = (*words, "--dtype", "float32", "--bf16", "false", "--fp16", "false")
    return Cell(f"{label}: stability", {"stability": settings_of(request, words)}, partial(_stability, request, words))


def _stability(request: Request, words: tuple[str, ...], tick: Tick) -> Found:
    with ready(request, *words, "--arithmetic", "float") as (_, prepared, batch):
        drifted = verified(prepared.model, batch)
    tick(0.6)
    with ready(request, *words, "--arithmetic", "exact") as (_, prepared, batch):
        streams = largest_stream(prepared.model, batch)
    return {
        "initial_deviation": drifted["starting_point"],
        "float_reconstruction_error": drifted["reconstruction_error"],
        "float_gradient_error": drifted["gradient_error"],
        **streams,
    }


def draw(found: Sequence[Found]) -> Figure:
    figure = figures.new(12.5, 4.8)
    left, right = figure.subplots(1, 2)
    for index, coupling in enumerate(dict.fromkeys(row["coupling"] for row in found)):
        mine = [row for row in found if row["coupling"] == coupling and row.get("initial_deviation") is not None]
        style: dict[str, Any] = {"colour": figures.METHOD_COLOURS[coupling], "marker": figures.MARKERS[index]}
        errors = [
            (row["initial_deviation"], min(row["float_reconstruction_error"] or CEILING, CEILING), _text(row))
            for row in mine
        ]
        figures.labelled_points(left, errors, style["colour"], style["marker"], coupling, joined=False)
        scores = [(row["initial_deviation"], row["score"], _text(row)) for row in mine if row.get("score") is not None]
        figures.labelled_points(right, scores, style["colour"], style["marker"], coupling, joined=False)
    left.set_yscale("log")
    left.set_ylabel(f"relative error of rebuilt streams, at most {CEILING:g}")
    left.set_title("Float32 arithmetic (exact arithmetic: 0)", fontsize="medium")
    right.set_ylabel(figures.score_label(found))
    right.set_title("Exact arithmetic, trained", fontsize="medium")
    for axes in (left, right):
        axes.set_xlabel("starting-point deviation: relative change of the last hidden state")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.suptitle("What the factors of the couplings cost; the numbers are lam, beta or gamma")
    return figure


CEILING = 1e3


def _text(row: Found) -> str:
    return f"{row['gamma']:g}" if "gamma" in row else f"{row['lam']:g}, {row['beta']:g}"


STUDY = Study(
    name="factors",
    title="Factors: starting point, stability and score against lam, beta and gamma",
    sentence="Varies lam, beta and gamma: distance from the pretrained model, stability in floats, score.",
    grid=Grid,
    kind="training",
    rows=rows,
    columns=(
        Column("coupling", "coupling"),
        Column("lam", "lam", plain),
        Column("beta", "beta", plain),
        Column("gamma", "gamma", plain),
        Column("starting-point deviation", "initial_deviation", number),
        Column("float32: error of streams", "float_reconstruction_error", number),
        Column("float32: error of gradients", "float_gradient_error", number),
        Column("largest stream", "largest_stream", number),
        Column("overflow", "overflow", yes_no),
        Column("score, exact", "score", score),
        Column("sd over seeds", "score_sd", plain),
    ),
    draw=draw,
    notes=(
        "Before training, on the first training batch: relative change of the last hidden state; in float32 arithmetic "
        "the largest relative error of the rebuilt streams of any layer and of the gradient of any parameter; the "
        "largest magnitude of a stream in exact arithmetic, which holds up to 32768. Scores are trained in exact "
        "arithmetic, where every stream is rebuilt bit for bit.",
    ),
    quick={"couplings": ("meft1", "momentum"), "lams": (0.1, 0.5), "betas": (1.0,), "gammas": (0.25,)},
)
