"""Autograd functions that give the values of streams the gradients of their handles (`engine`, rule 6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meft.errors import UnsupportedModelError

from .couplings import Step, Streams
from .tape import Tape


def placeholder(like: Tensor, shape: torch.Size | None = None) -> Tensor:
    """A tensor of one element, expanded: it has a shape and a gradient, and takes no memory."""
    return like.new_zeros(()).expand(like.shape if shape is None else shape)


class Attach(torch.autograd.Function):
    """Gives a stream's value the gradient route of its handle."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, handle: Tensor) -> Tensor:
        return value.view(value.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class SideAttach(torch.autograd.Function):
    """The same for the forward run of a reversible step, whose graph lives on only where an activation is caught in it.

    A loss on such an activation may be all that comes back from a layer and those above it, so that the backward pass
    has to begin here: the streams below the step are kept as long as the activation is.
    """

    @staticmethod
    def forward(ctx: Any, tape: Tape, level: int, streams: Streams, value: Tensor, handle: Tensor) -> Tensor:
        ctx.tape, ctx.level, ctx.streams = tape, level, streams
        return value.view(value.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None, Tensor]:
        ctx.tape.offer(ctx.level, ctx.streams)
        return None, None, None, None, gradient


class Severed(torch.autograd.Function):
    """A boundary between two stages in the forward run: a gradient that comes to it cannot go on, and that is said."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, handle: Tensor) -> Tensor:
        return value.view(value.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        raise UnsupportedModelError(
            "A loss depends on an activation that was caught inside a reversible layer (an auxiliary loss, a hook), "
            "and the layer runs in stages, between which such a gradient cannot pass. Use tile_size=None, which runs "
            'layers whole, or backward="cached". This step\'s gradients were not applied.'
        )


class Route(torch.autograd.Function):
    """The gradient of one coupling step, straight through its rounding."""

    @staticmethod
    def forward(
        ctx: Any, step: Step, signs: Tensor | None, target: Tensor, source: Tensor, value: Tensor | None
    ) -> Tensor:
        ctx.step, ctx.signs, ctx.value_dtype = step, signs, None if value is None else value.dtype
        return placeholder(target)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor, Tensor | None, Tensor | None]:
        scaled = ctx.step.scaled(gradient, ctx.signs)
        to_value = None if ctx.value_dtype is None else ctx.step.to_value(gradient).to(ctx.value_dtype)
        return None, None, scaled, ctx.step.to_source(scaled), to_value


class Readout(torch.autograd.Function):
    """The output rule: a weighted sum of the two streams."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, inner: bool, handle1: Tensor, handle2: Tensor) -> Tensor:
        ctx.weights, ctx.tape, ctx.level = tape.coupling.weights(), tape if inner else None, tape.level
        if inner:
            ctx.save_for_backward(*tape.share())
        return tape.coupling.read(tape.hidden(0), tape.hidden(1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        if ctx.tape is not None:
            ctx.tape.descend(ctx.level, ctx.saved_tensors)
        w1, w2 = ctx.weights
        return None, None, w1 * gradient if w1 else None, w2 * gradient if w2 else None


class Splice(torch.autograd.Function):
    """Keeps a stream that another one takes the place of, until the backward pass has come down to there.

    It passes on the gradient of the older stream, through which it stands between the layers above and those below.
    """

    @staticmethod
    def forward(ctx: Any, tape: Tape, kept: Tensor, handle: Tensor) -> Tensor:
        ctx.tape, ctx.level = tape, tape.level
        ctx.save_for_backward(kept)
        ctx.set_materialize_grads(False)
        return placeholder(handle)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None, Tensor | None]:
        (kept,) = ctx.saved_tensors
        ctx.tape.put_back(ctx.level, kept)
        return None, None, gradient
