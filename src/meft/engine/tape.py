"""The tape: the streams of one forward pass through one stack, on their way up and back down."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

from meft.errors import ConsumedTapeError, DriftWarning, ReconstructionError, StreamOverflowError

from .arithmetic import Arithmetic
from .couplings import Coupling, Streams
from .replay import on_fake_tensors

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


_RESIDUES: ContextVar[Callable[[Sequence[Tensor]], None] | None] = ContextVar("meft_residues", default=None)


@contextmanager
def residues_told_to(listener: Callable[[Sequence[Tensor]], None]) -> Iterator[None]:
    """Lets a listener see the residues that every step saves within; for the attribution of memory."""
    token = _RESIDUES.set(listener)
    try:
        yield
    finally:
        _RESIDUES.reset(token)


_DRIFT: ContextVar[Callable[[float], None] | None] = ContextVar("meft_drift", default=None)


def tell_drift_to(listener: Callable[[float], None] | None) -> None:
    """Lets a listener hear how far rebuilt streams were off, for every forward pass from now on; None for nobody.

    It is called by the backward pass once for each stack, with the relative deviation: 0 if no bit differs.
    """
    _DRIFT.set(listener)


def tell_residues(residues: Sequence[Tensor]) -> None:
    """Tells the listener, if there is one, which residues a step has saved."""
    listener = _RESIDUES.get()
    if listener is not None:
        listener(residues)


class Tape:
    """The streams of one forward pass through one stack of layers.

    The forward pass moves `streams` and `handles` along. Backward starts from `kept`, the streams that the last
    reversible node left, and moves them back; `level` counts the coupling steps they lie above.

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
        # The backward pass may run in another thread, which has no context variables of this one.
        self.observer, self.drift_listener = _OBSERVER.get(), _DRIFT.get()
        self.shape, self.dtype, self.device = hidden.shape, hidden.dtype, hidden.device
        stream = arithmetic.encode(hidden.detach())
        self.streams: Streams | None = (stream, stream)
        self.handles: Handles | None = (hidden, hidden)
        self.kept: Streams | None = None
        self.position = self.level = 0
        self.magnitudes: list[tuple[int, Tensor]] = []
        if arithmetic.limit < float("inf") and hidden.numel():
            self.watch(hidden.detach().abs().amax())
        self.visible: Tensor | None = None
        self.show(hidden)
        self._shared = self.observer is not None or anchor_every is not None

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
        self.magnitudes.append((self.position, magnitude))

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
        if on_fake_tensors():
            self.magnitudes.clear()
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

    def level_of(self, layer: int, step: int) -> int:
        """The number of coupling steps below a step of a layer."""
        return layer * len(self.coupling.steps) + step

    def layer_of(self, level: int) -> int:
        """The layer that the step below a level belongs to."""
        return (level - 1) // len(self.coupling.steps)

    def take_outputs(self, level: int) -> Streams:
        """Hands out the streams above `level` steps, to be rebuilt downwards; the tape keeps nothing.

        Raises:
            ConsumedTapeError: other streams are on the tape, or none.
        """
        if self.kept is None or self.level != level:
            where = "are gone" if self.kept is None else f"now lie above layer {self.layer_of(self.level)}"
            raise ConsumedTapeError(
                f"The backward pass of layer {self.layer_of(level)} of {self.name} needs the streams above it, but "
                f"they {where}: a reversible forward pass can be differentiated once, from its output down. Two calls "
                "of backward() on one forward pass do not fit that. Add the losses up and call backward() once, run "
                'the forward pass again, or use backward="cached".'
            )
        kept, self.kept = self.kept, None
        return kept

    @property
    def in_place(self) -> bool:
        """Whether the streams that `take_outputs` hands out are nobody else's and may be overwritten.

        Exact streams are; float ones may be the very hidden states that the model was handed.
        """
        return self.arithmetic.exact and not self._shared

    def share(self) -> Streams:
        """Hands out the present streams to somebody who keeps them."""
        assert self.streams is not None
        self._shared = True
        return self.streams

    def descend(self, level: int, streams: Streams) -> None:
        """Lets the backward pass begin above `level` steps, if no gradient came from further up."""
        if self.kept is not None and self.level > level:
            self.kept, self.level = (streams[0], streams[1]), level

    def put_back(self, level: int, newest: Tensor) -> None:
        """Puts the newest stream of `level` steps back in the place of the one that the model made of it."""
        streams = list(self.take_outputs(level))
        streams[self.coupling.newest] = newest
        self.kept = (streams[0], streams[1])

    def anchored(self, level: int) -> bool:
        """Tells whether the streams above `level` steps, the inputs of a layer, are kept."""
        layer, step = divmod(level, len(self.coupling.steps))
        return self.anchor_every is not None and step == 0 and layer > 0 and layer % self.anchor_every == 0

    def leave_inputs(self, level: int, streams: Streams, anchor: Streams | None, *, last: bool) -> None:
        """Takes back the streams above `level` steps that a node rebuilt.

        Args:
            level: the number of steps below the node.
            streams: what the node rebuilt.
            anchor: what was kept of them, to go on from instead; or None.
            last: no node lies below.

        Raises:
            ReconstructionError: below layer 0 the two streams, in exact arithmetic, are not equal.
        """
        layer, step = divmod(level, len(self.coupling.steps))
        if self.observer is not None and step == 0:
            self.observer.rebuilt(self, layer, streams)
        self.level = level
        self.kept = None if last else anchor or streams
        if level == 0 and not on_fake_tensors():
            self._check_meeting(*streams)

    def _check_meeting(self, x1: Tensor, x2: Tensor) -> None:
        if self.arithmetic.exact and self.anchor_every is None:
            if not torch.equal(x1, x2):
                raise ReconstructionError(_reconstruction_message(self, x1, x2))
            deviation = 0.0
        else:
            deviation = relative_deviation(x1, x2)
            if not deviation <= self.drift_tolerance:
                warnings.warn(_drift_message(self, deviation), DriftWarning, stacklevel=2)
        if self.drift_listener is not None:
            self.drift_listener(deviation)


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
