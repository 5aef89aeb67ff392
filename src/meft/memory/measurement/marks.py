"""Marks: what a step is doing, said at the moment it does it, to whoever records its memory.

    forward 0.3            layer 3 of the first stack begins its forward pass
    forward 0.3 reversible the same, of a layer that rebuilds its activations
    forward end
    backward 0.3           the gradient of its output is there: it begins its backward pass (with its recomputation)
    backward end 0.3       the gradient of its input is there
    residue 94021:512 ...  address and bytes of what a reversible layer keeps
    gradient 94021:512     the same of a parameter's gradient, when it has been added up
    optimizer / optimizer end
    host / host end        what is allocated between them lies on the host, not on the device

`watched` puts hooks on a model's layers that say so. They are hooks on modules and on tensors, which wrap nothing, so
that the memory of the step stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from meft.backbone.conversion import find_stacks
from meft.backbone.layers import ReversibleLayer
from meft.engine.host import host_memory_within
from meft.engine.tape import residues_told_to
from meft.errors import UnsupportedModelError

FORWARD, FORWARD_END, BACKWARD, BACKWARD_END = "forward", "forward end", "backward", "backward end"
OPTIMIZER, OPTIMIZER_END, HOST, HOST_END = "optimizer", "optimizer end", "host", "host end"
RESIDUE, GRADIENT, REVERSIBLE = "residue", "gradient", "reversible"

# Not a context variable: autograd runs hooks of the backward pass on CUDA in threads of its own.
_LISTENERS: list[Callable[[str], None]] = []


def mark(name: str) -> None:
    """Says `name` to the recording that is running, if one is."""
    if _LISTENERS:
        _LISTENERS[-1](name)


@contextmanager
def marks_go_to(listener: Callable[[str], None]) -> Iterator[None]:
    """Lets `listener` hear every mark within."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


@contextmanager
def watched(
    model: nn.Module | None, parameters: Iterable[Tensor] = (), optimizer: torch.optim.Optimizer | None = None
) -> Iterator[None]:
    """Marks what the layers of `model` and the optimizer do within, and the gradients that `parameters` get."""
    with ExitStack() as stack:
        for name, layer in _layers(model):
            pre = layer.register_forward_pre_hook(_before(name), with_kwargs=True)
            stack.callback(pre.remove)
            stack.callback(layer.register_forward_hook(_after(name)).remove)
        for parameter in parameters:
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(_mark_gradient).remove)
        if optimizer is not None:
            stack.callback(optimizer.register_step_pre_hook(lambda *_: mark(OPTIMIZER)).remove)
            stack.callback(optimizer.register_step_post_hook(lambda *_: mark(OPTIMIZER_END)).remove)
        stack.enter_context(residues_told_to(_mark_residues))
        stack.enter_context(host_memory_within(on_host))
        yield


@contextmanager
def on_host() -> Iterator[None]:
    """Marks what is allocated within as lying on the host."""
    mark(HOST)
    try:
        yield
    finally:
        mark(HOST_END)


def _layers(model: nn.Module | None) -> list[tuple[str, nn.Module]]:
    if model is None:
        return []
    try:
        stacks = find_stacks(model)
    except UnsupportedModelError:
        return []
    return [(f"{s}.{i}", layer) for s, stack in enumerate(stacks) for i, layer in enumerate(stack.layers)]


def _before(name: str) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not _within_backward():
            mark(f"{FORWARD} {name} {REVERSIBLE}" if _is_reversible(layer) else f"{FORWARD} {name}")
            hidden = args[0] if args else kwargs.get("hidden_states")
            _when_differentiated(hidden, f"{BACKWARD_END} {name}")

    return hook


def _after(name: str) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple, output: Any) -> None:
        if not _within_backward():
            mark(FORWARD_END)
            _when_differentiated(output[0] if isinstance(output, tuple) else output, f"{BACKWARD} {name}")

    return hook


def _when_differentiated(tensor: Any, name: str) -> None:
    if isinstance(tensor, Tensor) and tensor.requires_grad:
        tensor.register_hook(lambda _: mark(name))


def _mark_gradient(parameter: Tensor) -> None:
    if parameter.grad is not None:
        mark(f"{GRADIENT} {_place(parameter.grad)}")


def _within_backward() -> bool:
    """Whether this is a recomputation, which belongs to the backward pass of its layer."""
    return torch._C._current_graph_task_id() != -1


def _is_reversible(layer: nn.Module) -> bool:
    placement = layer.placement() if isinstance(layer, ReversibleLayer) else None
    return (
        placement is not None
        and placement.reversible_stack.plan.coupling is not None
        and placement.reversible_stack.reversible(placement.reversible_stack.upcoming(placement.index))
    )


def _mark_residues(residues: Sequence[Tensor]) -> None:
    if residues:
        mark(f"{RESIDUE} {' '.join(map(_place, residues))}")


def places(name: str) -> dict[int, int]:
    """The addresses that a mark names, with their bytes."""
    pairs = (word.split(":") for word in name.split()[1:])
    return {int(address): int(size) for address, size in pairs}


def _place(tensor: Tensor) -> str:
    storage = tensor.untyped_storage()
    # Fake tensors have no address; their storage object stands for it.
    address = storage._cdata if storage.device.type == "meta" else storage.data_ptr()
    return f"{address}:{storage.nbytes()}"
