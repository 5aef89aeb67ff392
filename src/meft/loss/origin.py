"""How logits that were put off are made: a linear layer, views of positions, and functions of each logit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from meft.errors import MaterializedLogitsWarning, ModifiedTensorError

from .tiled import Pointwise

_warned: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Weights of output embeddings whose logits were made whole with a warning."""

WANTED: ContextVar[bool] = ContextVar("meft_logits_wanted", default=False)
"""Whether whoever asks for values means them, so that no warning is due."""


@dataclass
class Head:
    """One call of a linear layer that was put off.

    Attributes:
        hidden: what it was called with.
        weight: (vocabulary, hidden size).
        bias: (vocabulary,) or None.
        dtype: what it computes in: that of its inputs, or autocast's.
        watched: somebody may change the gradient of the logits, which must then exist.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    watched: bool = False
    versions: tuple[int, ...] = field(init=False)
    sums: Tensor | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.versions = self._versions()
        self.sums = self._sums()

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.hidden.shape[:-1], len(self.weight))

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden state, weight and bias in the dtype it computes in."""
        self._check_versions()
        # Kernels of fused optimizers and edits of `.data` raise no version.
        now = None if self.sums is None else self._sums()
        if self.sums is not None and now is not None and not torch.equal(self.sums, now):
            raise self.modified()
        bias = self.bias if self.bias is None else self.bias.to(self.dtype)
        return self.hidden.to(self.dtype), self.weight.to(self.dtype), bias

    def _versions(self) -> tuple[int, ...]:
        return tuple(t._version for t in (self.hidden, self.weight, self.bias) if t is not None)

    def check_later(self) -> Tensor | None:
        """Raises if something changed, but on an accelerator returns whether it did not, so as not to wait for it."""
        self._check_versions()
        if self.sums is None:
            return None
        same = torch.eq(self.sums, self._sums()).all()  # type: ignore[arg-type]
        if same.device.type == "cpu" and not same:
            raise self.modified()
        return None if same.device.type == "cpu" else same

    def modified(self) -> ModifiedTensorError:
        return ModifiedTensorError(
            f"The values of logits of shape {self.shape} were asked for after the weight of the output embedding, "
            "or the hidden state before it, was modified in place, and would be other values than those of the "
            "forward pass. Read logits before optimizer.step() or load_state_dict(), or keep them with detach(), "
            "or use fused_loss=False."
        )

    def _check_versions(self) -> None:
        if self.weight.numel() and not self.weight.untyped_storage().size():
            raise ModifiedTensorError(
                f"The values of logits of shape {self.shape} were asked for when the weight of the output embedding "
                "had been freed, as FSDP does with whole weights after the forward pass. Use fused_loss=False to have "
                "logits outside of the model."
            )
        if self._versions() != self.versions:
            raise self.modified()

    def _sums(self) -> Tensor | None:
        tensors = [t.detach() for t in (self.hidden, self.weight, self.bias) if t is not None]
        if any(isinstance(t, FakeTensor) or t.is_meta for t in tensors):
            return None
        return torch.stack([checksum(t) for t in tensors])


def checksum(tensor: Tensor) -> Tensor:
    """A number that differs where any bit of the tensor does, but for chance; on its device.

    Bits are summed as integers, by rows and by columns, each sum times an odd number of its own: sums of integers
    depend on no order, and rows, columns or elements that change places are seen.
    """
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, 8 - flat.numel() % 8))
    words = flat.view(torch.int64)
    width = tensor.shape[-1] * tensor.itemsize // 8 if tensor.dim() > 1 else 0
    table = words.view(-1, width) if width and words.numel() % width == 0 else words.view(1, -1)
    return sum((_weighted(table.sum(axis)) for axis in (0, 1)), torch.zeros((), dtype=torch.int64, device=words.device))


def _weighted(sums: Tensor) -> Tensor:
    factors = torch.arange(len(sums), device=sums.device) * 0x5851F42D4C957F2D + 0x14057B7EF767814F
    return (sums * (factors | 1)).sum()


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
                self._warn()
                memory.values = applied(self.pointwise, F.linear(applied(memory.positions, hidden), weight, bias))
        return applied(self.positions[len(memory.positions) :], memory.values)

    def _warn(self) -> None:
        head = self.head
        if WANTED.get() or head.weight in _warned or head.weight.is_meta or isinstance(head.weight, FakeTensor):
            return
        _warned[head.weight] = True
        logits = math.prod(head.shape)
        warnings.warn(
            f"Logits of shape {head.shape} were made whole, {logits * head.dtype.itemsize:,} bytes, because something "
            "asked for more than is taken of them in tiles (cross-entropies, log-probabilities of tokens, entropies, "
            "sums, maxima). The memory that the loss in tiles saves is lost there. Use fused_loss=False if that is "
            "meant; this is said once for an output embedding.",
            MaterializedLogitsWarning,
            stacklevel=2,
        )

    def viewed(self, function: Callable[[Tensor], Tensor], attached: bool) -> Origin:
        return replace(self, positions=(*self.positions, function), attached=self.attached and attached)

    def changed(self, function: Pointwise | None, attached: bool) -> Origin:
        """A new tensor, with memory of its own."""
        pointwise = self.pointwise if function is None else (*self.pointwise, function)
        memory = Memory(self.positions)
        return replace(self, memory=memory, pointwise=pointwise, attached=self.attached and attached)

    def chosen(self, function: Callable[[Tensor], Tensor], attached: bool) -> Origin:
        """Some of the positions, in memory of their own."""
        positions = (*self.positions, function)
        return replace(self, memory=Memory(positions), positions=positions, attached=self.attached and attached)

    def combined(self, other: Origin, function: Callable[[Tensor, Tensor], Tensor], attached: bool) -> Origin | None:
        """What two of the same positions make together; None if they are of different ones."""
        if self.head is not other.head or self.positions != other.positions:
            return None
        shared = 0
        for one, two in zip(self.pointwise, other.pointwise, strict=False):
            if one is not two:
                break
            shared += 1
        left, right = self.pointwise[shared:], other.pointwise[shared:]
        made = replace(self, pointwise=self.pointwise[:shared], attached=self.attached and other.attached)
        return made.changed(lambda logits: function(applied(left, logits), applied(right, logits)), attached)


def applied(functions: tuple[Callable[[Tensor], Tensor], ...], tensor: Tensor) -> Tensor:
    for function in functions:
        tensor = function(tensor)
    return tensor
