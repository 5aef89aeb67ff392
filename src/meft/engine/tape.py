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

from meft.errors import ConsumedTapeError, DriftWarning, ReconstructionError, StreamOverflowError, UnsupportedModelError

from .arithmetic import Arithmetic, norm
from .couplings import Coupling, Streams
from .host import HostStore
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
        residues: where they wait for the backward pass, "device" or "host".
        name: what error messages call the stack.
        training: whether streams are to be as small as they can, and one that overflows on a grid of the user's own is
            an error at once.
        first: the position of the lowest coupled layer, for messages.
    """

    def __init__(
        self,
        coupling: Coupling,
        arithmetic: Arithmetic,
        hidden: Tensor,
        *,
        drift_tolerance: float = 1e-2,
        anchor_every: int | None = None,
        residues: str = "device",
        name: str = "the stack",
        training: bool = True,
        first: int = 0,
    ) -> None:
        # Without a backward pass each token stands for itself: what is lost of one is no loss to the others.
        self.by_token = not torch.is_grad_enabled()
        if not self.by_token:
            _refuse_recording(name)
        self.coupling, self.training, self.first = coupling, training, first
        self.arithmetic = arithmetic.fitted(hidden, training=training, by_token=self.by_token)
        self.drift_tolerance, self.anchor_every, self.name = drift_tolerance, anchor_every, name
        # What hidden states have to stay below.
        self.reach = coupling.reach(self.arithmetic)
        # The backward pass may run in another thread, which has no context variables of this one.
        self.observer, self.drift_listener = _OBSERVER.get(), _DRIFT.get()
        self.shape, self.dtype, self.device = hidden.shape, hidden.dtype, hidden.device
        stream = self.arithmetic.encode(hidden.detach())
        self.streams: Streams | None = (stream, stream)
        self.handles: Handles | None = (hidden, hidden)
        self.kept: Streams | None = None
        self.position = self.level = 0
        self.magnitudes: list[tuple[int, Tensor]] = []
        self.lost: Tensor | None = None
        if arithmetic.exact and hidden.numel():
            self.watch(norm(hidden, math.inf, by_token=self.by_token))
        self.visible: Tensor | None = None
        self.show(hidden)
        self._shared = self.observer is not None or anchor_every is not None
        self.host = HostStore(hidden.device) if residues == "host" else None
        # Whether somebody else drew random numbers while a layer did.
        self.disturbed = False
        self.offered: dict[int, Streams] = {}
        self.differences: list[tuple[int, Tensor, Callable[[], str]]] = []

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
        return self.value(self.streams[index])

    def value(self, stream: Tensor) -> Tensor:
        """A stream as a hidden state, without gradient; NaN for tokens that were lost."""
        found = self.arithmetic.decode(stream, self.dtype)
        return found if self.lost is None else found.masked_fill_(self.lost, math.nan)

    def watch(self, magnitude: Tensor) -> None:
        """Notes the largest magnitude of a stream that the present layer made, without looking at it."""
        if not self.by_token:
            self.magnitudes.append((self.position, magnitude))
        elif magnitude.dim():
            # A number that is too large even for streams of 64 bits, or none.
            lost = (magnitude < self.reach).logical_not_()
            self.lost = lost if self.lost is None else self.lost.logical_or_(lost)

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

    def checked(self, output: Tensor) -> Tensor:
        """Looks after streams that overflowed, at the end of a forward pass.

        In training, a stream that overflows on a grid of the user's own is an error at once. On the automatic one,
        which hardly ever overflows, and in evaluation the forward pass waits for nothing: what it returns becomes NaN,
        and a backward pass through it the error.

        Returns:
            `output`, or NaN in its memory.

        Raises:
            StreamOverflowError: a hidden state was too large or not finite.
        """
        if on_fake_tensors():
            self.magnitudes.clear()
        if not self.magnitudes:
            return output
        if self.training and (self.kept is None or not self.arithmetic.automatic):
            self.check_magnitudes()
            return output
        largest = torch.stack([value.to(self.device, torch.float32) for _, value in self.magnitudes])
        # Nobody has seen it yet, so autograd need not know: nothing is kept of it, and no copy is made.
        output.data.mul_(torch.where((largest < self.reach).all(), 1.0, math.nan))
        return output

    def _look_at_magnitudes(self) -> None:
        self.check_magnitudes()

    def check_magnitudes(self, flags: Sequence[Tensor] = ()) -> list[bool]:
        """Looks at every layer's largest magnitude at once, and at flags with them: the only synchronisation of a step.

        Returns:
            The flags.

        Raises:
            StreamOverflowError: one of the magnitudes is too large or not finite.
        """
        if not self.magnitudes:
            return torch.stack(list(flags)).tolist() if flags else []
        reached = torch.as_tensor(self.reach, dtype=torch.float32, device=self.device)
        found = [value.to(self.device, torch.float32) for _, value in self.magnitudes]
        *values, reach = torch.stack([*(flag.to(torch.float32) for flag in flags), *found, reached]).tolist()
        raised, values = [bool(value) for value in values[: len(flags)]], values[len(flags) :]
        peaks: dict[int, float] = {}
        for (layer, _), value in zip(self.magnitudes, values, strict=True):
            before = peaks.get(layer, 0.0)
            # Unlike `max`, keeps a NaN that comes second as well as one that comes first.
            peaks[layer] = before if before != before or before > value else value
        self.magnitudes.clear()
        bad = [layer for layer, peak in peaks.items() if not peak < reach]
        if bad:
            raise StreamOverflowError(
                f"Hidden states of {self.name}, layers {min(bad)} to {max(bad)}, do not fit the fixed-point streams. "
                + self.arithmetic.overflow_advice(peaks[min(bad)], _expected(peaks, min(bad)), reach)
            )
        return raised

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
        offered = self.offered.pop(level, None)
        if offered is not None and self.kept is not None and self.level > level:
            self.kept, self.level = offered, level
        if self.kept is None or self.level != level:
            where = "are gone" if self.kept is None else f"now lie above layer {self.layer_of(self.level)}"
            raise ConsumedTapeError(
                f"The backward pass of layer {self.layer_of(level)} of {self.name} needs the streams above it, but "
                f"they {where}: a reversible forward pass can be differentiated once, from its output down. Two calls "
                "of backward() on one forward pass do not fit that. Add the losses up and call backward() once, run "
                'the forward pass again, or use backward="cached".'
            )
        if self.magnitudes:
            # Where only a part of the stack is differentiated, no node is the last.
            torch.autograd.Variable._execution_engine.queue_callback(self._look_at_magnitudes)
        kept, self.kept = self.kept, None
        return kept

    def checksum(self, stream: Tensor, found: Sequence[Tensor] = ()) -> Tensor | None:
        """One number for the bits of a stream, on its device; None where streams are not rebuilt bit for bit.

        `found` are the numbers of its tiles, where they are known already.
        """
        if not self.arithmetic.exact or self.anchor_every is not None or on_fake_tensors():
            return None
        return _sum_of(stream, found)

    def compare(
        self,
        level: int,
        before: Tensor | None,
        stream: Tensor,
        cause: Callable[[], str],
        found: Sequence[Tensor] = (),
    ) -> None:
        """Compares the stream that the step below a level rebuilt with its checksum, without looking at the outcome.

        Args:
            level: the number of steps below and including the one that was undone.
            before: the checksum of the forward pass, or None.
            stream: what was rebuilt.
            cause: says what has changed in the layer, if it is asked.
            found: the checksums of what was rebuilt, tile by tile, where they are known already.
        """
        if before is not None:
            self.differences.append((level, before != _sum_of(stream, found), cause))

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

    def offer(self, level: int, streams: Streams) -> None:
        """Leaves streams for the node below `level` steps to begin from, if no node above it has run by then."""
        self.offered[level] = streams

    def put_back(self, level: int, newest: Tensor) -> None:
        """Puts the newest stream of `level` steps back in the place of the one that the model made of it."""
        streams = list(self.take_outputs(level))
        streams[self.coupling.newest] = newest
        self.kept = (streams[0], streams[1])

    def anchored(self, level: int) -> bool:
        """Tells whether the streams above `level` steps, the inputs of a layer, are kept."""
        layer, step = divmod(level, len(self.coupling.steps))
        return self.anchor_every is not None and step == 0 and layer > 0 and layer % self.anchor_every == 0

    def note_disturbance(self) -> None:
        """Notes, for the message if anything is amiss, that a layer's random numbers may not be those it had."""
        self.disturbed = True

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
        if last and not on_fake_tensors():
            self._settle(streams if level == 0 else None)

    def _settle(self, meeting: Streams | None) -> None:
        """Looks at all that was compared, at the end of a stack's backward pass: its one synchronisation.

        Args:
            meeting: the streams below layer 0, which began as one; None where the backward pass ends above.
        """
        deviation = 0.0
        exact = self.arithmetic.exact and self.anchor_every is None
        flags = [differs for _, differs, _ in self.differences]
        if exact and meeting is not None:
            flags.append((meeting[0] != meeting[1]).any())
        outcome = self.check_magnitudes(flags)
        if exact:
            differences, self.differences = self.differences, []
            for differs, (level, _, cause) in zip(outcome, differences, strict=False):
                if differs:
                    raise ReconstructionError(_difference_message(self, self.layer_of(level), cause()))
            if meeting is not None and outcome[-1]:
                raise ReconstructionError(_reconstruction_message(self, *meeting))
        elif meeting is not None:
            deviation = relative_deviation(*meeting)
            if not deviation <= self.drift_tolerance:
                warnings.warn(_drift_message(self, deviation), DriftWarning, stacklevel=2)
        if meeting is None and not self.arithmetic.exact:
            return
        if self.drift_listener is not None:
            self.drift_listener(deviation)


