"""What is looked at in a model without training it: exactness, gradients, streams, memory and time of a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from meft.engine.engine import observed_by
from meft.engine.tape import Tape
from meft.errors import DriftWarning, StreamOverflowError
from meft.training.costs import measure_costs
from meft.tuner.peft_type import MEFT
from meft.verification import verify
from meft.verification.gradients import Gradient, gradients_of

from .base import Found

# PEFT begins the names of a method's parameters so.
ADAPTER = f"{MEFT.value.lower()}_"


def verified(model: nn.Module, batch: Mapping[str, Any]) -> Found:
    """What `meft.verify` finds: `bitwise`, `reconstruction_error`, `gradient_error`, `starting_point`."""
    with unwarned():
        report = verify(model, batch)
    return {
        "bitwise": report.bitwise,
        "reconstruction_error": report.worst_reconstruction,
        "gradient_error": report.gradient_error,
        "starting_point": report.starting_point.hidden_state,
    }


def adapter_gradients(model: nn.Module, batch: Mapping[str, Any], seed: int = 0) -> list[Gradient]:
    """Gradients of the adapters in a training step, in the order of the parameters.

    The task head is left out: it lies above the reversible layers, so its gradient is never wrong, and it is so large
    that it would hide those of the adapters.
    """
    named = model.named_parameters()
    parameters = [parameter for name, parameter in named if parameter.requires_grad and ADAPTER in name]
    with unwarned(), torch.random.fork_rng():
        torch.manual_seed(seed)
        return gradients_of(model.train(), batch, parameters)


def gradient_distance(found: Sequence[Gradient], reference: Sequence[Gradient]) -> float:
    """|found - reference| / |reference| over all parameters as one vector, in float64."""
    pairs = [pair for pair in zip(found, reference, strict=True) if any(value is not None for value in pair)]
    ours, theirs = (torch.cat([_flat(pair[side], pair[1 - side]) for pair in pairs]) for side in (0, 1))
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))


def _flat(value: Gradient, other: Gradient) -> Tensor:
    """A gradient as a vector; one that is None beside one that is not counts as zeros."""
    if value is not None:
        return value.double().flatten()
    assert other is not None
    return torch.zeros(other.numel(), dtype=torch.float64)


def largest_stream(model: nn.Module, batch: Mapping[str, Any]) -> Found:
    """The largest magnitude of the streams below the layers, and whether it was too large for them."""
    meter = _Meter()
    with unwarned(), torch.random.fork_rng(), observed_by(meter):
        try:
            gradients_of(model.train(), batch, [next(p for p in model.parameters() if p.requires_grad)])
        except StreamOverflowError:
            return {"largest_stream": meter.largest, "overflow": True}
    return {"largest_stream": meter.largest, "overflow": False}


class _Meter:
    """The observer that keeps the largest magnitude."""

    def __init__(self) -> None:
        self.largest = 0.0

    def passed(self, tape: Tape, depth: int, streams: tuple[Tensor, Tensor]) -> None:
        for stream in streams:
            self.largest = max(self.largest, float(tape.arithmetic.decode(stream, torch.float64).abs().max()))

    def rebuilt(self, tape: Tape, depth: int, streams: tuple[Tensor, Tensor]) -> None:
        """What is rebuilt was there before."""


def step_costs(
    model: nn.Module, batch: Mapping[str, Tensor], reference: Callable[[], nn.Module] | None, steps: int
) -> Found:
    """Exact peak of activations, and time as a ratio to a reference whose steps alternate with the model's."""
    with unwarned():
        costs = measure_costs(model, batch, steps=steps, reference=reference, reference_name="full")
    return {
        "activation_bytes": costs.peak_activation_bytes,
        "activation_causes": costs.peak_activation_causes,
        "step_seconds": costs.step_seconds,
        "time_ratio": costs.step_time_ratio if reference is not None else 1.0,
    }


def without_dropout(model: nn.Module) -> None:
    """Sets every probability of dropout to 0, in the modules and in the configuration that new adapters read."""
    for holder in (model.config, *model.modules()):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and ("drop" in name or (isinstance(holder, nn.Dropout) and name == "p")):
                setattr(holder, name, 0.0)


@contextmanager
def unwarned() -> Iterator[None]:
    """Drift is what is being measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)
        yield
