"""Calls of pretrained layers as their own model makes them, and what the two blocks make of the same call."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from transformers import Cache, EncoderDecoderCache

from meft.backbone.architectures import architecture_of, split_of


@dataclass(frozen=True)
class Call:
    """One call of a layer, taken from a forward pass of its model."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def whole(self, seed: int = 0) -> Any:
        """What the layer itself returns, and what it left in a cache."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        torch.manual_seed(seed)
        return self.layer(*args, **kwargs), _cached(args, kwargs)

    def blocks(self, seed: int = 0) -> Any:
        """What the attention block returns, its hidden state replaced by what the feed-forward block makes of it."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        split = split_of(self.layer, "layer")
        torch.manual_seed(seed)
        attended = split.attention_block(self.layer, hidden, *rest, **kwargs)
        if isinstance(attended, tuple):
            return (split.feed_forward_block(self.layer, attended[0]), *attended[1:]), _cached(args, kwargs)
        return split.feed_forward_block(self.layer, attended), _cached(args, kwargs)


def calls(model: nn.Module, batch: Mapping[str, Any]) -> list[Call]:
    """Runs a model and returns the calls of its layers that the table knows.

    Of each class of layers the first and the last one, since embeddings, biases and experts make them differ.
    """
    found: dict[str, list[Call]] = {}

    def remember(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(type(layer).__name__, []).append(Call(layer, *copy.deepcopy((args, kwargs))))

    handles = [
        module.register_forward_pre_hook(remember, with_kwargs=True)
        for module in model.modules()
        if architecture_of(module) is not None
    ]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return [call for taken in found.values() for call in taken[:1] + taken[1:][-1:]]


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Two outputs are the same bit for bit, in the same structure."""
    leaves, structure = tree_flatten(actual)
    wanted, wanted_structure = tree_flatten(expected)
    assert structure == wanted_structure
    for leaf, want in zip(leaves, wanted, strict=True):
        assert type(leaf) is type(want)
        if isinstance(want, Tensor):
            assert leaf.dtype == want.dtype and torch.equal(leaf, want)


def cast(batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A batch whose floating-point inputs have another dtype."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, dict(batch))


def _cached(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Keys and values in the caches among the arguments of a call."""
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    parts = [
        part
        for cache in caches
        for part in (
            (cache.self_attention_cache, cache.cross_attention_cache)
            if isinstance(cache, EncoderDecoderCache)
            else (cache,)
        )
    ]
    filled = [layer for part in parts for layer in part.layers if getattr(layer, "keys", None) is not None]
    return [tensor for layer in filled for tensor in (layer.keys, layer.values)]
