"""DeBERTa, DeBERTa-v2 and MPNet: laid out as BERT, relative positions handed to the attention, weights returned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .base import Architecture, arguments, named, rows


def attention_block(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return layer.attention(hidden, **named(layer, arguments(layer, args, kwargs)))


def feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    return layer.output(layer.intermediate(hidden), hidden)


LAYER = Architecture(
    feed_forward_entry="intermediate",
    feed_forward_exit="output.dense",
    attention_exit="attention.output.dense",
    attention_block=attention_block,
    feed_forward_block=feed_forward_block,
    children=frozenset({"attention", "intermediate", "output"}),
)
MPNET_LAYER = replace(LAYER, attention_exit="attention.attn.o")

ROWS = {**rows(LAYER, "DebertaLayer", "DebertaV2Layer"), "MPNetLayer": MPNET_LAYER}
