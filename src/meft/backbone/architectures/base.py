"""The record of facts about one family of layers, and what the families' blocks share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .stages import Stages


@dataclass(frozen=True)
class Architecture:
    """Facts about one class of pretrained layers; module names are relative to the layer, "-1" is the last of a list.

    Attributes:
        feed_forward_entry: module whose input is what the feed-forward receives.
        feed_forward_exit: module whose output is what the feed-forward computes, before dropout and residual.
        attention_exit: module whose output is what the self-attention computes, before dropout and residual.
        attention_block: (layer, hidden, *args, **kwargs of the layer) -> hidden after attention, its residual and its
            norm; cross-attention belongs to it. Where the layer returns a tuple it returns the same tuple, with this
            hidden state first.
        feed_forward_block: (layer, hidden) -> hidden after the feed-forward, its residual and its norm. One block
            after the other computes what the layer computes, bit for bit.
        children: names of all children that a layer of this class may have; a layer with another one is not split,
            since the blocks would leave it out.
        refuses: (layer) -> why this layer of the class does not split, or None if it does.
        halves: the two blocks as `residual.Sublayer`s, where they are, for the stages of the layer.
        withheld: arguments of the layer that its attention does not get.
        stages: how the layer runs in stages, where `halves` and the table of attentions do not say it.
        extras: whether its attention gets the arguments that its `forward` does not name.
    """

    feed_forward_entry: str
    feed_forward_exit: str
    attention_exit: str
    attention_block: Callable[..., Any]
    feed_forward_block: Callable[[Any, Tensor], Tensor]
    children: frozenset[str]
    refuses: Callable[[Any], str | None] = lambda layer: None
    halves: tuple[Any, Any] | None = None
    withheld: tuple[str, ...] = ()
    extras: bool = True
    stages: Stages | None = None


def rows(architecture: Architecture, *layers: str) -> dict[str, Architecture]:
    """One row of the table for each of the layer classes that share a layout."""
    return dict.fromkeys(layers, architecture)


def dropped(layer: nn.Module, hidden: Tensor, probability: float) -> Tensor:
    """Functional dropout under the layer's training flag."""
    return nn.functional.dropout(hidden, p=probability, training=layer.training)


def arguments(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a layer was called with besides the hidden state, by name, with the defaults of the layer's `forward`.

    Models pass the same argument by position or by name, and leave out what has a default.
    """
    names, defaults = _parameters(inspect.unwrap(type(layer).forward))
    return {**defaults, **dict(zip(names[1:], args, strict=False)), **kwargs}


def parameter_names(layer: nn.Module) -> tuple[str, ...]:
    """The names of the arguments that a layer's `forward` takes by position, the hidden state's first."""
    return _parameters(inspect.unwrap(type(layer).forward))[0]


def named(layer: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the layer's `forward` names; some layers keep the others from their attention."""
    names = parameter_names(layer)[1:]
    return {name: value for name, value in given.items() if name in names}


def _parameters(forward: Callable[..., Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    # A compiler traces the inspection once, and warns of caches.
    return _inspected(forward) if torch.compiler.is_compiling() else _cached(forward)


def _inspected(forward: Callable[..., Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names (the hidden state's first) and defaults (without its own) of the parameters of a layer's `forward`."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    by_name = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    rest = by_name[1:]
    defaults = {parameter.name: parameter.default for parameter in rest if parameter.default is not parameter.empty}
    return tuple(parameter.name for parameter in by_name), defaults


_cached = cache(_inspected)
