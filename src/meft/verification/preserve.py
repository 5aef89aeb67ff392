"""Leaves a model and the random generators as they were found, after it was run to look at it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy
import torch
from torch import nn

from meft.backbone.conversion import pretrained_of
from meft.backbone.plan import Plan
from meft.backbone.stack import ReversibleStack
from meft.engine.replay import RngState
from meft.engine.tape import version_of


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Puts back, on leaving, what running a model changes: training flags, buffers, random states.

    Gradients and weights are none of it: whoever runs the model must not write them.
    """
    modules = list(_modules(model))
    with ExitStack() as stack:
        stack.callback(_put_flags, modules, [_flags(module) for module in modules])
        for module in modules:
            stack.callback(_put_buffers, module, _buffers(module))
        for device in {parameter.device for parameter in model.parameters()}:
            stack.callback(RngState.take(device).put)
        stack.callback(random.setstate, random.getstate())
        stack.callback(numpy.random.set_state, numpy.random.get_state())
        yield


@contextmanager
def replaced(reversible_stacks: Sequence[ReversibleStack], change: Callable[[Plan], Plan]) -> Iterator[None]:
    """Runs stacks under changed plans."""
    plans = [reversible_stack.plan for reversible_stack in reversible_stacks]
    try:
        for reversible_stack, plan in zip(reversible_stacks, plans, strict=True):
            reversible_stack.plan = change(plan)
        yield
    finally:
        for reversible_stack, plan in zip(reversible_stacks, plans, strict=True):
            reversible_stack.plan = plan


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """All modules, and the pretrained layers behind wrappers that do not register them."""
    for module in model.modules():
        yield module
        if pretrained_of(module) is not module:
            yield pretrained_of(module)


_FLAGS = ("training", "gradient_checkpointing")


def _flags(module: nn.Module) -> dict[str, bool]:
    return {name: module.__dict__[name] for name in _FLAGS if name in module.__dict__}


def _put_flags(modules: list[nn.Module], flags: list[dict[str, bool]]) -> None:
    for module, values in zip(modules, flags, strict=True):
        for name in _FLAGS:
            if name in values:
                module.__dict__[name] = values[name]
            else:
                module.__dict__.pop(name, None)


Saved = dict[str, tuple[torch.Tensor | None, torch.Tensor | None, int]]


def _buffers(module: nn.Module) -> Saved:
    return {
        name: (buffer, None if buffer is None else buffer.clone(), 0 if buffer is None else version_of(buffer))
        for name, buffer in module._buffers.items()
    }


def _put_buffers(module: nn.Module, saved: Saved) -> None:
    module._buffers.clear()
    for name, (buffer, values, version) in saved.items():
        module._buffers[name] = buffer
        if buffer is not None and values is not None and version_of(buffer) != version:
            with torch.no_grad():
                buffer.copy_(values)
