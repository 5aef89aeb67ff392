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

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from .gradient import LazyGradient
from .origin import Conversion, Head, Memory, Origin

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.alias.default, aten.detach.default)
_OF_POSITIONS = (
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.permute.default,
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
)
_CHOOSING = (aten.index.Tensor, aten.index_select.default)
_SCALINGS = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)
_OF_EACH = (aten.tanh.default, aten.neg.default, aten.exp.default)
_OF_A_ROW = (aten._log_softmax.default, aten._softmax.default)
_PRECISE = (torch.float32, torch.float64)
# These read memory directly, so they must be given a tensor that has some.
READERS = (
    Tensor.numpy,
    Tensor.tolist,
    Tensor.data_ptr,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.__deepcopy__,
    Tensor.__reduce_ex__,
    Tensor.__repr__,
)


_GRAD_FN: Any = Tensor.grad_fn.__get__  # type: ignore[union-attr]


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
        if func in (F.cross_entropy, F.nll_loss):
            loss = fused_loss(func, *args, **kwargs)
            if loss is not None:
                return loss
        elif func in ALONG:
            found = along_vocabulary(func, args, kwargs)
            if found is not None:
                return found
        elif func in (Tensor.detach, torch.detach):
            # Asked for to have the values of this moment, whatever becomes of the weight.
            return args[0]._origin.values().detach()
        elif func in READERS:
            args, kwargs = tree_map_only(LazyLogits, _plain, (args, kwargs))
        elif func in (Tensor.register_hook, Tensor.retain_grad):
            _watch(args[0]._origin.head, *args[1:])
        elif func is _GRAD_FN and not sys._getframe(2).f_globals.get("__name__", "").startswith("torch."):
            # Who holds the node can put hooks on it that change gradients.
            args[0]._origin.head.watched = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if LazyGradient in types:
            return NotImplemented
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
        if isinstance(grad, LazyGradient):
            if grad.pure:
                return None, *_from_sources(grad)
            grad = grad.values()
        hidden, weight, bias = ctx.saved_tensors
        _, needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        with torch.autocast(grad.device.type, enabled=False):
            grad_hidden = (grad @ weight.to(ctx.dtype)).to(hidden.dtype) if needs_hidden else None
            inputs = hidden.to(ctx.dtype).reshape(-1, hidden.shape[-1])
            grad_weight = (rows.T @ inputs).to(weight.dtype) if needs_weight else None
            grad_bias = rows.sum(0).to(bias.dtype) if needs_bias else None
        return None, grad_hidden, grad_weight, grad_bias


def _from_sources(grad: LazyGradient) -> list[Tensor | None]:
    """Gradients of hidden state, weight and bias, of everything that was taken in tiles."""
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    totals: list[Tensor | None] = [None, None, None]
    # One that reaches the logits on several ways counts once: its gradients are those of all ways.
    for source, grads in {id(source): (source, grads) for source, grads in grad.sources()}.values():
        found = source.gradients(grads, keep)
        totals = [
            one if two is None else two if one is None else one + two for one, two in zip(totals, found, strict=True)
        ]
    return totals


