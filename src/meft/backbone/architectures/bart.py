"""BART, Marian and relatives: norms after the residuals, functional dropout, cross-attention in the decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .base import Architecture, arguments, dropped, named, rows


def encoder_attention_block(layer: Any, hidden: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
    attended, _ = layer.self_attn(hidden, attention_mask=attention_mask, **kwargs)
    return layer.self_attn_layer_norm(hidden + dropped(layer, attended, layer.dropout))


def decoder_attention_block(
    layer: Any,
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = True,
    **kwargs: Any,
) -> Tensor:
    attended, _ = layer.self_attn(hidden, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)
    hidden = layer.self_attn_layer_norm(hidden + dropped(layer, attended, layer.dropout))
    if encoder_hidden_states is None:
        return hidden
    attended, _ = layer.encoder_attn(
        hidden,
        key_value_states=encoder_hidden_states,
        attention_mask=encoder_attention_mask,
        past_key_values=past_key_values,
        **kwargs,
    )
    return layer.encoder_attn_layer_norm(hidden + dropped(layer, attended, layer.dropout))


def weights_decoder_attention_block(
    layer: Any,
    hidden: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """TrOCR returns a tuple, with the attention weights if asked for."""
    given = named(layer, arguments(layer, args, kwargs))
    given.pop("use_cache")
    encoder, mask = (given.pop(name) for name in ("encoder_hidden_states", "encoder_attention_mask"))
    attended, weights = layer.self_attn(hidden, **given)
    hidden, crossed = layer.self_attn_layer_norm(hidden + dropped(layer, attended, layer.dropout)), None
    if encoder is not None:
        attended, crossed = layer.encoder_attn(hidden, key_value_states=encoder, **{**given, "attention_mask": mask})
        hidden = layer.encoder_attn_layer_norm(hidden + dropped(layer, attended, layer.dropout))
    return (hidden, weights, crossed) if given["output_attentions"] else (hidden,)


def decoder_feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    inner = dropped(layer, layer.activation_fn(layer.fc1(hidden)), layer.activation_dropout)
    return layer.final_layer_norm(hidden + dropped(layer, layer.fc2(inner), layer.dropout))


def encoder_feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    hidden = decoder_feed_forward_block(layer, hidden)
    # As the pretrained layer: float16 activations that overflowed are clamped.
    if hidden.dtype == torch.float16 and not torch.isfinite(hidden).all():
        largest = torch.finfo(hidden.dtype).max - 1000
        hidden = torch.clamp(hidden, min=-largest, max=largest)
    return hidden


ENCODER_LAYER = Architecture(
    feed_forward_entry="fc1",
    feed_forward_exit="fc2",
    attention_exit="self_attn.out_proj",
    attention_block=encoder_attention_block,
    feed_forward_block=encoder_feed_forward_block,
    children=frozenset({"self_attn", "self_attn_layer_norm", "activation_fn", "fc1", "fc2", "final_layer_norm"}),
)

DECODER_LAYER = replace(
    ENCODER_LAYER,
    attention_block=decoder_attention_block,
    feed_forward_block=decoder_feed_forward_block,
    children=ENCODER_LAYER.children | {"encoder_attn", "encoder_attn_layer_norm"},
)
WEIGHTS_DECODER_LAYER = replace(DECODER_LAYER, attention_block=weights_decoder_attention_block)

ROWS = {
    **rows(
        ENCODER_LAYER,
        "BartEncoderLayer",
        "BlenderbotSmallEncoderLayer",
        "InformerEncoderLayer",
        "MarianEncoderLayer",
        "PLBartEncoderLayer",
        "TimeSeriesTransformerEncoderLayer",
    ),
    **rows(
        DECODER_LAYER,
        "BartDecoderLayer",
        "BlenderbotSmallDecoderLayer",
        "InformerDecoderLayer",
        "MarianDecoderLayer",
        "PLBartDecoderLayer",
        "TimeSeriesTransformerDecoderLayer",
    ),
    "TrOCRDecoderLayer": WEIGHTS_DECODER_LAYER,
}
