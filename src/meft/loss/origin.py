"""How logits that were put off are made: a linear layer, views of positions, and functions of each logit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from meft.errors import ModifiedTensorError

from .tiled import Pointwise


@dataclass
class Head:
    """One call of a linear layer that was put off.

    Attributes:
        hidden: what it was called with.
        weight: (vocabulary, hidden size).
        bias: (vocabulary,) or None.
        dtype: what it computes in: that of its inputs, or autocast's.
        watched: somebody asked for the gradient of the logits, which only exists if they do.
        fused: a loss was taken from them in tiles.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    watched: bool = False
    fused: bool = False
    versions: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.versions = self._versions()

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.hidden.shape[:-1], len(self.weight))

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden state, weight and bias in the dtype it computes in."""
        if self.weight.numel() and not self.weight.untyped_storage().size():
            raise ModifiedTensorError(
                f"The values of logits of shape {self.shape} were asked for when the weight of the output embedding "
                "had been freed, as FSDP does with whole weights after the forward pass. Use fused_loss=False to have "
                "logits outside of the model."
            )
        if self._versions() != self.versions:
            raise ModifiedTensorError(
                f"The values of logits of shape {self.shape} were asked for after the weight of the output embedding, "
                "or the hidden state before it, was modified in place, and would be other values than those of the "
                "forward pass. Read logits before optimizer.step() or load_state_dict(), or keep them with detach(), "
                "or use fused_loss=False."
            )
        bias = self.bias if self.bias is None else self.bias.to(self.dtype)
        return self.hidden.to(self.dtype), self.weight.to(self.dtype), bias

    def _versions(self) -> tuple[int, ...]:
        return tuple(t._version for t in (self.hidden, self.weight, self.bias) if t is not None)


@dataclass(frozen=True)
class Conversion:
    """Of each logit to another type."""

    dtype: torch.dtype

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.to(self.dtype)


@dataclass
class Memory:
    """What lazy logits and their views share: the values, once there are any.

    Attributes:
        positions: the views that lie between the head and these values.
        values: the memory.
    """

    positions: tuple[Callable[[Tensor], Tensor], ...] = ()
    values: Tensor | None = None


@dataclass(frozen=True)
class Origin:
    """How logits are made.

    Attributes:
        head: the call that was put off.
        memory: shared with the logits that these are a view of.
        positions: the views taken of its output; those beyond `memory.positions` are views of the memory.
        pointwise: what was done to each logit; commutes with the views.
        attached: gradients of these logits are gradients of the head's.
    """

    head: Head
    memory: Memory
    positions: tuple[Callable[[Tensor], Tensor], ...] = ()
    pointwise: tuple[Pointwise, ...] = ()
    attached: bool = True

    def values(self) -> Tensor:
        """The logits, sharing memory with all views of them; nothing is recorded for autograd."""
        memory = self.memory
        if memory.values is None:
            with torch.no_grad(), torch.autocast(self.head.hidden.device.type, enabled=False):
                hidden, weight, bias = self.head.operands()
                memory.values = applied(self.pointwise, F.linear(applied(memory.positions, hidden), weight, bias))
        return applied(self.positions[len(memory.positions) :], memory.values)

    def viewed(self, function: Callable[[Tensor], Tensor], attached: bool) -> Origin:
        return replace(self, positions=(*self.positions, function), attached=self.attached and attached)

    def changed(self, function: Pointwise | None, attached: bool) -> Origin:
        """A new tensor, with memory of its own."""
        pointwise = self.pointwise if function is None else (*self.pointwise, function)
        memory = Memory(self.positions)
        return replace(self, memory=memory, pointwise=pointwise, attached=self.attached and attached)


def applied(functions: tuple[Callable[[Tensor], Tensor], ...], tensor: Tensor) -> Tensor:
    for function in functions:
        tensor = function(tensor)
    return tensor
