"""Puts the loss head of a model's output embeddings into tiles, in place, and takes it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from .lazy import lazy_linear
from .origin import WANTED
from .trainers import note

Change = tuple[nn.Module, str, Any]
"""(module, attribute, value before), as `meft.backbone.layers.ReversibleStack.changes` has them."""

_LAZILY: ContextVar[bool] = ContextVar("meft_lazily", default=False)


@contextmanager
def lazily() -> Iterator[None]:
    """Puts logits off in evaluation without gradients too, for somebody who needs a few of them."""
    token, wanted = _LAZILY.set(True), WANTED.set(True)
    try:
        yield
    finally:
        _LAZILY.reset(token)
        WANTED.reset(wanted)


class FusedLinear(nn.Linear):
    """An output embedding whose logits are computed only if more than their cross-entropy is asked for.

    It differs from `nn.Linear` in training only, and returns ordinary logits wherever something else takes part in
    the call: hooks on this module, offloaded or sharded weights, compilation.
    """

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        # Trainers of TRL read the weight in place of calling this module.
        if name == "weight" and not torch.compiler.is_compiling():
            note(self, value)
        return value

    def forward(self, input: Tensor) -> Tensor:
        # Compiled code does without: it cannot trace through the tensor.
        if torch.compiler.is_compiling() or not self._alone(input):
            return super().forward(input)
        dtype = _computed_in(input, self.weight, self.bias)
        return super().forward(input) if dtype is None else lazy_linear(input, self.weight, self.bias, dtype)

    def _alone(self, input: Tensor) -> bool:
        """Whether the weights may be used after this call, and a loss may follow."""
        if not (self.training and torch.is_grad_enabled()) and not _LAZILY.get():
            return False
        if torch.jit.is_tracing():
            return False
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        # FSDP and DeepSpeed gather the weights of a module for its call only, by hooks; Accelerate by `_hf_hook`.
        if any(hooks) or hasattr(self, "_hf_hook") or getattr(self, "_is_replica", False):
            return False
        tensors = [t for t in (input, self.weight, self.bias) if t is not None]
        if any(is_traceable_wrapper_subclass(t) or t.is_inference() for t in tensors):
            return False
        wanted = _LAZILY.get() or any(t.requires_grad for t in tensors)
        return wanted and not torch._C._are_functorch_transforms_active()


def attach(model: nn.Module) -> list[Change]:
    """Lets a model's losses be taken in tiles, so that logits never exist whole in training; in place.

    Example:
        >>> changes = attach(model)
        >>> model(input_ids=ids, labels=ids).loss.backward()     # the same loss and gradients, without whole logits
        >>> detach(model)

    Losses, gradients and `.logits` are those of the plain model; only `torch.nn.functional.cross_entropy` of the
    logits, also of soft-capped or scaled ones, no longer needs their values. The output embedding keeps its weight,
    its names and its place; nothing else is touched.

    Args:
        model: a model of Transformers, or one that holds such models (PEFT's). Output embeddings that are an
            `nn.Linear` are changed, also those that PEFT trains by `modules_to_save`; others (with an adapter,
            quantised) and models without one are left as they are.

    Returns:
        What was changed, for an `undo` of the caller's own; empty if nothing was, or all of it before.
    """
    # Not at the head: importing PEFT imports the tuner (`meft.lazy`), which imports this module.

    changes: list[Change] = []
    for inner in model.modules():
        if not isinstance(inner, PreTrainedModel):
            continue
        for linear in _linears(inner):
            if type(linear) is nn.Linear:
                changes.append((linear, "__class__", nn.Linear))
                linear.__class__ = FusedLinear
    return changes


def heads(model: nn.Module) -> list[PreTrainedModel]:
    """The models inside a model whose output embedding `attach` has changed."""
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [module for module in inner if any(type(linear) is FusedLinear for linear in _linears(module))]


def refresh(model: PreTrainedModel) -> None:
    """Changes an output embedding that was put in since `attach`: `resize_token_embeddings` makes a new one."""
    for linear in _linears(model):
        if type(linear) is nn.Linear:
            linear.__class__ = FusedLinear


def detach(model: nn.Module) -> None:
    """Undoes `attach`, in place, also where the model was copied or wrapped since; nothing happens if there is none."""
    for module in model.modules():
        if type(module) is FusedLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]


def _linears(model: PreTrainedModel) -> list[Any]:
    """A model's output embedding, with the copies that PEFT trains of it."""
    # Not at the head: importing PEFT imports the tuner (`meft.lazy`), which imports this module.
    from peft.utils import ModulesToSaveWrapper

    head = model.get_output_embeddings()
    return list(head.modules()) if isinstance(head, ModulesToSaveWrapper) else [head]


def _computed_in(input: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """The dtype that `linear` computes in; None if it cannot."""
    dtypes = {t.dtype for t in (input, weight, bias) if t is not None}
    device = input.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in dtypes and all(d.is_floating_point for d in dtypes):
        return torch.get_autocast_dtype(device)
    return dtypes.pop() if len(dtypes) == 1 else None
