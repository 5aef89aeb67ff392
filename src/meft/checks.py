"""What must hold for a step to be rebuilt and differentiated, looked at before it is too late."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import DoubleBackwardError, ModifiedTensorError, UnsupportedModelError
from .tape import Tape, version_of


def check_leaves(tape: Tape, values: tuple[Tensor, ...], known: tuple[Tensor, ...]) -> None:
    """Looks for tensors in a function's graph that require gradients and would get none."""
    names = {id(tensor) for tensor in known}
    pending = [value.grad_fn for value in values if value.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and id(variable) not in names:
            raise UnsupportedModelError(
                f"A layer of {tape.name} uses a tensor of shape {tuple(variable.shape)} that requires "
                "gradients but is neither one of its parameters nor among its arguments (another module's weight, or "
                "something that an earlier layer or run left behind), so a reversible layer could not pass its "
                "gradient on. Freeze that tensor (requires_grad_(False)), leave this stack out with stacks=[...], or "
                'use backward="cached".'
            )
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                pending.append(child)


def check_backward(ctx: Any) -> None:
    index = ctx.tape.layer_of(ctx.level)
    if torch.is_grad_enabled():
        raise DoubleBackwardError(
            f"create_graph=True asks for gradients of gradients through layer {index} of {ctx.tape.name}, "
            "which a reversible layer does not keep the graph for. Call backward() without create_graph, or use "
            'backward="cached", which can be differentiated twice.'
        )
    present = {id(parameter) for module in ctx.layer.modules for parameter in module._parameters.values()}
    if present and any(id(parameter) not in present for parameter in ctx.layer.parameters):
        raise ModifiedTensorError(
            f"The weights that layer {index} of {ctx.tape.name} had in the forward pass are no longer its own, "
            "so its activations cannot be rebuilt (torch.func.functional_call swaps weights for one call). Keep the "
            'weights in place until backward() is done, or use backward="cached".'
        )
    tensors = (*ctx.layer.outside, *ctx.layer.parameters)
    changed = [tuple(t.shape) for t, v in zip(tensors, ctx.versions, strict=True) if version_of(t) != v]
    if changed:
        raise ModifiedTensorError(
            f"{len(changed)} of the weights or inputs of layer {index} of {ctx.tape.name} were modified in "
            f"place between the forward and the backward pass (the first has shape {changed[0]}), so its activations "
            "cannot be rebuilt. Call backward() before optimizer.step(), load_state_dict() or other in-place changes."
        )