def _sum_of(stream: Tensor, found: Sequence[Tensor]) -> Tensor:
    if not found:
        return stream.sum(dtype=torch.int64)
    return found[0] if len(found) == 1 else torch.stack(list(found)).sum()


def _refuse_recording(name: str) -> None:
    """Refuses a step that a CUDA graph is to repeat: it draws on generators' states, and its check waits once.

    Raises:
        UnsupportedModelError: one is being recorded.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedModelError(
            f"A CUDA graph is being recorded while {name} runs with gradients. A reversible step reads the states of "
            "random generators and looks once at whether its bits came back, and a graph can do neither. Record the "
            "forward pass under torch.no_grad(), or the modules inside the layers (torch.compile with "
            'mode="reduce-overhead" on them), or use the model without meft.'
        )


def version_of(tensor: Tensor) -> int:
    """Counts in-place modifications of a tensor; inference tensors cannot be modified and keep no count."""
    return 0 if tensor.is_inference() else tensor._version


def relative_deviation(x1: Tensor, x2: Tensor) -> float:
    """|x1 - x2| / |x1| in the Euclidean norm, computed in float64 (float32 on Apple's devices)."""
    if not x1.numel():
        return 0.0
    wide = torch.float32 if x1.device.type == "mps" else torch.float64
    difference = torch.linalg.vector_norm(x1.to(wide) - x2.to(wide))
    return float(difference / torch.linalg.vector_norm(x1.to(wide)).clamp_min(torch.finfo(wide).tiny))


def _expected(peaks: dict[int, float], first: int) -> float:
    """What the largest magnitude would have grown to at the top, had the streams not wrapped around in layer `first`.

    Only the magnitudes up to there are true; the growth of the few layers below it is carried on from it.
    """
    low, high = max(first - 5, 0), first - 1
    if high <= low or not 0 < peaks[low] < peaks[high]:
        # Nothing is known of what comes: half as much again leaves layers of a pretrained model room.
        return peaks[first] * 1.5 if first < max(peaks) else peaks[first]
    growth = math.log(peaks[high] / peaks[low]) / (high - low)
    return peaks[first] * math.exp(min(growth * (max(peaks) - first), 700.0))


_DISTURBED = (
    " The layer did not draw the same random numbers either: it ran otherwise, or something else drew from its "
    "generator meanwhile. PyTorch has one for all threads of a process: run the passes of different threads one "
    "after the other, switch dropout off, or give each thread a process of its own."
)


def _difference_message(tape: Tape, layer: int, cause: str) -> str:
    return (
        f"The rebuilt input of {tape.name} is not the original. Layer {tape.first + layer} returned other values in "
        f"the recomputation than in the forward pass: {cause}. Leave weights, buffers, hooks and arguments as they are "
        "until backward() is done; for kernels call torch.use_deterministic_algorithms(True) or choose another "
        'attention implementation; or use backward="cached".'
        + (_DISTURBED if tape.disturbed else "")
        + " This step's gradients were not applied."
    )


def _reconstruction_message(tape: Tape, x1: Tensor, x2: Tensor) -> str:
    differing = int((x1 != x2).sum())
    largest = float(tape.arithmetic.decode(x1.long() - x2.long(), torch.float32).abs().max())
    return (
        f"The rebuilt input of {tape.name} is not the original: {differing} of {x1.numel()} elements differ, by up to "
        f"{largest:.3g}. A layer returned other values in the recomputation than in the forward pass; the likely cause "
        "is a nondeterministic kernel, random numbers from outside PyTorch's generators, or state that changed in "
        "between. Call torch.use_deterministic_algorithms(True), choose another attention implementation, or use "
        'backward="cached".' + (_DISTURBED if tape.disturbed else "") + " This step's gradients were not applied."
    )


def _drift_message(tape: Tape, deviation: float) -> str:
    cause = "Nondeterministic kernels" if tape.arithmetic.exact else "Float arithmetic"
    remedy = "a smaller anchor_every" if tape.arithmetic.exact else 'arithmetic="exact"'
    return (
        f"{cause} rebuilt the input of {tape.name} with a relative error of {deviation:.1e}, above "
        f"drift_tolerance={tape.drift_tolerance:g}: gradients of its lower layers are inexact. Use {remedy}, fewer "
        "reversible layers (frozen_layers, cached_layers), or factors nearer to 1."
    )
