"""One call of a layer: what the model's loop hands to it, and what it hands back besides the hidden state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.utils import logging
from transformers.utils.output_capturing import _active_collector

from meft.engine.engine import Function
from meft.errors import UnsupportedModelError

from .architectures.base import parameter_names

logger = logging.get_logger(__name__)

Block = Callable[..., Any]
"""(hidden state, args, kwargs) -> what the layer returns: a hidden state, or a tuple or list that begins with one."""

_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache_params")


class OtherShapeError(UnsupportedModelError):
    """A layer returned a hidden state of another shape than it was given."""


class CallArguments:
    """The arguments of one call, and the outputs of its blocks other than the hidden state.

    A block may also write into a mapping that it is handed (keys and values that later layers read), and Transformers
    may record tensors from inside it (attention weights, router logits). Both are outputs too: a block runs twice, and
    what it leaves behind must come from the autograd node, once.

    Args:
        args: positional arguments after the hidden state.
        kwargs: keyword arguments.
        name: what messages call the layer.
        hidden: the hidden state; where it is an argument once more (as keys and values), the block is given the one
            that it is run on there too.

    Attributes:
        outside: the tensors among the arguments that require gradients.
        tensors: all tensors among them.
    """

    def __init__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str, hidden: Tensor | None = None
    ) -> None:
        self.name = name
        self._mappings = {key: value for key, value in kwargs.items() if isinstance(value, MutableMapping)}
        opened = {**kwargs, **{key: dict(value) for key, value in self._mappings.items()}}
        self._leaves, self._structure = tree_flatten((args, opened))
        self._same = [i for i, leaf in enumerate(self._leaves) if hidden is not None and leaf is hidden]
        for slot in self._same:
            self._leaves[slot] = None  # the node must not keep it
        self._slots = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        self.outside = tuple(self._leaves[slot] for slot in self._slots)
        self.tensors = tuple(leaf for leaf in self._leaves if isinstance(leaf, Tensor))
        self._recording = _recorded()
        self._fixed = not self.outside and not self._same and all(map(_is_fixed, (*args, *kwargs.values())))
        self._args, self._kwargs = ((), {}) if self._same else (args, kwargs)
        self._further: dict[str, list[int]] = {}
        self._left: list[tuple[list[Any], Any, list[int]]] = []

    def function(self, name: str, block: Block, *, main: bool = True) -> Function:
        """Makes the engine's function of a block; only the `main` one decides what the layer returns."""

        def function(hidden: Tensor, outside: Sequence[Tensor]) -> tuple[Tensor, ...]:
            args, kwargs = self.arguments(hidden, outside)
            before = {key: dict(kwargs[key]) for key in self._mappings}
            with _private_recording(self._recording) as recorded:
                output = block(hidden, args, kwargs)
            value, rest = split_output(output, hidden, self.name)
            if rest is None and not self._mappings and not self._recording:
                return (value,)
            written = {key: _changed(kwargs[key], entries) for key, entries in before.items()}
            leaves, structure = tree_flatten((rest if main else None, written, recorded()))
            first = name not in self._further
            if first:
                self._further[name] = [
                    i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad
                ]
            slots = self._further[name]
            further = tuple(leaves[slot] for slot in slots)
            if first:
                self._refuse_second_state(hidden, rest)
                self._left.append(([None if i in slots else leaf for i, leaf in enumerate(leaves)], structure, slots))
            return value, *further

        return function

    def return_tuple(self) -> None:
        """Lets the layer return the hidden state as a tuple of one, where no block says what it returns."""
        self._left.append((*tree_flatten(((), {}, {})), []))

    def output(self, visible: Tensor, further: Sequence[Tensor]) -> Any:
        """What the layer returns: its own structure around `visible`; hands on what blocks wrote and recorded."""
        result: Any = visible
        given = iter(further)
        for leaves, structure, slots in self._left:
            for slot in slots:
                leaves[slot] = next(given)
            rest, written, recorded = tree_unflatten(leaves, structure)
            if rest is not None:
                result = type(rest)((visible, *rest))
            for key, values in written.items():
                self._mappings[key].update(values)
            collector = _active_collector.get() or {}
            for key, values in recorded.items():
                collector[key].extend(values)
        # The node lives on until the backward pass; what it returned must not live on with it.
        self._left.clear()
        return result

    @property
    def plain(self) -> bool:
        """Whether blocks have nowhere to leave anything, and read the hidden state as their first argument alone."""
        return not self._mappings and not self._recording and not self._same

    def arguments(self, hidden: Tensor | None, outside: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments after the hidden state, with other tensors in the place of it and of the outside ones."""
        if self._fixed:
            return self._args, dict(self._kwargs)
        leaves = list(self._leaves)
        for slot, tensor in zip(self._slots, outside, strict=True):
            leaves[slot] = tensor
        for slot in self._same:
            leaves[slot] = hidden
        args, kwargs = tree_unflatten(leaves, self._structure)
        for key, mapping in self._mappings.items():
            fresh = copy.copy(mapping)
            fresh.clear()
            fresh.update(kwargs[key])
            kwargs[key] = fresh
        return args, kwargs

    def _refuse_second_state(self, hidden: Tensor, rest: Any) -> None:
        """A layer that hands on two hidden states would send one of them around the coupling."""
        for leaf in tree_flatten(rest)[0]:
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape == hidden.shape:
                raise UnsupportedModelError(
                    f"{self.name} returns a second tensor of the hidden state's shape {tuple(hidden.shape)}, which the "
                    "next layer would receive past the coupling. Layers with several hidden states cannot be made "
                    "reversible. Leave this stack out with stacks=[...]."
                )


def split_output(output: Any, hidden: Tensor, name: str) -> tuple[Tensor, tuple[Any, ...] | list[Any] | None]:
    """Splits what a layer returned into the hidden state and the rest (None where it returned the former alone).

    Raises:
        UnsupportedModelError: there is no hidden state first, or it has another shape than the one that went in.
    """
    rest = None
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        output, rest = output[0], output[1:]
    if not isinstance(output, Tensor):
        raise UnsupportedModelError(
            f"{name} returns a {type(output).__name__} where a reversible stack needs the hidden state: a tensor, or a "
            "tuple that begins with it. Leave this stack out with stacks=[...]."
        )
    if output.shape != hidden.shape:
        raise OtherShapeError(
            f"{name} was given a hidden state of shape {tuple(hidden.shape)} and returned one of shape "
            f"{tuple(output.shape)}. The streams of a reversible stack are added, so its layers must all have one "
            "width. Leave this stack out with stacks=[...]."
        )
    return output, rest


def split_hidden(
    layer: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Splits the arguments of a layer into the hidden state and the rest.

    Raises:
        UnsupportedModelError: the layer is called without a tensor as its first argument.
    """
    rest = dict(kwargs)
    if args:
        hidden, args = args[0], args[1:]
    else:
        hidden = rest.pop(next(iter(parameter_names(layer)), ""), None)
    if not isinstance(hidden, Tensor):
        raise UnsupportedModelError(
            f"{name}, a {type(layer).__name__}, is called with a {type(hidden).__name__} as its first argument, where "
            "a reversible stack needs the hidden state, a tensor."
        )
    return hidden, args, rest


def without_cache(
    layer: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Takes the key-value cache out of a training call, as Transformers does under gradient checkpointing.

    Args:
        layer: the pretrained layer, whose signature names the positional arguments.
        name: what messages call it.
        args: positional arguments after the hidden state.
        kwargs: keyword arguments.

    Raises:
        UnsupportedModelError: the cache holds something, which the layer would have read.
    """
    positions = dict(zip(parameter_names(layer)[1:], range(len(args)), strict=False))
    given = {**{key: args[position] for key, position in positions.items()}, **kwargs}
    caches = {key: given[key] for key in _CACHE_ARGUMENTS if given.get(key) is not None}
    if not caches and not given.get("use_cache"):
        return args, kwargs
    for key, cache in caches.items():
        length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        if int(length) > 0:
            raise UnsupportedModelError(
                f"{name} was called in training with {key} holding {int(length)} tokens (prefix tuning, or a cache "
                "from a generation). A rebuilt layer would read another cache than the original. Train without a cache."
            )
    logger.warning_once(
        "A key-value cache is of no use in training with reversible layers: use_cache was switched off."
    )
    changed: dict[str, Any] = dict.fromkeys(caches)
    if "use_cache" in given:
        changed["use_cache"] = False
    moved = [changed.pop(key, args[position]) for key, position in positions.items()]
    return (*moved, *args[len(moved) :]), {**kwargs, **changed}


def requiring(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tells whether any tensor among the arguments requires gradients."""
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_flatten((args, dict(kwargs)))[0])


def recording() -> bool:
    """Tells whether Transformers records hidden states or other outputs of the running call."""
    return bool(_active_collector.get())


@contextmanager
def recording_off() -> Iterator[None]:
    """Lets a compiler trace the hooks with which Transformers records, as ones that record nothing.

    They ask a context variable, which no compiler traces, unless they are told that one is at work. Transformers tells
    all threads at once, and so does this: outputs are not recorded in one thread while another trains compiled layers.
    """
    before = _active_collector.compiling, _active_collector.global_var
    _active_collector.compiling, _active_collector.global_var = True, None
    try:
        yield
    finally:
        _active_collector.compiling, _active_collector.global_var = before


def _recorded() -> dict[str, int]:
    """What Transformers records now, and how much of each it has."""
    collector = _active_collector.get() or {}
    return {key: len(values) for key, values in collector.items() if isinstance(values, list)}


@contextmanager
def _private_recording(lengths: Mapping[str, int]) -> Iterator[Callable[[], dict[str, list[Any]]]]:
    """Lets Transformers record a block's tensors aside; what it yields returns those of the block."""
    if not lengths:
        yield dict
        return
    private: dict[str, list[Any]] = {key: [None] * length for key, length in lengths.items()}
    token = _active_collector.set(private)
    try:
        yield lambda: {key: values[lengths[key] :] for key, values in private.items()}
    finally:
        _active_collector.reset(token)


def _is_fixed(value: Any) -> bool:
    """Tells whether a block cannot change an argument, other than a tensor, for the block that runs after it."""
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _changed(mapping: Mapping[Any, Any], before: Mapping[Any, Any]) -> dict[Any, Any]:
    """The entries that were added to a mapping or replaced."""
    return {key: value for key, value in mapping.items() if key not in before or value is not before[key]}
