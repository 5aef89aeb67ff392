"""The tape: the streams of one forward pass through one stack, on their way up and back down."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

from .arithmetic import Arithmetic
from .couplings import Coupling, Streams
from .errors import ConsumedTapeError, DriftWarning, ReconstructionError, StreamOverflowError

Handles = tuple[Tensor, Tensor]
"""What autograd sees in place of the two streams (`engine`, rule 6)."""


class Observer(Protocol):
    """Sees the streams below every layer, in the forward pass and rebuilt; for verification."""

    def passed(self, tape: Tape, depth: int, streams: Streams) -> None:
        """The forward pass is about to run layer `depth` on these streams."""

    def rebuilt(self, tape: Tape, depth: int, streams: Streams) -> None:
        """The backward pass rebuilt the streams below layer `depth`."""


_OBSERVER: ContextVar[Observer | None] = ContextVar("meft_observer", default=None)


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Lets an observer see every forward pass that starts within, and its backward pass."""
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


class Tape:
    """The streams of one forward pass through one stack of layers.

    The forward pass moves `streams` and `handles` along. Backward starts from `kept`, the streams that the last
    reversible node left, and moves them back; `depth` counts the layers they lie above.

    Args:
        coupling: how streams pass through a layer.
        arithmetic: how they are stored.
        hidden: the hidden state that enters the stack, float of any shape.
        drift_tolerance: largest relative deviation of rebuilt streams, where they may deviate, before a warning.
        anchor_every: keep the streams below every so many layers and restart the reconstruction there, for kernels
            that are not deterministic; None for never.
        name: what error messages call the stack.
    """

    def __init__(
        self,
        coupling: Coupling,
        arithmetic: Arithmetic,
        hidden: Tensor,
        *,
        drift_tolerance: float = 1e-2,
        anchor_every: int | None = None,
        name: str = "the stack",
    ) -> None:
        self.coupling, self.arithmetic = coupling, arithmetic
        self.drift_tolerance, self.anchor_every, self.name = drift_tolerance, anchor_every, name
        self.observer = _OBSERVER.get()
        self.shape, self.dtype, self.device = hidden.shape, hidden.dtype, hidden.device
        stream = arithmetic.encode(hidden.detach())
        self.streams: Streams | None = (stream, stream)
        self.handles: Handles | None = (hidden, hidden)
        self.kept: Streams | None = None
        self.forward_depth = self.depth = 0
        self.magnitudes: list[tuple[int, Tensor]] = []
        if arithmetic.limit < float("inf") and hidden.numel():
            self.watch(hidden.detach().abs().amax())
        self.visible: Tensor | None = None
        self.show(hidden)

    # -- forward ---------------------------------------------------------------------------------------------------

    def passed_on(self, hidden: Tensor) -> bool:
        """Tells whether `hidden` is the visible hidden state, unmodified.

        An alias with the same memory counts: hooks (FSDP, full backward hooks) return those.
        """
        if self.visible is None or version_of(hidden) != self.visible_version:
            return False
        return hidden is self.visible or (
            hidden.shape == self.visible.shape
            and hidden.dtype == self.visible.dtype
            and hidden.stride() == self.visible.stride()
            and hidden.data_ptr() == self.visible.data_ptr()
        )

    def hidden(self, index: int) -> Tensor:
        """The value of one stream as a hidden state, without gradient."""
        assert self.streams is not None
        return self.arithmetic.decode(self.streams[index], self.dtype)

    def watch(self, magnitude: Tensor) -> None:
        """Notes the largest magnitude of a stream that the present layer made, without looking at it."""
        self.magnitudes.append((self.forward_depth, magnitude))

    def abandon(self) -> None:
        """Lets go of a forward pass that did not reach its end."""
        self.streams = self.handles = self.visible = None

    def show(self, hidden: Tensor) -> None:
        """Notes the hidden state that the model is handed, to recognise it when it comes back."""
        self.visible = hidden
        self.visible_version = version_of(hidden)

    def live_handles(self) -> Handles:
        """Returns the handles of the running forward pass."""
        if self.handles is None:
            raise ConsumedTapeError(
                f"The forward pass through {self.name} is over; it cannot take another layer. Run the model's forward "
                "pass anew."
            )
        return self.handles

    def check_magnitudes(self) -> None:
        """Looks at every layer's largest magnitude at once: the only synchronisation of a forward pass.

        Raises:
            StreamOverflowError: one of them is too large or not finite.
        """
        if not self.magnitudes:
            return
        values = torch.stack([value.to(self.device, torch.float32) for _, value in self.magnitudes]).tolist()
        peaks: dict[int, float] = {}
        for (layer, _), value in zip(self.magnitudes, values, strict=True):
            before = peaks.get(layer, 0.0)
            # Unlike `max`, keeps a NaN that comes second as well as one that comes first.
            peaks[layer] = before if before != before or before > value else value
        self.magnitudes.clear()
        reach = self.coupling.reach(self.arithmetic)
        bad = [layer for layer, peak in peaks.items() if not peak < reach]
        if bad:
            raise StreamOverflowError(
                f"Hidden states of {self.name}, layers {min(bad)} to {max(bad)}, do not fit the fixed-point streams. "
                + self.arithmetic.overflow_advice(peaks[min(bad)], _expected(peaks, min(bad)), reach)
            )

    # -- backward --------------------------------------------------------------------------------------------------

    def take_outputs(self, depth: int) -> Streams:
        """Hands out the streams above `depth` layers, to be rebuilt downwards.

        Raises:
            ConsumedTapeError: other streams are on the tape, or none.
        """
        if self.kept is None or self.depth != depth:
            where = "are gone" if self.kept is None else f"now lie above layer {self.depth - 1}"
            raise ConsumedTapeError(
                f"The backward pass of layer {depth - 1} of {self.name} needs the streams above it, but they {where}: "
                "a reversible forward pass can be differentiated once, from its output down. Two calls of backward() "
                "on one forward pass do not fit that. Add the losses up and call backward() once, run the forward pass "
                'again, or use backward="cached".'
            )
        return self.kept

    def descend(self, depth: int, streams: Streams) -> None:
        """Lets the backward pass begin above `depth` layers, if no gradient came from further up."""
        if self.kept is not None and self.depth > depth:
            self.kept, self.depth = streams, depth

    def anchored(self, depth: int) -> bool:
        """Tells whether the streams below layer `depth` are kept."""
        return self.anchor_every is not None and depth > 0 and depth % self.anchor_every == 0

    def leave_inputs(self, depth: int, streams: Streams, anchor: Streams | None, *, last: bool) -> None:
        """Takes back the streams below layer `depth` that its node rebuilt.

        Args:
            depth: the layer.
            streams: what the node rebuilt.
            anchor: what was kept of them, to go on from instead; or None.
            last: no node lies below.

        Raises:
            ReconstructionError: below layer 0 the two streams, in exact arithmetic, are not equal.
        """
        if self.observer is not None:
            self.observer.rebuilt(self, depth, streams)
        self.depth = depth
        self.kept = None if last else anchor or streams
        if depth == 0:
            self._check_meeting(*streams)

    def _check_meeting(self, x1: Tensor, x2: Tensor) -> None:
        if self.arithmetic.exact and self.anchor_every is None:
            if not torch.equal(x1, x2):
                raise ReconstructionError(_reconstruction_message(self, x1, x2))
            return
        deviation = relative_deviation(x1, x2)
        if not deviation <= self.drift_tolerance:
            warnings.warn(_drift_message(self, deviation), DriftWarning, stacklevel=2)


