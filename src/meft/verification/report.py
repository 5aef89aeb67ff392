"""What `meft.verify` found: numbers, a table, a figure, and whether that is as it should be."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

from meft.storage.figures import save_figure
from meft.storage.files import finite

from .figure import Curve, error_against_depth


@dataclass(frozen=True)
class LayerError:
    """How far the streams below one layer, as rebuilt by the backward pass, are from those of the forward pass.

    Attributes:
        layer: the layer's position in its stack, from 0.
        relative: |rebuilt - original| / |original| in the Euclidean norm over both streams; inf if not finite.
        largest: the largest difference of an element, in the units of the hidden state; inf if not finite.
        differing: number of elements of both streams whose bits differ.
        elements: number of elements of both streams.
    """

    layer: int
    relative: float
    largest: float
    differing: int
    elements: int

    @property
    def bitwise(self) -> bool:
        """Whether the rebuilt streams are the original ones bit for bit."""
        return self.differing == 0


@dataclass(frozen=True)
class StartingPoint:
    """How far the model is from the one whose layers are run as they are, without coupling and adapters.

    Attributes:
        hidden_state: |coupled - plain| / |plain| of the last hidden state, in the Euclidean norm, padding included.
        loss: |coupled - plain| / |plain| of the loss, or None where the batch has no labels.
        coupled_loss: the model's loss in evaluation, or None.
        plain_loss: the same of the plain model.
        kl: KL divergence of the model's predictions from the plain model's in nats, a mean over positions; None where
            it returns no logits.
    """

    hidden_state: float
    loss: float | None = None
    coupled_loss: float | None = None
    plain_loss: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Deployment:
    """The loss on the batch in evaluation, with the coupling and on the plain model.

    Attributes:
        trained: as the model is trained, with its coupling but without dropout; with random signs the mean of a few
            draws.
        deployed: on the plain model, which `restore` leaves, with whatever was trained inside its layers.
        by_gamma: with other gammas of `momentum`, by their names ("1/8"); empty for other couplings.
    """

    trained: float
    deployed: float
    by_gamma: Mapping[str, float]


@dataclass(frozen=True)
class VerifyReport:
    """What `meft.verify` found. `print(report)` shows it as a table.

    Attributes:
        bitwise: whether every rebuilt stream is the original one bit for bit, in every layer of every stack.
        reconstruction_error: by name of the stack, one `LayerError` for each layer that the backward pass rebuilt, from
            the lowest up. Frozen and cached layers, and those below the lowest trainable one, are not rebuilt.
        gradient_error: the largest of `gradient_errors`; inf if a gradient is not finite.
        gradient_errors: by name of the trainable parameter, the relative difference between its gradient with the
            reversible backward pass and with stored activations: |difference| / |gradient|, where a gradient below
            `gradient_floor` counts as that large, since what is left of it is rounding error.
        gradient_floor: the norm under which a gradient is rounding error.
        starting_point: the distance from the plain model.
        exact: whether streams are to be bit-equal: exact arithmetic, without anchors.
        precision: the coarsest dtype that took part.
        drift_tolerance: the relative error of rebuilt streams that is allowed where they need not be bit-equal.
        gradient_tolerance: the `gradient_error` that is allowed.
        integrity_error: what the integrity check of the backward pass raised, or None.
        deployment: the loss as trained and as deployed, if `verify` was asked for it.
        plans: by name of the stack, the options it is run with, those that were left open included.
    """

    bitwise: bool
    reconstruction_error: Mapping[str, tuple[LayerError, ...]]
    gradient_error: float
    gradient_errors: Mapping[str, float]
    gradient_floor: float
    starting_point: StartingPoint
    exact: bool
    precision: str
    drift_tolerance: float
    gradient_tolerance: float
    integrity_error: str | None = None
    deployment: Deployment | None = None
    plans: Mapping[str, str] = field(default_factory=dict)

    @property
    def worst_reconstruction(self) -> float:
        """The largest relative error of any layer."""
        return max(error.relative for errors in self.reconstruction_error.values() for error in errors)

    def passed(self, *, drift_tolerance: float | None = None, gradient_tolerance: float | None = None) -> bool:
        """Tells whether the model is rebuilt as its options promise, and its gradients are right.

        Args:
            drift_tolerance: for float arithmetic and anchors, the relative error allowed; None for the model's own.
            gradient_tolerance: the relative difference of gradients allowed; None for that of the report.
        """
        drift = self.drift_tolerance if drift_tolerance is None else drift_tolerance
        gradient = self.gradient_tolerance if gradient_tolerance is None else gradient_tolerance
        return self._rebuilt_within(drift) and self.gradient_error <= gradient

    def figure(self, path: str | os.PathLike[str]) -> Path:
        """Draws the relative error against the number of layers rebuilt; the file ends in .svg, .png or .pdf.

        Raises:
            ConfigError: the ending is another, or the folder does not exist.
        """
        curves = {name: curve(errors) for name, errors in self.reconstruction_error.items()}
        return save_figure(error_against_depth({"Reconstruction error": curves}), path)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it, numbers that are not finite as None."""
        found: dict[str, Any] = finite(asdict(self))
        return {"passed": self.passed(), **found}

    def __rich__(self) -> RenderableType:
        stacks = [_layers_table(name, errors) for name, errors in self.reconstruction_error.items()]
        deployment = [] if self.deployment is None else [_deployment_table(self.deployment)]
        return Group(*stacks, *deployment, self._summary_table())

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=100, color_system=None).print(self)
        return text.getvalue().rstrip("\n")

    def _rebuilt_within(self, drift: float) -> bool:
        return self.bitwise if self.exact else self.worst_reconstruction <= drift

    def _summary_table(self) -> Table:
        demanded = "bit-equal" if self.exact else f"at most {self.drift_tolerance:.0e}"
        equal = sum(error == 0 for error in self.gradient_errors.values())
        start = self.starting_point
        table = Table(show_header=False, title="Summary", title_justify="left")
        table.add_column()
        table.add_column(justify="right")
        table.add_column(overflow="fold")
        table.add_row(
            "reconstruction", _number(self.worst_reconstruction), f"largest relative error; demanded: {demanded}"
        )
        if self.integrity_error is not None:
            table.add_row("", "raised", f"integrity check: {self.integrity_error}")
        table.add_row(
            "gradients",
            _number(self.gradient_error),
            "largest relative difference to those with stored activations; demanded: at most "
            f"{self.gradient_tolerance:.0e} ({self.precision})",
        )
        table.add_row("", f"{equal} of {len(self.gradient_errors)}", "parameters have the same gradient bit for bit")
        if self.gradient_error:
            table.add_row("", "worst", max(self.gradient_errors, key=lambda name: self.gradient_errors[name]))
        table.add_row("starting point", _number(start.hidden_state), "change of the last hidden state by the coupling")
        if start.loss is not None:
            change = f"change of the loss: {start.coupled_loss:.4f} instead of {start.plain_loss:.4f}"
            table.add_row("", _number(start.loss), change)
        if start.kl is not None:
            table.add_row("", _number(start.kl), "nats (KL) of its predictions from the plain model's")
        for name, plan in self.plans.items():
            table.add_row("plan", "", f"{name}: {plan}")
        table.add_row("verdict", "passed" if self.passed() else "failed", "")
        return table


