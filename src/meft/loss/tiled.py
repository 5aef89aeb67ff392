"""Cross-entropy of a linear layer's output that never exists whole: positions are taken a tile at a time.

A tile's logits are computed, turned into its share of the loss and of every gradient, and dropped, all in the forward
pass; the backward pass only scales the gradients. The cost is that of the plain head, three matrix products.

PyTorch has this as `torch.nn.functional.linear_cross_entropy` (2.13), which is given the cases it loses nothing in: a
frozen weight (under LoRA and other adapters) in float32 or float64. In half precision it returns the loss in that
precision, where the losses of Transformers convert the logits to float32 first, and on the CPU it copies the whole
weight to float32; of a trained weight it holds the gradient three times. There, in older versions, and where logits are
capped or scaled, the tiles below do it, with the plain head's own steps: logits in the model's precision, everything
behind them in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from meft.errors import DataError, DoubleBackwardError

Pointwise = Callable[[Tensor], Tensor]
"""What a model does to each logit by itself: caps it, scales it, converts it."""

# Fewer positions in a tile would leave the matrix product waiting for the weight, which every tile reads again.
_LEAST_ROWS = {"cpu": 64}
_LEAST_ROWS_ELSEWHERE = 256


def rows_per_tile(positions: int, hidden_size: int, vocabulary: int, device: torch.device) -> int:
    """How many positions have logits at the same time.

    As many as make the logits of a tile no larger than the whole hidden state, but 64 at least, 256 on devices other
    than the CPU; tiles are made equal.

    Example:
        >>> rows_per_tile(8192, 4096, 32000, torch.device("cpu"))
        1024
    """
    least = _LEAST_ROWS.get(device.type, _LEAST_ROWS_ELSEWHERE)
    tiles = -(-positions // max(least, positions * hidden_size // vocabulary))
    return -(-positions // max(tiles, 1))


def tiled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    pointwise: Sequence[Pointwise] = (),
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The same as `cross_entropy(pointwise(linear(hidden, weight, bias)).float(), target)`, in tiles.

    Args:
        hidden: (positions, hidden size), in the dtype of weight and bias.
        weight: (vocabulary, hidden size).
        bias: (vocabulary,) or None.
        target: (positions,), int64.
        pointwise: functions applied to the logits one after the other.
        ignore_index: the target of positions that do not count.
        reduction: "mean" over the positions that count, or "sum".

    Returns:
        The loss, in float32, or float64 for float64 inputs.

    Raises:
        DataError: a target is no index of the vocabulary (on the CPU; on CUDA the device asserts, as ever).
        DoubleBackwardError: in the backward pass, when gradients of gradients are asked for.
    """
    _check_target(target, len(weight), ignore_index)
    rows = rows_per_tile(len(hidden), hidden.shape[1], len(weight), hidden.device)
    counts = target != ignore_index
    with torch.autocast(hidden.device.type, enabled=False):
        if _torch_can(hidden, weight) and not pointwise:
            total = _by_torch(hidden, weight, bias, target, ignore_index, rows)
        else:
            total = _TiledCrossEntropy.apply(hidden, weight, bias, target, counts, tuple(pointwise), rows)
    # Where no position counts the gradients are zero, even of a mean, which is 0/0.
    total = torch.where(counts.any(), total, 0)
    return total / counts.sum() if reduction == "mean" else total


def _torch_can(hidden: Tensor, weight: Tensor) -> bool:
    # Of a fake tensor PyTorch's function makes the results only, and an estimate would miss its working memory.
    precise = hidden.dtype in (torch.float32, torch.float64) and not isinstance(hidden, FakeTensor)
    exists = hasattr(torch.nn, "LinearCrossEntropyOptions")
    return exists and precise and not weight.requires_grad and len(hidden) > 0


