"""Keeps the streams of a forward pass and compares the backward pass's rebuilt ones with them, bit by bit."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from meft.backbone.conversion import Stack
from meft.backbone.stack import ReversibleStack
from meft.engine.couplings import Streams
from meft.engine.replay import Autocast
from meft.engine.tape import Tape

from .report import LayerError


@dataclass(frozen=True)
class CoupledStack:
    """One reversible stack of a model.

    Attributes:
        name: what the report calls it.
        stack: where it stands in the model.
        reversible_stack: how it is run.
    """

    name: str
    stack: Stack
    reversible_stack: ReversibleStack


@dataclass
class _Pass:
    """One forward pass through one stack: the streams below its layers, until they are compared, and the outcome."""

    stack: CoupledStack
    tape: Tape
    first: int = 0
    below: dict[int, Streams] = field(default_factory=dict)
    errors: dict[int, LayerError] = field(default_factory=dict)


class Recorder:
    """The observer: keeps the streams of the forward pass and compares them with the rebuilt ones.

    Attributes:
        dtypes: those that hidden states and the layers' arithmetic have had.
    """

    def __init__(self, coupled: Sequence[CoupledStack]) -> None:
        self.coupled = coupled
        self.passes: dict[int, _Pass] = {}
        self.dtypes: set[torch.dtype] = set()

    def passed(self, tape: Tape, depth: int, streams: Streams) -> None:
        if id(tape) not in self.passes:
            running = [
                entry for entry in self.coupled if entry.reversible_stack._running.get(threading.get_ident()) is tape
            ]
            if not running:
                return
            self.passes[id(tape)] = _Pass(running[0], tape, running[0].reversible_stack.position() - depth)
            self.dtypes |= {tape.dtype, *_autocast(tape.device)}
        self.passes[id(tape)].below[depth] = streams

    def rebuilt(self, tape: Tape, depth: int, streams: Streams) -> None:
        found = self.passes.get(id(tape))
        if found is not None:
            layer = depth + found.first
            found.errors[layer] = _compare(tape, layer, found.below.pop(depth), streams)

    def errors(self) -> dict[str, tuple[LayerError, ...]]:
        """By stack, from the lowest layer up; a stack that ran more than once has its passes numbered."""
        collected: dict[str, tuple[LayerError, ...]] = {}
        for found in self.passes.values():
            if not found.errors:
                continue
            name, count = found.stack.name, 1
            # A list whose hidden state changes its shape on the way is run as several, one above the other.
            while name in collected and collected[name][-1].layer >= min(found.errors):
                count += 1
                name = f"{found.stack.name} (pass {count})"
            errors = tuple(found.errors[layer] for layer in sorted(found.errors))
            collected[name] = (*collected.get(name, ()), *errors)
        return collected


def _compare(tape: Tape, layer: int, original: Streams, rebuilt: Streams) -> LayerError:
    """Compares both streams as one vector, in float64 and in the units of the hidden state."""
    first, second = (torch.cat([stream.reshape(-1) for stream in pair]) for pair in (original, rebuilt))
    differing = int((_bits(first) != _bits(second)).sum())
    a, b = (tape.arithmetic.decode(stream, torch.float64) for stream in (first, second))
    largest = float((a - b).abs().max()) if a.numel() else 0.0
    largest = largest if math.isfinite(largest) else math.inf
    return LayerError(layer, relative_difference(b, a), largest, differing, first.numel())


def _autocast(device: torch.device) -> list[torch.dtype]:
    return [autocast.dtype for autocast in Autocast.take(device) if autocast.enabled]


def _bits(values: Tensor) -> Tensor:
    """Floats as the integers of their bits: -0 is not 0, and a NaN equals itself."""
    if not values.is_floating_point():
        return values
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def relative_difference(found: Tensor, reference: Tensor) -> float:
    """|found - reference| / |reference| in float64; inf if that is not finite."""
    difference = torch.linalg.vector_norm(found.double() - reference.double())
    if difference == 0:
        return 0.0
    value = float(difference / torch.linalg.vector_norm(reference.double()))
    return value if math.isfinite(value) else math.inf
