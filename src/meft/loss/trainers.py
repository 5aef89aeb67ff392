"""TRL's own loss head, for models whose losses are taken in tiles.

TRL's trainers ask a model for log-probabilities, entropies and accuracies of tokens in place of logits. They read the
weight of the output embedding themselves, so the module there is never called, and take tiles of 4096 positions and
32,768 tokens, several at once: more memory than whole logits in most steps. `note` puts the function that computes
them behind one that looks at the weight first: that of a `FusedLinear` gets the tiles of this package, everybody else
TRL's own. It is the only place outside of the user's model that is touched, because what TRL puts on a model, before or
after it was made reversible, cannot be reached in another way.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .rows import tiled_rows

_MODULE, _NAME = "trl.trainer.utils", "_ChunkedLogProbFunction"

_readers: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The output embedding that a weight was read from last."""


def note(head: nn.Module, weight: Tensor) -> None:
    """Has what TRL computes from this weight taken in tiles, as long as its head's losses are."""
    module = sys.modules.get(_MODULE)
    theirs = getattr(module, _NAME, None)
    if theirs is None:
        return
    if not isinstance(theirs, Tiled):
        setattr(module, _NAME, Tiled(theirs, type(head)))
    _readers[weight] = weakref.ref(head)


class Tiled:
    """Stands for TRL's `ChunkedLogProbFunction`.

    Attributes:
        theirs: TRL's own.
        heads: the type of the output embeddings that get tiles; `detach` makes them another type.
    """

    def __init__(self, theirs: Any, heads: type[nn.Module]) -> None:
        self.theirs, self.heads = theirs, heads

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """Arguments and results of TRL's function: (rows,) each, None for what `outputs` does not name."""
        head = _readers.get(weight, lambda: None)()
        if not isinstance(head, self.heads) or set(outputs) - {"log_probs", *Statistics.NAMES}:
            options = (chunk_size, final_logit_softcapping, logit_scale, outputs)
            return self.theirs.apply(hidden, weight, bias, targets, temperature, *options)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            bias = bias if bias is None else bias.to(dtype)
            statistics = Statistics(outputs, logit_scale, final_logit_softcapping, 1 / temperature)
            log_probs, *rest = tiled_rows(hidden.to(dtype), weight.to(dtype), bias, statistics, [targets])
        named = dict(zip(statistics.outputs, rest, strict=True))
        return log_probs, *(None if n not in named else _constant(n, named[n]) for n in Statistics.NAMES)


def _constant(name: str, result: Tensor) -> Tensor:
    return result if name == "entropy" else result.detach()


class Statistics:
    """Log-probability of a token and what else TRL reports, from the rows of a linear layer's output."""

    NAMES = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

    def __init__(self, outputs: tuple[str, ...], scale: float, cap: float | None, inverse_temperature: float) -> None:
        self.outputs = tuple(name for name in self.NAMES if name in outputs)
        self.scale, self.cap, self.inverse_temperature = scale, cap, inverse_temperature

    def __call__(self, raw: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits, _ = self._transformed(raw)
        chosen = logits.gather(1, targets[:, None])[:, 0]
        largest = logits.amax(-1)
        found: dict[str, Tensor] = {}
        if "mean_logits" in self.outputs:
            found["mean_logits"] = logits.mean(-1)
        if "is_top1" in self.outputs:
            found["is_top1"] = logits.argmax(-1) == targets
        powers = logits.sub_(largest[:, None])
        shifted = chosen - largest
        if "entropy" in self.outputs:
            products = powers.clone()
        powers.exp_()
        sums = powers.sum(-1)
        if "entropy" in self.outputs:
            found["entropy"] = sums.log() - products.mul_(powers).sum(-1) / sums
            del products
        if "log_sum_sq_probs" in self.outputs:
            found["log_sum_sq_probs"] = powers.square_().sum(-1).log() - 2 * sums.log()
        return shifted - sums.log(), *(found[name] for name in self.outputs)

    def gradient(self, raw: Tensor, targets: Tensor, *, grads: dict[int, Tensor]) -> Tensor:
        """Of the sum of what `grads` weighs, with respect to `raw`: autograd would keep many more buffers."""
        logits, bent = self._transformed(raw)
        dtype = raw.dtype
        del raw
        of_token = grads.get(0)
        of_entropy = grads.get(1 + self.outputs.index("entropy")) if "entropy" in self.outputs else None
        logits.sub_(logits.amax(-1, keepdim=True))
        log_sums = logits.logsumexp(-1, keepdim=True)
        logits.sub_(log_sums)
        if of_entropy is None:
            grad = logits.exp_()
            factor = torch.zeros_like(log_sums) if of_token is None else -of_token[:, None].to(grad.dtype)
            grad.mul_(factor)
        else:
            weights = logits.exp()
            entropy = -(torch.linalg.vecdot(weights, logits))[:, None]
            factor = of_entropy[:, None].to(weights.dtype)
            logits.add_(entropy).mul_(-factor)
            if of_token is not None:
                logits.sub_(of_token[:, None].to(weights.dtype))
            grad = logits.mul_(weights)
            del weights
        if of_token is not None:
            grad.scatter_add_(1, targets[:, None], of_token[:, None].to(grad.dtype))
        grad.mul_(self.inverse_temperature * self.scale)
        if bent is not None:
            grad.mul_(1 - bent.square_())
        return grad.to(dtype)

    def _transformed(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits in float32, or better, with memory of their own, and the hyperbolic tangent that capped them."""
        precise = torch.promote_types(raw.dtype, torch.float32)
        logits = raw.to(precise, copy=True) if raw.requires_grad else raw.to(precise)
        logits = logits.detach()
        if self.scale != 1.0:
            logits.mul_(self.scale)
        bent = None
        if self.cap is not None:
            bent = logits.div_(self.cap).tanh_()
            logits = bent * self.cap
        if self.inverse_temperature != 1.0:
            logits.mul_(self.inverse_temperature)
        return logits, bent
