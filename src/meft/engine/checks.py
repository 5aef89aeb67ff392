"""What must hold for a step to be rebuilt and differentiated, looked at before it is too late."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from meft.errors import DoubleBackwardError, MeftError, ModifiedTensorError, ReconstructionError, UnsupportedModelError

from .replay import Snapshot
from .routes import SideAttach
from .sharding import refuse_flat
from .tape import Tape, version_of

_REENTRANT = re.compile(r"use_reentrant=True|[Cc]heckpointing is not compatible with \.grad")
"""How PyTorch and FairScale say that their checkpointing was reached by something else than `.backward()`."""


def check_leaves(tape: Tape, values: tuple[Tensor, ...], known: tuple[Tensor, ...]) -> None:
    """Looks for tensors in a function's graph that require gradients and would get none."""
    names = {id(tensor) for tensor in known}
    above = {tensor.grad_fn for tensor in known if tensor.grad_fn is not None}
    for node in nodes_of(values, above):
        variable = getattr(node, "variable", None)
        left_behind = getattr(node, "_forward_cls", None) is SideAttach
        if left_behind or (isinstance(variable, Tensor) and id(variable) not in names):
            shape = tape.shape if left_behind or variable is None else variable.shape
            if variable is not None:
                refuse_flat(variable, tape.name)
            raise UnsupportedModelError(
                f"A layer of {tape.name} uses a tensor of shape {tuple(shape)} that requires "
                "gradients but is neither one of its parameters nor among its arguments (another module's weight, or "
                "something that an earlier layer or run left behind), so a reversible layer could not pass its "
                "gradient on. Freeze that tensor (requires_grad_(False)), leave this stack out with stacks=[...], or "
                'use backward="cached".'
            )


def versions_of(layer: Any) -> tuple[int, ...]:
    """Counts of in-place changes of everything that a layer reads: weights and buffers, frozen ones too, and inputs."""
    return tuple(map(version_of, (*_state(layer), *layer.inputs)))


def changes_of(layer: Any, before: tuple[int, ...], snapshot: Snapshot | None = None) -> str:
    """Says what of a layer had changed when it was run again, as far as PyTorch counts changes."""
    state_changed = snapshot.changed() if snapshot is not None else ""
    if state_changed:
        return f"{state_changed} changed in between"
    state, now = _state(layer), versions_of(layer)
    if len(now) != len(before):
        return "its weights were exchanged in between"
    changed = [index for index, (old, new) in enumerate(zip(before, now, strict=True)) if old != new]
    if not changed:
        return (
            "its program differs (hooks that came or went, random numbers from elsewhere, state of its own, a kernel "
            "that is not deterministic), or its weights were changed in a way that PyTorch does not count (.data, "
            "fused optimizers)"
        )
    what = "weights or buffers" if changed[0] < len(state) else "inputs"
    shape = tuple((*state, *layer.inputs)[changed[0]].shape)
    return f"its {what} were modified in place in between ({len(changed)}, the first of shape {shape})"


def _state(layer: Any) -> list[Tensor]:
    return [
        tensor
        for module in layer.modules
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]


def programs_of(values: tuple[Tensor, ...]) -> tuple[type, ...]:
    """The compiled programs that a function's values came from: each is a class of autograd functions of its own."""
    found = []
    for node in nodes_of(values):
        if type(node).__name__ == "CompiledFunctionBackward":
            found.append(type(node))
    return tuple(found)


def check_programs(tape: Tape, first: tuple[type, ...], second: tuple[type, ...]) -> None:
    """Raises ReconstructionError if the recomputation ran other compiled programs than the forward pass."""
    if first != second:
        raise ReconstructionError(
            f"Layer {tape.layer_of(tape.level)} of {tape.name} ran other compiled programs in the recomputation "
            f"({len(second)}) than in the forward pass ({len(first)}), which may round otherwise: one of them was "
            "compiled in between, for other shapes or settings. Compile whole layers after make_reversible "
            "(layer.compile()), or pass dynamic=True or dynamic=False where modules inside them are compiled. This "
            "step's gradients were not applied."
        )


def nodes_of(values: tuple[Tensor, ...], ends: Set[Any] = frozenset()) -> Iterator[Any]:
    """Every node of the graphs that end in some values, once, in an order that depends on the graphs alone.

    Neither what lies below `ends` nor what lies below the stream that a forward run read belongs to them.
    """
    pending = [value.grad_fn for value in values if value.grad_fn is not None]
    seen = {*pending, *ends}
    while pending:
        node = pending.pop()
        yield node
        if getattr(node, "_forward_cls", None) is SideAttach:
            continue
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                pending.append(child)


@contextmanager
def explained() -> Iterator[None]:
    """Says what an error of reentrant checkpointing means here.

    Raises:
        UnsupportedModelError: something inside a layer can be differentiated by `.backward()` alone.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, MeftError) or not _REENTRANT.search(str(error)):
            raise
        raise UnsupportedModelError(
            "A module inside a reversible layer runs under reentrant activation checkpointing (torch.utils.checkpoint "
            "with use_reentrant=True, or FairScale's checkpoint_wrapper), which calls backward() by itself and cannot "
            "be differentiated as a part of the layer. Use use_reentrant=False inside the layers, or leave it out: "
            "reversible layers keep no activations. This step's gradients were not applied."
        ) from error


def leads_to(later: Tensor, earlier: Tensor) -> bool:
    """Whether one tensor was computed from another, by their graph."""
    goal = earlier.grad_fn if earlier.grad_fn is not None else get_gradient_edge(earlier).node
    pending, seen = [get_gradient_edge(later).node], set()
    while pending:
        node = pending.pop()
        if node is goal:
            return True
        if node not in seen:
            seen.add(node)
            pending += [child for child, _ in node.next_functions if child is not None]
    return False


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
