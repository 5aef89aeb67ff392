"""What is taken of lazy logits in tiles: losses of tokens, and whatever reduces the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gradient import Source, Taken
from .origin import Conversion
from .rows import tiled_rows
from .tiled import tiled_cross_entropy

_NAMES = ("logsumexp", "argmax", "argmin", "max", "min", "amax", "amin", "sum", "mean", "topk", "gather")
ALONG = {function for name in _NAMES for function in (getattr(torch, name), getattr(Tensor, name))}
"""Functions that may take something of each row of logits."""

_WITH_K = (torch.topk, Tensor.topk)
_CHOOSING = (torch.gather, Tensor.gather)
_TOTALS = {torch.sum: torch.sum, Tensor.sum: torch.sum, torch.mean: torch.mean, Tensor.mean: torch.mean}


def along_vocabulary(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A reduction of the vocabulary, in tiles; None for what is no such thing."""
    lazy: Any = args[0] if args else kwargs.get("input")
    rest, options = list(args[1:]), dict(kwargs)
    if not _may_be_taken(lazy) or lazy.dim() == 0 or "out" in options or "input" in options:
        return None
    if func in _TOTALS and not rest and set(options) <= {"dtype"}:
        return _total(func, lazy, options.get("dtype"))
    place = 1 if func in _WITH_K else 0
    dim = rest[place] if len(rest) > place else options.get("dim", -1 if func in _WITH_K else None)
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if type(dim) is not int or dim % lazy.dim() != lazy.dim() - 1:
        return None
    if len(rest) > place:
        rest[place] = -1
    else:
        options["dim"] = -1
    beside: list[Tensor] = []
    if func in _CHOOSING:
        index = rest.pop(1) if len(rest) > 1 else options.pop("index", None)
        if not isinstance(index, Tensor) or index.shape[:-1] != lazy.shape[:-1] or index.device != lazy.device:
            return None
        beside.append(index.reshape(-1, index.shape[-1]))
        rest = [-1]
        options.pop("dim", None)
    if any(isinstance(value, Tensor) for value in (*rest, *options.values())):
        return None
    kinds: list[Any] = []

    def of_rows(logits: Tensor, *index: Tensor) -> tuple[Tensor, ...]:
        found = func(logits, *rest, *index, **options)
        kinds[:] = [type(found)]
        return tuple(found) if isinstance(found, tuple) else (found,)

    results = _taken(lazy, of_rows, beside)
    results = tuple(result.reshape(*lazy.shape[:-1], *result.shape[1:]) for result in results)
    return kinds[0](results) if issubclass(kinds[0], tuple) else results[0]


def _total(func: Any, lazy: Any, dtype: torch.dtype | None) -> Tensor:
    """The sum or mean of all logits: rows first, in float32 at least."""
    precise = torch.promote_types(dtype or lazy.dtype, torch.float32)
    (rows,) = _taken(lazy, lambda logits: (logits.sum(-1, dtype=precise),), [])
    total = rows.sum()
    if _TOTALS[func] is torch.mean:
        total = total / lazy.numel()
    return total.to(dtype or lazy.dtype)


def fused_loss(
    func: Any,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Cross-entropies and losses of log-probabilities in tiles; None where only whole logits give what is asked for."""
    if not _may_be_taken(input) or input.dim() != 2 or size_average is not None or reduce is not None:
        return None
    if reduction not in ("mean", "sum", "none") or target.dtype != torch.int64 or target.shape != input.shape[:1]:
        return None
    if target.device != input.device or (weight is not None and weight.requires_grad):
        return None
    dtype = torch.float32 if torch.is_autocast_enabled(input.device.type) else input.dtype
    if func is F.cross_entropy and weight is None and label_smoothing == 0.0 and reduction != "none":
        return _cross_entropy(input, target, ignore_index, reduction).to(torch.promote_types(dtype, input.dtype))
    smoothing = {"label_smoothing": label_smoothing} if func is F.cross_entropy else {}

    def of_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = logits.to(torch.promote_types(dtype, logits.dtype))
        factors = weight if weight is None else weight.to(logits.dtype)
        options = {"weight": factors, "ignore_index": ignore_index, "reduction": "none"} | smoothing
        return (func(logits, labels, **options),)

    (losses,) = _taken(input, of_rows, [target])
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    counts = target != ignore_index
    if weight is None:
        return losses.sum() / counts.sum()
    return losses.sum() / torch.where(counts, weight[torch.where(counts, target, 0)], 0).sum().to(losses.dtype)


def _may_be_taken(lazy: Any) -> bool:
    from .lazy import LazyLogits

    if not (isinstance(lazy, LazyLogits) and lazy.pending):
        return False
    return lazy._origin.attached or not (lazy.requires_grad and torch.is_grad_enabled())


def _taken(lazy: Any, of_rows: Callable[..., tuple[Tensor, ...]], beside: list[Tensor]) -> tuple[Tensor, ...]:
    origin, width = lazy._origin, lazy.shape[-1]

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        rows = hidden.reshape(-1, hidden.shape[-1])
        return tiled_rows(rows, weight, bias, of_rows, beside, pointwise=origin.pointwise)

    return _connected(lazy, compute, lambda logits: of_rows(logits.reshape(-1, width), *beside))


def _cross_entropy(lazy: Any, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    origin = lazy._origin
    pointwise = origin.pointwise
    while pointwise and pointwise[-1] == Conversion(torch.float32) and origin.head.dtype != torch.float64:
        # The tiles end with it by themselves.
        pointwise = pointwise[:-1]
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        return (tiled_cross_entropy(hidden, weight, bias, target, pointwise=pointwise, **options),)

    def whole(logits: Tensor) -> tuple[Tensor, ...]:
        return (F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, **options),)

    return _connected(lazy, compute, whole)[0]


def _connected(lazy: Any, compute: Callable[..., tuple[Tensor, ...]], whole: Callable[..., Any]) -> tuple[Tensor, ...]:
    if lazy.requires_grad and torch.is_grad_enabled():
        return Taken.apply(lazy, Source(lazy._origin, compute, whole))
    with torch.no_grad():
        hidden, weight, bias = lazy._origin.head.operands()
        for view in lazy._origin.positions:
            hidden = view(hidden)
        return compute(hidden, weight, bias)
