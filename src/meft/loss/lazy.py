"""`LazyLogits`: logits that are computed when something needs their values, and that a cross-entropy does not need.

To everyone but `torch.nn.functional.cross_entropy` these are ordinary logits, with ordinary gradients. The tensor holds
the hidden state, the weight and what was done to the logits since. Operations that act on positions (views, slices) or
on each logit alone (scaling, soft-capping, conversion to float32) are noted, not run; any other operation runs on the
values, which are kept from then on, as the plain head would have kept them. A loss thus stays exactly the code that the
model, the trainer or the user has written, and only its last step, the cross-entropy, is taken in tiles.

Autograd sees an ordinary tensor made by a linear layer: operations are recorded above `__torch_dispatch__`, so their
gradients reach hidden state and weight by the usual way, and what autograd saves of lazy logits is lazy as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from meft.errors import ConfigError

from .origin import Conversion, Head, Memory, Origin, applied
from .tiled import tiled_cross_entropy

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.slice.Tensor, aten.alias.default, aten.detach.default)
_SCALINGS = (aten.mul.Tensor, aten.div.Tensor)
_PRECISE = (torch.float32, torch.float64)
# These read memory directly, so they must be given a tensor that has some.
_READERS = (
    Tensor.numpy,
    Tensor.tolist,
    Tensor.data_ptr,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.__deepcopy__,
    Tensor.__reduce_ex__,
    Tensor.__repr__,
)


class LazyLogits(Tensor):
    """Logits whose values are computed when needed. Made by `lazy_linear`; see the module."""

    _origin: Origin

    @staticmethod
    def __new__(cls, origin: Origin, like: Tensor) -> LazyLogits:
        made = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=origin.head.hidden.device, storage_size=0
        )
        made._origin = origin
        return made

    @property
    def pending(self) -> bool:
        """Whether the values have not been computed so far."""
        return self._origin.memory.values is None

    # A compiler breaks its graph here, as it could not trace through what follows.
    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            loss = _fused(*args, **kwargs)
            if loss is not None:
                return loss
        elif func in (Tensor.detach, torch.detach):
            # Asked for to have the values of this moment, whatever becomes of the weight.
            return args[0]._origin.values().detach()
        elif func in _READERS:
            args, kwargs = tree_map_only(LazyLogits, _plain, (args, kwargs))
        elif func in (Tensor.register_hook, Tensor.retain_grad):
            _watch(args[0]._origin.head, *args[1:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if args and isinstance(args[0], LazyLogits) and args[0].pending:
            lazy = _put_off(func, args[0], args[1:], kwargs)
            if lazy is not None:
                return lazy
        args, kwargs = tree_map_only(LazyLogits, lambda lazy: lazy._origin.values(), (args, kwargs))
        return func(*args, **kwargs)


def lazy_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> LazyLogits:
    """The same as `linear(hidden, weight, bias)` in `dtype`, computed when something needs the values."""
    return _LazyLinear.apply(Head(hidden, weight, bias, dtype), hidden, weight, bias)


class _LazyLinear(torch.autograd.Function):
    """Gives lazy logits the place of a linear layer's output in the graph."""

    @staticmethod
    def forward(ctx: Any, head: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LazyLogits:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.dtype = head.dtype
        # No observer, such as a memory tracker, should count it.
        with _disable_current_modes():
            like = torch.empty(head.shape, dtype=head.dtype, device="meta")
        return LazyLogits(Origin(head, Memory()), like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        _, needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        with torch.autocast(grad.device.type, enabled=False):
            grad_hidden = (grad @ weight.to(ctx.dtype)).to(hidden.dtype) if needs_hidden else None
            inputs = hidden.to(ctx.dtype).reshape(-1, hidden.shape[-1])
            grad_weight = (rows.T @ inputs).to(weight.dtype) if needs_weight else None
            grad_bias = rows.sum(0).to(bias.dtype) if needs_bias else None
        return None, grad_hidden, grad_weight, grad_bias


def _put_off(func: Any, lazy: LazyLogits, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyLogits | None:
    """The result of an operation that can wait; None for one that cannot."""
    origin, attached = lazy._origin, torch.is_grad_enabled()
    if func in _VIEWS:
        view = _view_of_positions(func, lazy, rest, kwargs)
        if view is None:
            return None
        origin = origin.viewed(view, attached and func is not aten.detach.default)
    elif func is aten.clone.default:
        origin = origin.changed(None, attached)
    elif func is aten.tanh.default:
        origin = origin.changed(torch.tanh, attached)
    elif func in _SCALINGS and len(rest) == 1 and type(rest[0]) in (int, float) and not kwargs:
        factor = rest[0]
        origin = origin.changed(lambda logits: func(logits, factor), attached)
    elif func is aten._to_copy.default and set(kwargs) == {"dtype"} and kwargs["dtype"] in _PRECISE:
        origin = origin.changed(Conversion(kwargs["dtype"]), attached)
    else:
        return None
    return LazyLogits(origin, _tried(func, lazy, rest, kwargs))


def _view_of_positions(
    func: Any, lazy: LazyLogits, rest: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Tensor], Tensor] | None:
    """The view as a function of anything that has these positions; None if it touches the vocabulary."""
    if func in (aten.alias.default, aten.detach.default):
        return lambda tensor: tensor
    if func is aten.slice.Tensor:
        if (rest[0] if rest else kwargs.get("dim", 0)) % lazy.dim() == lazy.dim() - 1:
            return None
        return lambda tensor: aten.slice.Tensor(tensor, *rest, **kwargs)
    shape = _tried(func, lazy, rest, kwargs).shape
    if not shape or shape[-1] != lazy.shape[-1]:
        return None
    return lambda tensor: tensor.reshape(*shape[:-1], tensor.shape[-1])


def _tried(func: Any, lazy: LazyLogits, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What an operation would return, as a tensor without memory."""
    like = torch.empty_strided(lazy.shape, lazy.stride(), dtype=lazy.dtype, device="meta")
    return func(like, *rest, **kwargs)


def _plain(lazy: LazyLogits) -> Tensor:
    """The values as an ordinary tensor, a leaf."""
    return lazy._origin.values().detach().requires_grad_(lazy.requires_grad)


def _watch(head: Head, hook: Callable[..., Any] | None = None) -> None:
    """Notes a hook on the gradient of the logits, or without one that the gradient is to be kept."""
    if hook is None and head.fused:
        raise ConfigError(
            f"retain_grad() was called on logits of shape {head.shape} after their loss was taken in tiles, so they "
            "will get no gradient. Use fused_loss=False to have whole logits."
        )
    # Hooks of register_multi_grad_hook cannot change a gradient; module and memory trackers put them on every output.
    if getattr(hook, "__globals__", {}).get("__name__") != "torch.autograd.graph":
        head.watched = True


def _fused(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """The cross-entropy in tiles; None where only whole logits give what is asked for."""
    if not (isinstance(input, LazyLogits) and input.pending and input.dim() == 2 and type(target) is not LazyLogits):
        return None
    if weight is not None or size_average is not None or reduce is not None or label_smoothing != 0.0:
        return None
    if reduction not in ("mean", "sum") or target.dtype != torch.int64 or target.shape != input.shape[:1]:
        return None
    origin, head = input._origin, input._origin.head
    if target.device != input.device or head.watched or (input.requires_grad and not origin.attached):
        return None
    head.fused = True
    dtype = torch.float32 if torch.is_autocast_enabled(input.device.type) else input.dtype
    pointwise = origin.pointwise
    while pointwise and pointwise[-1] == Conversion(torch.float32) and head.dtype != torch.float64:
        # The tiles end with it by themselves.
        pointwise = pointwise[:-1]
    with torch.set_grad_enabled(input.requires_grad):
        hidden, vocabulary, bias = head.operands()
        loss = tiled_cross_entropy(
            applied(origin.positions, hidden),
            vocabulary,
            bias,
            target,
            pointwise=pointwise,
            ignore_index=ignore_index,
            reduction=reduction,
        )
        return loss.to(torch.promote_types(dtype, input.dtype))
