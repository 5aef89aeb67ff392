"""Activation checkpointing that others switch on around layers: taken off where it is redundant, else run as it must.

A reversible layer keeps no activations, so checkpointing it saves nothing and runs it a third time. Three ways to
switch it on are met: Transformers' flags on layers and on modules inside them (`gradient_checkpointing`), PyTorch's
wrapper modules (`checkpoint_wrapper`, `offload_wrapper`), and functions called inside a layer, which stay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from meft.errors import MeftWarning

from .compilation import uncompiled

FLAG = "gradient_checkpointing"
_WRAPPED = "_checkpoint_wrapped_module"


def inside(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` or activation wrappers were put around, or the module itself."""
    while True:
        inner = uncompiled(module)
        inner = inner._modules.get(_WRAPPED) or inner
        if inner is module:
            return module
        module = inner


def is_wrapped(module: nn.Module) -> bool:
    """Tells whether an activation wrapper stands around a module."""
    return _WRAPPED in uncompiled(module)._modules


def warn_dropped(layers: Sequence[str], wrapper: nn.Module) -> None:
    """Says once, for a stack, that activation wrappers were taken off its layers."""
    named = layers[0] if len(layers) == 1 else f"{layers[0]} and {len(layers) - 1} more"
    warnings.warn(
        f"{type(uncompiled(wrapper)).__name__} around {named} was taken off: a reversible layer keeps no activations, "
        "so that checkpointing or offloading them saves nothing. meft.restore gives back wrappers that were there "
        "before make_reversible; leave them out to be rid of this warning.",
        MeftWarning,
        stacklevel=3,
    )


def flagged(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those modules on which Transformers has switched gradient checkpointing on.

    T5's attention has a flag of its own, under which it makes a leaf that requires gradients out of its position bias.
    """
    return [module for module in modules if vars(module).get(FLAG)]


@contextmanager
def unflagged(module: nn.Module) -> Iterator[None]:
    """Runs a layer without the checkpointing that it would do by itself, since its caller does it."""
    if not vars(module).get(FLAG):
        yield
        return
    vars(module)[FLAG] = False
    try:
        yield
    finally:
        vars(module)[FLAG] = True


def checkpointed(
    checkpoint: Callable[..., Any],
    function: Callable[..., Any],
    hidden: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Runs function(hidden, args, kwargs) under a checkpointing function of either form.

    The reentrant form differentiates the arguments that it is given, and no others: a tensor that the function closes
    over would be followed into the graph outside, again in each layer and without end. So all tensors that require
    gradients are arguments, and all that are returned stand in one flat tuple.
    """
    leaves, structure = tree_flatten((args, list(kwargs.values())), is_leaf=lambda x: isinstance(x, MutableMapping))
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    shape: list[Any] = []

    def flat(hidden: Tensor, *given: Tensor) -> tuple[Any, ...]:
        filled = list(leaves)
        for slot, tensor in zip(slots, given, strict=True):
            filled[slot] = tensor
        args, values = tree_unflatten(filled, structure)
        results, shape[:] = _flattened(function(hidden, args, dict(zip(kwargs, values, strict=True))))
        return results

    results = checkpoint(flat, hidden, *(leaves[slot] for slot in slots))
    return tree_unflatten(list(results), shape[0])


def _flattened(output: Any) -> tuple[tuple[Any, ...], list[Any]]:
    results, structure = tree_flatten(output)
    return tuple(results), [structure]