def _put_off(func: Any, lazy: LazyLogits, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation that can wait; None for one that cannot."""
    origin, attached = lazy._origin, torch.is_grad_enabled()
    if func in _OF_POSITIONS:
        return _views_of_positions(func, lazy, rest, kwargs)
    if func in _VIEWS:
        view = _view_of_positions(func, lazy, rest, kwargs)
        if view is None:
            return None
        origin = origin.viewed(view, attached and func is not aten.detach.default)
    elif func in _CHOOSING:
        if not _chooses_positions(func, lazy, rest):
            return None
        origin = origin.chosen(lambda tensor: func(tensor, *rest, **kwargs), attached)
        # Of one token, as real indices are needed: masks say only in their values how many they choose.
        narrow = torch.empty((1,), device=lazy.device).expand(*lazy.shape[:-1], 1)
        shape = func(narrow, *rest, **kwargs).shape
        with _disable_current_modes():
            like = torch.empty((*shape[:-1], lazy.shape[-1]), dtype=lazy.dtype, device="meta")
        return LazyLogits(origin, like)
    elif func is aten.clone.default:
        origin = origin.changed(None, attached)
    elif func in _OF_EACH:
        origin = origin.changed(func, attached)
    elif func in _OF_A_ROW and rest[0] % lazy.dim() == lazy.dim() - 1:
        last = rest[1:]
        origin = origin.changed(lambda logits: func(logits, -1, *last), attached)
    elif func in _SCALINGS and len(rest) == 1 and type(rest[0]) in (int, float) and not kwargs:
        factor = rest[0]
        origin = origin.changed(lambda logits: func(logits, factor), attached)
    elif func in _SCALINGS and len(rest) == 1 and isinstance(rest[0], LazyLogits) and rest[0].pending and not kwargs:
        both = origin.combined(rest[0]._origin, func, attached)
        if both is None or rest[0].shape != lazy.shape:
            return None
        origin, rest = both, (_stand_in(rest[0]),)
    elif func in _SCALINGS and len(rest) == 1 and _is_row(rest[0], lazy) and not kwargs:
        # Whoever changes it later means the logits to come.
        row = rest[0].detach().reshape(-1 if rest[0].dim() else ()).clone()
        origin = origin.changed(lambda logits: func(logits, row), attached)
        with _disable_current_modes():
            rest = (torch.empty(rest[0].shape, dtype=rest[0].dtype, device="meta"),)
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
    shape = _tried(func, lazy, rest, kwargs).shape
    if not shape or shape[-1] != lazy.shape[-1]:
        return None
    return lambda tensor: tensor.reshape(*shape[:-1], tensor.shape[-1])


def _views_of_positions(func: Any, lazy: LazyLogits, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What slices, rows, parts and other orders of positions are; None if they touch the vocabulary."""
    if not _keeps_vocabulary(func, lazy, rest, kwargs):
        return None
    attached = torch.is_grad_enabled()
    tried = _tried(func, lazy, rest, kwargs)
    if isinstance(tried, Tensor):
        return LazyLogits(lazy._origin.viewed(lambda tensor: func(tensor, *rest, **kwargs), attached), tried)

    def part(index: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: func(tensor, *rest, **kwargs)[index]

    return [LazyLogits(lazy._origin.viewed(part(index), attached), like) for index, like in enumerate(tried)]


def _keeps_vocabulary(func: Any, lazy: LazyLogits, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the last dimension comes out last and as it was, however long it is."""
    try:
        with _disable_current_modes():
            for length in (lazy.shape[-1], lazy.shape[-1] + 1):
                tried = func(torch.empty((1,), device="meta").expand(*lazy.shape[:-1], length), *rest, **kwargs)
                if any(not one.dim() or one.shape[-1] != length for one in _as_list(tried)):
                    return False
    except (RuntimeError, IndexError):
        return False
    return True


def _is_row(other: Any, lazy: LazyLogits) -> bool:
    """A number, or one for each token, that is the same for all positions and not trained."""
    if type(other) not in (Tensor, torch.nn.Parameter) or other.requires_grad or other.device != lazy.device:
        return False
    return other.dim() == 0 or (other.numel() == other.shape[-1] == lazy.shape[-1] and other.dim() <= lazy.dim())


def _as_list(tried: Any) -> list[Tensor]:
    return [tried] if isinstance(tried, Tensor) else list(tried)


def _chooses_positions(func: Any, lazy: LazyLogits, rest: tuple[Any, ...]) -> bool:
    """Whether indices leave the vocabulary alone, and come out before it."""
    if func is aten.index_select.default:
        return rest[0] % lazy.dim() != lazy.dim() - 1
    taken, gaps = 0, 0
    for index in rest[0]:
        if index is None:
            gaps += 1
            taken += 1
        elif gaps or index.dtype not in (torch.bool, torch.uint8, torch.int64, torch.int32):
            return False
        else:
            taken += index.dim() if index.dtype in (torch.bool, torch.uint8) else 1
    return taken < lazy.dim()


def _stand_in(lazy: LazyLogits) -> Tensor:
    with _disable_current_modes():
        return torch.empty((1,), dtype=lazy.dtype, device="meta").expand(lazy.shape)


def _tried(func: Any, lazy: LazyLogits, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation would return, as a tensor without memory."""
    with _disable_current_modes():
        like = torch.empty_strided(lazy.shape, lazy.stride(), dtype=lazy.dtype, device="meta")
        return func(like, *rest, **kwargs)


def _plain(lazy: LazyLogits) -> Tensor:
    """The values as an ordinary tensor, a leaf."""
    return lazy._origin.values().detach().requires_grad_(lazy.requires_grad)


def _watch(head: Head, hook: Callable[..., Any] | None = None) -> None:
    """Notes a hook on the gradient of the logits, or without one that the gradient is to be kept."""
    # Hooks of register_multi_grad_hook cannot change a gradient; module and memory trackers put them on every output.
    if getattr(hook, "__globals__", {}).get("__name__") != "torch.autograd.graph":
        head.watched = True


from .taking import ALONG, along_vocabulary, fused_loss  # noqa: E402  (they know the class)
