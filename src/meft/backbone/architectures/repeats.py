"""The order in which a model runs the layers of a stack, where that is not once each, first to last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn


def albert(config: Any, name: str, depth: int) -> tuple[int, ...]:
    """ALBERT runs each group of `depth` layers several times; the groups share out `num_hidden_layers`.

    Args:
        config: an `AlbertConfig`.
        name: of the stack, "...albert_layer_groups.<group>.albert_layers".
        depth: number of layers of the group.
    """
    group = int(name.split(".")[-2])
    share = config.num_hidden_layers / config.num_hidden_groups
    times = sum(int(call / share) == group for call in range(config.num_hidden_layers))
    return tuple(range(depth)) * times


_ORDERS: dict[str, Callable[[Any, str, int], tuple[int, ...]]] = {"AlbertLayer": albert}


def order_of(layers: Sequence[nn.Module], config: Any, name: str) -> tuple[int, ...]:
    """Returns the index of the layer that each call of a forward pass runs."""
    known = _ORDERS.get(type(layers[0]).__name__)
    return tuple(range(len(layers))) if known is None else known(config, name, len(layers))
