"""Whether the last thing that happens to the hidden state in a layer is a norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from meft.engine.replay import RngState


def last_is_norm(layer: nn.Module, block: Callable[[Tensor], Any], width: int) -> bool:
    """Runs `block`, a part of `layer`, on two tokens and looks what made the tensor that it returned.

    A norm is a module with nothing below it whose parameters, if it has any besides, are vectors. On the meta device no
    number is computed; random states are left as they were, and hooks that others put on the modules do run.
    """
    made: list[tuple[nn.Module, Tensor]] = []
    reference = next((parameter for parameter in layer.parameters() if parameter.is_floating_point()), None)
    if reference is None:
        return False

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            made.append((module, output))

    norms = [module for module in layer.modules() if _norm(module)]
    handles = [module.register_forward_hook(note) for module in norms]
    rng, training = RngState.take(reference.device), [(module, module.training) for module in layer.modules()]
    try:
        for module, _ in training:
            module.training = False
        hidden = torch.ones(1, 2, width, dtype=reference.dtype, device=reference.device)
        with torch.no_grad():
            output = block(hidden)
    except Exception:
        # What a layer asks for besides a hidden state is its own affair, and so is what it raises without it.
        return False
    finally:
        for module, flag in training:
            module.training = flag
        for handle in handles:
            handle.remove()
        rng.put()
    first = output[0] if isinstance(output, tuple) else output
    return isinstance(first, Tensor) and any(output is first or _same(output, first) for _, output in made)


def _norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and not list(module.children()) and all(parameter.dim() == 1 for parameter in own)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of one memory, or one went through modules that change nothing (dropout)."""
    return one.shape == other.shape and one.untyped_storage()._cdata == other.untyped_storage()._cdata
