"""Gradients of a model on one batch, without writing `.grad`, and how far two sets of them are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meft.errors import ConfigError

Gradient = Tensor | None

_PROJECTION_SEED = 0
# Of the root mean square of all parameters' gradients: what is smaller is compared with this.
_NEGLIGIBLE = 0.1


def gradients_of(model: nn.Module, inputs: Mapping[str, Any], parameters: Sequence[Tensor]) -> list[Gradient]:
    """Runs the model forward and backward; returns the gradients of `parameters`, None where there is none.

    The loss is the model's own, from labels in `inputs`; without one it is the sum of fixed random projections of the
    model's outputs.

    Raises:
        ConfigError: no output depends on a parameter that requires gradients.
    """
    outputs = model(**inputs)
    loss = loss_of(outputs)
    if loss is None:
        loss = _projection(outputs)
    if loss is None or not loss.requires_grad:
        raise ConfigError(
            f"No output of {type(model).__name__} on this batch depends on a trainable parameter, so there are no "
            "gradients to compare. Give a batch with labels, or train a parameter that the output depends on."
        )
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def loss_of(outputs: Any) -> Tensor | None:
    """The loss that a Transformers model computed from labels, or None."""
    if isinstance(outputs, tuple):
        loss = outputs[0] if outputs and isinstance(outputs[0], Tensor) and outputs[0].dim() == 0 else None
    else:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    return None if loss is None else loss.mean()


def _projection(outputs: Any) -> Tensor | None:
    """A scalar that depends on every element of the outputs: products with fixed Gaussian numbers, summed.

    Only tensors that stand in the outputs by themselves count: tuples hold inner hidden states, on which alone a
    reversible pass cannot be differentiated.
    """
    generator = torch.Generator().manual_seed(_PROJECTION_SEED)
    terms = []
    for value in _values(outputs):
        if isinstance(value, Tensor) and value.requires_grad and value.numel():
            wide = torch.promote_types(value.dtype, torch.float32)
            direction = torch.randn(value.shape, generator=generator, dtype=wide).to(value.device)
            terms.append((value * direction).sum() / value.numel() ** 0.5)
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else None


def _values(outputs: Any) -> Iterable[Any]:
    if isinstance(outputs, Mapping):
        return outputs.values()
    return outputs if isinstance(outputs, tuple | list) else (outputs,)


def relative_differences(pairs: Mapping[str, tuple[Gradient, Gradient]]) -> tuple[dict[str, float], float]:
    """Compares gradients, given as (found, reference) by name of the parameter.

    Some gradients are zero but for rounding (that of the bias of attention keys, which softmax does not see), and two
    roundings of zero have a relative difference of about 1. So a gradient whose norm is below a tenth of the typical
    one counts as that large.

    Returns:
        |found - reference| / max(|reference|, floor) by name, inf where that is not finite, and the floor.
    """
    present = {name: pair for name, pair in pairs.items() if pair[0] is not None or pair[1] is not None}
    norms = {name: _norm(reference) for name, (_, reference) in present.items()}
    floor = _NEGLIGIBLE * math.sqrt(sum(norm**2 for norm in norms.values()) / max(len(norms), 1))
    errors = {name: _error(found, reference, floor) for name, (found, reference) in present.items()}
    return errors, floor


def _error(found: Gradient, reference: Gradient, floor: float) -> float:
    """A gradient that is None beside one that is not counts as zeros."""
    if found is None or reference is None:
        difference = _norm(found) + _norm(reference)
    elif torch.equal(found, reference):
        return 0.0
    else:
        difference = _norm(found.double() - reference.double())
    scale = max(_norm(reference), floor)
    error = difference / scale if difference and scale else difference
    return error if math.isfinite(error) else math.inf


def _norm(values: Gradient) -> float:
    return 0.0 if values is None else float(torch.linalg.vector_norm(values.double()))
