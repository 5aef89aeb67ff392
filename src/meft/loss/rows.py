"""What is taken of each row of logits by itself, a tile of rows at a time, without whole logits.

The forward pass keeps the hidden state and nothing of the logits; the backward pass makes each tile's logits once more
and differentiates what was taken of them. That is one matrix product more than whole logits cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .tiled import Pointwise, add_product, check_backward, rows_per_tile

OfRows = Callable[..., tuple[Tensor, ...]]
"""What is taken of rows: given logits (rows, vocabulary) and tensors of as many rows, it returns such tensors."""


def tiled_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    function: OfRows,
    beside: Sequence[Tensor] = (),
    *,
    pointwise: Sequence[Pointwise] = (),
) -> tuple[Tensor, ...]:
    """The same as `function(pointwise(linear(hidden, weight, bias)), *beside)`, in tiles.

    Example:
        >>> (largest,) = tiled_rows(hidden, weight, None, lambda logits: (logits.amax(-1),))

    Args:
        hidden: (rows, hidden size), in the dtype of weight and bias.
        weight: (vocabulary, hidden size).
        bias: (vocabulary,) or None.
        function: takes something of each row by itself, in operations that PyTorch can differentiate.
        beside: tensors of as many rows that `function` is given with the logits; constants.
        pointwise: functions applied to the logits one after the other, each of a row by itself.

    Returns:
        What `function` returned for all rows; integers and booleans have no gradient.

    Raises:
        DoubleBackwardError: in the backward pass, when gradients of gradients are asked for.
    """
    rows = rows_per_tile(len(hidden), hidden.shape[1], len(weight), hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        return _TiledRows.apply(hidden, weight, bias, function, tuple(pointwise), max(rows, 1), *beside)


class _TiledRows(torch.autograd.Function):
    """Runs the function tile by tile, and in the backward pass again with a graph."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        function: OfRows,
        pointwise: tuple[Pointwise, ...],
        rows: int,
        *beside: Tensor,
    ) -> tuple[Tensor, ...]:
        found: list[tuple[Tensor, ...]] = []
        # No rows at all still say which shapes the function returns.
        for start in range(0, max(len(hidden), 1), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight, bias)
            for one in pointwise:
                logits = one(logits)
            found.append(function(logits, *(tensor[part] for tensor in beside)))
            del logits
        results = tuple(torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, bias, *beside)
        ctx.function, ctx.pointwise, ctx.rows = function, pointwise, rows
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(result for result in results if not result.is_floating_point()))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        check_backward()
        hidden, weight, bias, *beside = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        precise = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if needs_weight else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=precise) if needs_bias else None
        wanted = [index for index, grad in enumerate(grads) if grad is not None]
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden) if wanted else 0, ctx.rows):
                part = slice(start, start + ctx.rows)
                grad_logits = _grad_of_tile(
                    F.linear(hidden[part], weight, bias),
                    ctx.function,
                    ctx.pointwise,
                    tuple(tensor[part] for tensor in beside),
                    {index: grads[index][part] for index in wanted},  # type: ignore[index]
                )
                if grad_logits is None:
                    continue
                if grad_hidden is not None:
                    torch.mm(grad_logits, weight, out=grad_hidden[part])
                if grad_weight is not None:
                    add_product(grad_weight, grad_logits.T, hidden[part])
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0, dtype=precise)
                del grad_logits
        finished = (grad if grad is None else grad.to(hidden.dtype) for grad in (grad_hidden, grad_weight, grad_bias))
        return (*finished, None, None, None, *(None for _ in beside))


def _grad_of_tile(
    raw: Tensor,
    function: OfRows,
    pointwise: tuple[Pointwise, ...],
    beside: tuple[Tensor, ...],
    grads: dict[int, Tensor],
) -> Tensor | None:
    by_hand = getattr(function, "gradient", None)
    if by_hand is not None and not pointwise:
        return by_hand(raw, *beside, grads=grads)
    with torch.enable_grad():
        leaf = raw.requires_grad_()
        logits = leaf
        for one in pointwise:
            logits = one(logits)
        results = function(logits, *beside)
        del logits
    chosen = [(results[index], grad) for index, grad in grads.items() if results[index].requires_grad]
    if not chosen:
        return None
    outputs, given = zip(*chosen, strict=True)
    return torch.autograd.grad(outputs, leaf, given)[0]