def _layers_table(name: str, errors: tuple[LayerError, ...]) -> Table:
    table = Table(title=f"{name}: rebuilt streams against the original ones", title_justify="left")
    for header in ("layer", "relative error", "largest difference", "differing elements", "bit-equal"):
        table.add_column(header, justify="right")
    for error in errors:
        differing = f"{error.differing:,} of {error.elements:,}"
        equal = "yes" if error.bitwise else "no"
        table.add_row(str(error.layer), _number(error.relative), _number(error.largest), differing, equal)
    return table


def _deployment_table(found: Deployment) -> Table:
    table = Table(title="Loss in evaluation", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    rows = {"as trained": found.trained, **{f"gamma {gamma}": loss for gamma, loss in found.by_gamma.items()}}
    for name, loss in rows.items():
        table.add_row(name, f"{loss:.4f}", f"then on the plain model: {found.deployed - loss:+.4f}")
    table.add_row("as deployed", f"{found.deployed:.4f}", "on the plain model, without a coupling")
    return table


def curve(errors: tuple[LayerError, ...]) -> Curve:
    """The points of one stack for a figure: (layers rebuilt so far, relative error), from the output down."""
    return [(count, error.relative) for count, error in enumerate(reversed(errors), start=1)]


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.1e}" if math.isfinite(value) else "not finite"