def _by_torch(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, rows: int
) -> Tensor:
    # Its gradients must outlive a backward pass, as the plain head's do under retain_graph.
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=rows, chunking_method=None, acc_policy="compact", allow_retain_graph=True
    )
    total = F.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias, ignore_index=ignore_index, reduction="sum", options=options
    )
    return _OnceDifferentiable.apply(total)


def _check_target(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    if target.device.type != "cpu" or isinstance(target, FakeTensor):
        return
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= vocabulary))]
    if len(wrong):
        raise DataError(
            f"{len(wrong)} of {len(target)} labels are outside of the vocabulary, the first is {int(wrong[0])}. A "
            f"label is a token from 0 to {vocabulary - 1}, or {ignore_index} to leave its position out. Check that "
            "tokenizer and model belong together."
        )


class _TiledCrossEntropy(torch.autograd.Function):
    """The sum of the losses at the positions that count; gradients are made beside it and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        counts: Tensor,
        pointwise: tuple[Pointwise, ...],
        rows: int,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        precise = torch.promote_types(hidden.dtype, torch.float32)
        # Sums over tiles are kept in float32; rounding them after each tile would add up.
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if needs_weight else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=precise) if needs_bias else None
        total = torch.zeros((), dtype=precise, device=hidden.device)
        labels = torch.where(counts, target, 0)
        needs_any = needs_hidden or needs_weight or needs_bias
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            loss, grad_logits = _tile(hidden[part], weight, bias, labels[part], counts[part], pointwise, needs_any)
            total += loss
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                add_product(grad_weight, grad_logits.T, hidden[part])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0, dtype=precise)
            del grad_logits
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype, ctx.rows = hidden.dtype, rows
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        check_backward()
        grads = (_scaled(g, grad, ctx.dtype, ctx.rows) if g is not None else None for g in ctx.saved_tensors)
        return (*grads, None, None, None, None)


class _OnceDifferentiable(torch.autograd.Function):
    """The identity; PyTorch's function would leave terms out of gradients of gradients without a word."""

    @staticmethod
    def forward(ctx: Any, total: Tensor) -> Tensor:
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        check_backward()
        return grad


def check_backward() -> None:
    if torch.is_grad_enabled():
        raise DoubleBackwardError(
            "create_graph=True asks for gradients of gradients through the loss head, whose logits were dropped tile "
            "by tile. Call backward() without create_graph, or use fused_loss=False."
        )


def _tile(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    counts: Tensor,
    pointwise: tuple[Pointwise, ...],
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The summed loss of one tile, and its gradient with respect to what the linear layer returns."""
    raw = F.linear(hidden, weight, bias)
    with torch.set_grad_enabled(bool(pointwise) and needs_grad):
        leaf = raw.requires_grad_() if torch.is_grad_enabled() else raw
        logits = leaf
        for function in pointwise:
            logits = function(logits)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # One buffer from here on, for logits, their exponentials and the gradient, unless autograd needs the logits.
    scores = logits.detach().clone() if logits.requires_grad else logits
    if not logits.requires_grad:
        del raw, leaf
    scores.sub_(scores.amax(-1, keepdim=True))
    chosen, counts = scores.gather(1, labels[:, None]), counts[:, None]
    sums = scores.exp_().sum(-1, keepdim=True)
    loss = torch.where(counts, sums.log() - chosen, 0).sum()
    if not needs_grad:
        return loss, scores
    scores.mul_(counts / sums).scatter_add_(1, labels[:, None], -counts.to(scores.dtype))
    if not logits.requires_grad:
        return loss, scores.to(hidden.dtype)
    return loss, torch.autograd.grad(logits, leaf, scores)[0]


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds a matrix product of possibly lower precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cpu":
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
    else:
        total += left @ right


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """Multiplies in the factor's precision: one rounded to bfloat16 would be wrong by up to 0.4% everywhere."""
    result = torch.empty_like(grad, dtype=dtype)
    for part, source in zip(result.split(rows), grad.split(rows), strict=True):
        part.copy_(source.to(factor.dtype) * factor)
    return result
