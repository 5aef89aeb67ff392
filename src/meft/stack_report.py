"""What `make_reversible` found in a model: which stacks are reversible, and what keeps its activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from meft.backbone.discovery import check_module
from meft.backbone.layers import ReversibleLayer
from meft.backbone.plan import Plan
from meft.backbone.stack import ReversibleStack
from meft.errors import ConfigError
from meft.verification.preserve import preserved, replaced

_MIB = 2**20


@dataclass(frozen=True)
class StackReport:
    """Which stacks of a model are reversible; `str()` is one line.

    Attributes:
        stacks: number of layers that are rebuilt, by name of their stack.
        parameters: share of the model's parameters that lies in these layers.
        left_out: why the layers of a list run as they are, by its name; known after the first forward pass.
        plain: layers that run as they are because they change the hidden state's shape, by name of the stack.
        keeps: outermost modules with parameters that lie in no such stack, and so keep their activations.
        kept_bytes: bytes that are saved for the backward pass outside the stacks, by the module that saves them.
        activations: share of all activations, as they are without meft, that the stacks need not keep; None, and
            `kept_bytes` empty, without a batch.
    """

    stacks: Mapping[str, int]
    parameters: float
    left_out: Mapping[str, str]
    plain: Mapping[str, tuple[int, ...]]
    keeps: tuple[str, ...]
    kept_bytes: Mapping[str, int] = field(default_factory=dict)
    activations: float | None = None

    def __str__(self) -> str:
        found = ", ".join(f"{name} ({layers} layer{'s' * (layers != 1)})" for name, layers in self.stacks.items())
        shares = "" if self.activations is None else f" and {self.activations:.0%} of the activations"
        parts = [f"reversible: {found or 'nothing'}, {self.parameters:.0%} of the parameters{shares}"]
        if self.plain:
            parts.append("as they are: " + ", ".join(f"{name}.{i}" for name, ids in self.plain.items() for i in ids))
        if self.left_out:
            parts.append(f"no stacks: {', '.join(self.left_out)}")
        sizes: dict[str, int] = {}
        for name, size in self.kept_bytes.items():
            whole = next((kept for kept in self.keeps if f"{name}.".startswith(f"{kept}.")), name) or "the model itself"
            sizes[whole] = sizes.get(whole, 0) + size
        largest = sorted(sizes, key=lambda name: -sizes[name])
        names = [f"{name} ({sizes[name] / _MIB:.2f} MiB)" for name in largest] or list(self.keeps)
        parts.append(f"keeps its activations: {', '.join(names) or 'nothing'}")
        return "; ".join(parts)


def report(model: nn.Module, batch: Mapping[str, Any] | None = None) -> StackReport:
    """Says which stacks of a model are reversible, and what keeps its activations.

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
    check_module(model, "report")
    reversible_stacks = dict(_segments(model))
    if not reversible_stacks:
        raise ConfigError(
            f"{type(model).__name__} is not reversible, so there is nothing to report. Make it so with "
            "meft.make_reversible(model) or peft.get_peft_model(model, meft.MeftConfig(...)) first."
        )
    # First: what is no stack shows when the model runs it.
    saved = {} if batch is None else _saved(model, batch, reversible_stacks)
    taken = {
        name: reversible_stack
        for name, reversible_stack in reversible_stacks.items()
        if reversible_stack.left_out is None
    }
    rebuilt = {
        name: [layer for index, layer in enumerate(reversible_stack.layers) if index not in reversible_stack.plain]
        for name, reversible_stack in taken.items()
    }
    inside = {p for layers in rebuilt.values() for layer in layers for p in layer.parameters()}
    total = sum(parameter.numel() for parameter in model.parameters())
    return StackReport(
        stacks={name: len(layers) for name, layers in rebuilt.items()},
        parameters=sum(parameter.numel() for parameter in inside) / max(total, 1),
        left_out={
            name: reversible_stack.left_out
            for name, reversible_stack in reversible_stacks.items()
            if reversible_stack.left_out is not None
        },
        plain={
            name: tuple(sorted(reversible_stack.plain))
            for name, reversible_stack in taken.items()
            if reversible_stack.plain
        },
        keeps=tuple(_outside(model, "", inside)),
        kept_bytes={name: size for name, size in saved.items() if name not in taken},
        activations=sum(saved.get(name, 0) for name in taken) / sum(saved.values()) if saved else None,
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


def _segments(model: nn.Module) -> Iterator[tuple[str, ReversibleStack]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for layer in module:
                placement = layer.placement() if isinstance(layer, ReversibleLayer) else None
                if placement is not None:
                    yield name, placement.reversible_stack
                    break


def _outside(module: nn.Module, name: str, inside: set[nn.Parameter]) -> Iterator[str]:
    """Names of the outermost modules with parameters, none of which lies in a rebuilt layer."""
    own = set(module.parameters())
    if own and not own & inside:
        yield name
        return
    for child, each in module.named_children():
        if not isinstance(module, ReversibleLayer):
            yield from _outside(each, f"{name}.{child}" if name else child, inside)
