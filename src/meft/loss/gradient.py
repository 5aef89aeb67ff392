"""The gradient of logits that never exist whole: computed when something reads it, passed on where nothing does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from .origin import Origin, applied
from .tiled import check_backward

aten = torch.ops.aten
_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.stack.default, aten.cat.default)


class Source:
    """What was taken of lazy logits in tiles, with a graph of its own down to hidden state, weight and bias.

    Attributes:
        results: what was taken.
        origin: of the logits it was taken of.
    """

    def __init__(self, origin: Origin, compute: Callable[..., tuple[Tensor, ...]], whole: Callable[..., Any]) -> None:
        self.origin, self.whole = origin, whole
        head = origin.head
        self.same = head.check_later()
        with torch.enable_grad():
            given = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in head.inputs()]
            hidden, weight, bias = (t if t is None else t.to(head.dtype) for t in given)
            self.given = given
            assert hidden is not None and weight is not None
            self.results = compute(applied(origin.positions, hidden), weight, bias)

    def check(self) -> None:
        """Raises if the head had changed when this was taken; the one time that this waits for a device."""
        if self.same is not None and not bool(self.same):
            raise self.origin.head.modified()
        self.same = None

    def gradients(self, grads: tuple[Tensor | None, ...], keep: bool) -> list[Tensor | None]:
        """Of hidden state, weight and bias."""
        chosen = [(r, g) for r, g in zip(self.results, grads, strict=True) if g is not None and r.requires_grad]
        leaves = [t for t in self.given if t is not None and t.requires_grad]
        if not chosen:
            return [None if t is None or not t.requires_grad else torch.zeros_like(t) for t in self.given]
        outputs, factors = zip(*chosen, strict=True)
        found = iter(torch.autograd.grad(outputs, leaves, factors, retain_graph=keep))
        return [next(found) if t is not None and t.requires_grad else None for t in self.given]

    def dense(self, grads: tuple[Tensor | None, ...]) -> Tensor:
        """Of the logits, whole."""
        with _autograd(), torch.enable_grad():
            logits = self.origin.values().detach().requires_grad_()
            results = self.whole(logits)
            chosen = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
            outputs, factors = zip(*chosen, strict=True)
            return torch.autograd.grad(outputs, logits, factors)[0]


@contextmanager
def _autograd() -> Iterator[None]:
    """Has autograd record also inside of `__torch_dispatch__`, which lies below it."""
    keys = [torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther]
    keys.append(torch._C.DispatchKey.ADInplaceOrView)
    before = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys]
    for key in keys:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        for key, excluded in zip(keys, before, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


class Taken(torch.autograd.Function):
    """Gives what was taken in tiles its place in the graph, behind the logits it was taken of."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, source: Source) -> tuple[Tensor, ...]:
        ctx.source = source
        with _disable_current_modes():
            ctx.like = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="meta")
        ctx.set_materialize_grads(False)
        results = tuple(result.detach().clone() for result in source.results)
        ctx.mark_non_differentiable(*(result for result in results if not result.is_floating_point()))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        check_backward()
        ctx.source.check()
        if all(grad is None for grad in grads):
            return None, None
        if ctx.source.origin.head.watched:
            return ctx.source.dense(grads), None
        return LazyGradient(ctx.like, ctx.source.origin.head.hidden.device, source=ctx.source, grads=grads), None


class LazyGradient(Tensor):
    """A gradient of lazy logits. Whatever autograd does to it is noted, and run when a value is read.

    The head does not read it: it asks the sources, which have the gradients of hidden state and weight.
    """

    how: dict[str, Any]
    known: Tensor | None
    pure: bool

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, **how: Any) -> LazyGradient:
        made = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device, storage_size=0
        )
        made.how, made.known, made.pure = how, None, True
        return made

    def values(self) -> Tensor:
        """The gradient as an ordinary tensor."""
        if self.known is None:
            with torch.no_grad():
                if "source" in self.how:
                    self.known = self.how["source"].dense(self.how["grads"])
                else:
                    args, kwargs = _read((self.how["args"], self.how["kwargs"]))
                    self.known = self.how["func"](*args, **kwargs)
        return self.known

    def sources(self) -> Iterator[tuple[Source, tuple[Tensor | None, ...]]]:
        if "source" in self.how:
            yield self.how["source"], self.how["grads"]
            return
        for leaf in tree_leaves((self.how["args"], self.how["kwargs"])):
            if isinstance(leaf, LazyGradient):
                yield from leaf.sources()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .lazy import READERS

        kwargs = kwargs or {}
        if func in READERS:
            args, kwargs = _read((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func._schema.is_mutable and isinstance(args[0], LazyGradient):
            changed = args[0]
            own = changed.values().clone()
            plain, options = _read((args[1:], kwargs))
            func(own, *plain, **options)
            changed.known, changed.pure = own, False
            return changed
        if _can_wait(func, tensors):
            moved = kwargs.get("device") not in (None, tensors[0].device)
            like = None if moved else _tried(func, args, kwargs)
            if like is not None:
                return LazyGradient(like, tensors[0].device, func=func, args=args, kwargs=kwargs)
        args, kwargs = _read((args, kwargs))
        return func(*args, **kwargs)


def _can_wait(func: Any, tensors: list[Tensor]) -> bool:
    """Linear in the gradients alone, and with one result; what adds another gradient to them reads them."""
    returns = func._schema.returns
    if func._schema.is_mutable or len(returns) != 1 or str(returns[0].type) != "Tensor":
        return False
    lazy = [isinstance(tensor, LazyGradient) for tensor in tensors]
    if not all(tensor.pure for tensor in tensors if isinstance(tensor, LazyGradient)):
        return False
    return all(lazy) if func in _SUMS else any(lazy)


def _tried(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    def like(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "layout", "pin_memory")}
    try:
        # No observer, such as a memory tracker, should count it.
        with _disable_current_modes():
            args, kwargs = tree_map_only(Tensor, like, (args, kwargs))
            return func(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        return None


def _read(nested: Any) -> Any:
    from .lazy import LazyLogits

    nested = tree_map_only(LazyGradient, LazyGradient.values, nested)
    return tree_map_only(LazyLogits, lambda lazy: lazy._origin.values(), nested)
