"""Llama 4: as Llama, but its mixtures of experts return the tokens of all sequences in one matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .base import Architecture
from .llama import ATTENTION
from .residual import Sublayer, two_residuals


def feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    output = layer.feed_forward(layer.post_attention_layernorm(hidden))
    if layer.is_moe_layer:
        output, _ = output
    return hidden + output.view(hidden.shape)


LAYER: Architecture = replace(
    two_residuals(
        ATTENTION, Sublayer(("feed_forward",), before="post_attention_layernorm"), withheld=("position_ids",)
    ),
    feed_forward_block=feed_forward_block,
)

ROWS = {"Llama4TextDecoderLayer": LAYER}
