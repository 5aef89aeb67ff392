"""Calls under other libraries' machinery that a reversible layer cannot be right in, refused with the way out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from meft.errors import UnsupportedModelError

_PLAIN = "Use the plain model for it: meft.restore(model), or model.unload() for a MEFT adapter's base model"


def check_transforms(name: str, modules: Sequence[nn.Module], training: bool) -> None:
    """Looks at who calls a reversible layer.

    Args:
        name: what messages call the layer.
        modules: the layer and what is in it.
        training: whether the call is to be differentiated.

    Raises:
        UnsupportedModelError: torch.func, forward-mode differentiation, torch.jit.trace, or per-sample gradients.
    """
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedModelError(
            f"{name} is reversible and was called under a transform of torch.func (grad, vmap, jvp, jacrev, ...). "
            "Those differentiate and batch each operation by themselves, and would have to know the rebuilding of "
            f"activations. {_PLAIN}, or backward() and torch.autograd.grad in the place of torch.func.grad."
        )
    if forward_ad._current_level >= 0:
        raise UnsupportedModelError(
            f"{name} is reversible and was called in forward-mode differentiation (torch.autograd.forward_ad, "
            f"torch.func.jvp), whose tangents do not pass through coupled streams. {_PLAIN}, or differentiate in "
            "reverse mode."
        )
    if torch.jit.is_tracing():
        raise UnsupportedModelError(
            f"{name} is reversible and was called under torch.jit.trace (or a TorchScript export to ONNX), which "
            f"cannot record coupled streams. {_PLAIN}, or torch.export.export(model.eval(), ...), which can."
        )
    if training:
        weight = next(_trained(modules), None)
        if weight is not None and hasattr(weight, "grad_sample"):
            raise UnsupportedModelError(
                f"The weights of {name} have a grad_sample: per-sample gradients (Opacus) come from hooks that pair "
                "each run of a module with one backward pass, and a reversible layer runs its modules twice. Train "
                f"without PrivacyEngine, or without reversible layers. {_PLAIN}."
            )
        if type(weight).__name__ == "ExpandedWeight":
            raise UnsupportedModelError(
                f"The weights of {name} are expanded for per-sample gradients (call_for_per_sample_grads), which a "
                f"reversible layer cannot give. {_PLAIN}."
            )


def _trained(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    return (p for module in modules for p in module._parameters.values() if p is not None and p.requires_grad)
