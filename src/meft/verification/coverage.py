"""What a model's reversible stacks cover: its parameters, and the activations of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from meft.backbone.plan import Plan
from meft.backbone.report import StackReport, found_in, stacks_of
from meft.backbone.stack import ReversibleStack

from .preserve import preserved, replaced


def report(model: nn.Module, batch: Mapping[str, Any] | None = None) -> StackReport:
    """Says which stacks of a model are reversible, why layers do not run in stages, and what keeps its activations.

    Example:
        >>> meft.make_reversible(model)
        >>> print(meft.report(model))
        reversible: model.layers (30 layers), 79% of the parameters; keeps its activations: model.embed_tokens, ...

    Args:
        model: after `make_reversible` or with a MEFT adapter.
        batch: what the model is called with, to count the activations too: in one forward pass that keeps them all.
            Gradients, buffers and random states are left as they are.

    Raises:
        ConfigError: the model is not reversible.
    """
    reversible_stacks = stacks_of(model)
    # First: what is no stack shows when the model runs it.
    saved = {} if batch is None else _saved(model, batch, reversible_stacks)
    found = found_in(model)
    return dataclasses.replace(
        found,
        kept_bytes={name: size for name, size in saved.items() if name not in found.stacks},
        activations=sum(saved.get(name, 0) for name in found.stacks) / sum(saved.values()) if saved else None,
    )


def _saved(
    model: nn.Module, batch: Mapping[str, Any], reversible_stacks: Mapping[str, ReversibleStack]
) -> dict[str, int]:
    """Bytes that one forward pass in training saves for its backward pass, by stack or outermost other module."""
    names = {module: name for name, module in model.named_modules()}
    stacks = {
        id(layer): name for name, reversible_stack in reversible_stacks.items() for layer in reversible_stack.layers
    }
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    where: list[nn.Module] = [model]
    seen: dict[tuple[int, int], Tensor] = {}
    saved: dict[str, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes())
        if storage.data_ptr() not in own and key not in seen:
            seen[key] = tensor.detach()  # kept, so that no other tensor gets its place
            coupled = next((stacks[id(module)] for module in where if id(module) in stacks), None)
            name = names.get(where[-1], "") if coupled is None else coupled
            saved[name] = saved.get(name, 0) + storage.nbytes()
        return tensor

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        where.pop()

    handles = [
        register_module_forward_pre_hook(lambda module, args: where.append(module)),
        register_module_forward_hook(leave, always_call=True),
    ]
    device = next(iter(model.parameters())).device
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    try:
        with preserved(model), replaced(list(reversible_stacks.values()), _cached), torch.enable_grad():
            model.train()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model(**moved)
    finally:
        for handle in handles:
            handle.remove()
    return saved


def _cached(plan: Plan) -> Plan:
    return dataclasses.replace(plan, reversible=False)
