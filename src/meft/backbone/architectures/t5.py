"""T5, mT5, UMT5 and relatives: norms and residuals inside the sublayers, position biases handed from layer to layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .base import Architecture, rows


def clamped(hidden: Tensor) -> Tensor:
    """As the pretrained layer: float16 activations that overflowed are clamped."""
    if hidden.dtype != torch.float16:
        return hidden
    largest = torch.finfo(hidden.dtype).max
    limit = torch.where(torch.isinf(hidden).any(), largest - 1000, largest)
    return torch.clamp(hidden, min=-limit, max=limit)


def attention_block(
    layer: Any,
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    encoder_decoder_position_bias: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    hidden, bias, _ = layer.layer[0](
        hidden,
        attention_mask=attention_mask,
        position_bias=position_bias,
        past_key_values=past_key_values,
        **kwargs,
    )
    hidden, cross_bias = clamped(hidden), None
    if layer.is_decoder and encoder_hidden_states is not None:
        hidden, cross_bias, _ = layer.layer[1](
            hidden,
            key_value_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            position_bias=encoder_decoder_position_bias,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden = clamped(hidden)
    return hidden, bias, cross_bias


def umt5_attention_block(
    layer: Any,
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Tensor:
    """UMT5 computes the biases in every layer anew."""
    hidden, _ = layer.layer[0](hidden, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)
    hidden = clamped(hidden)
    if layer.is_decoder and encoder_hidden_states is not None:
        hidden, _ = layer.layer[1](
            hidden,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden = clamped(hidden)
    return hidden


def feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    return clamped(layer.layer[-1](hidden))


LAYER = Architecture(
    feed_forward_entry="layer.-1.DenseReluDense",
    feed_forward_exit="layer.-1.DenseReluDense",
    attention_exit="layer.0.SelfAttention.o",
    attention_block=attention_block,
    feed_forward_block=feed_forward_block,
    children=frozenset({"layer"}),
)
SWITCH_LAYER = replace(LAYER, feed_forward_entry="layer.-1.mlp", feed_forward_exit="layer.-1.mlp")
UMT5_LAYER = replace(LAYER, attention_block=umt5_attention_block)

ROWS = {
    **rows(LAYER, "MT5Block", "Pop2PianoBlock", "T5Block", "UdopBlock"),
    "SwitchTransformersBlock": SWITCH_LAYER,
    "UMT5Block": UMT5_LAYER,
}