def version_of(tensor: Tensor) -> int:
    """Counts in-place modifications of a tensor; inference tensors cannot be modified and keep no count."""
    return 0 if tensor.is_inference() else tensor._version


def relative_deviation(x1: Tensor, x2: Tensor) -> float:
    """|x1 - x2| / |x1| in the Euclidean norm, computed in float64."""
    if not x1.numel():
        return 0.0
    difference = torch.linalg.vector_norm(x1.double() - x2.double())
    return float(difference / torch.linalg.vector_norm(x1.double()).clamp_min(torch.finfo(torch.float64).tiny))


def _expected(peaks: dict[int, float], first: int) -> float:
    """What the largest magnitude would have grown to at the top, had the streams not wrapped around in layer `first`.

    Only the magnitudes up to there are true; the growth of the few layers below it is carried on from it.
    """
    low, high = max(first - 5, 0), first - 1
    if high <= low or not 0 < peaks[low] < peaks[high]:
        return peaks[first]
    growth = math.log(peaks[high] / peaks[low]) / (high - low)
    return peaks[first] * math.exp(min(growth * (max(peaks) - first), 700.0))


def _reconstruction_message(tape: Tape, x1: Tensor, x2: Tensor) -> str:
    differing = int((x1 != x2).sum())
    largest = float((tape.arithmetic.decode(x1, torch.float64) - tape.arithmetic.decode(x2, torch.float64)).abs().max())
    return (
        f"The rebuilt input of {tape.name} is not the original: {differing} of {x1.numel()} elements differ, by up to "
        f"{largest:.3g}. A layer returned other values in the recomputation than in the forward pass; the likely cause "
        "is a nondeterministic kernel, random numbers from outside PyTorch's generators, or state that changed in "
        "between. Call torch.use_deterministic_algorithms(True), choose another attention implementation, or use "
        'backward="cached". This step\'s gradients were not applied.'
    )


def _drift_message(tape: Tape, deviation: float) -> str:
    cause = "Nondeterministic kernels" if tape.arithmetic.exact else "Float arithmetic"
    remedy = "a smaller anchor_every" if tape.arithmetic.exact else 'arithmetic="exact"'
    return (
        f"{cause} rebuilt the input of {tape.name} with a relative error of {deviation:.1e}, above "
        f"drift_tolerance={tape.drift_tolerance:g}: gradients of its lower layers are inexact. Use {remedy}, fewer "
        "reversible layers (frozen_layers, cached_layers), or factors nearer to 1."
    )
