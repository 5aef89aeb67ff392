"""T5Gemma: four norms a layer as Gemma 2, two more around cross-attention in the decoder, and dropout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .base import arguments, rows
from .residual import Sublayer, two_residuals

_SELF = Sublayer(("self_attn",), before="pre_self_attn_layernorm", after=("post_self_attn_layernorm", "dropout"))
_CROSS = Sublayer(("cross_attn",), before="pre_cross_attn_layernorm", after=("post_cross_attn_layernorm", "dropout"))
_FEED_FORWARD = Sublayer(("mlp",), before="pre_feedforward_layernorm", after=("post_feedforward_layernorm", "dropout"))
_CROSS_ONLY = ("encoder_hidden_states", "encoder_attention_mask")
_SELF_ONLY = ("position_embeddings", "position_ids")


def decoder_attention_block(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    given = arguments(layer, args, kwargs)
    cache = given["past_key_values"]
    own = {name: value for name, value in given.items() if name not in _CROSS_ONLY}
    own["past_key_values"] = None if cache is None else cache.self_attention_cache
    hidden, _ = _SELF.run(layer, hidden, own)
    crossed = {name: value for name, value in given.items() if name not in _SELF_ONLY}
    crossed["attention_mask"] = crossed.pop("encoder_attention_mask")
    return _CROSS.run(layer, hidden, crossed)[0]


ENCODER_LAYER = two_residuals(_SELF, _FEED_FORWARD)
DECODER_LAYER = replace(
    ENCODER_LAYER, attention_block=decoder_attention_block, children=ENCODER_LAYER.children | _CROSS.children
)

ROWS = {
    **rows(ENCODER_LAYER, "T5Gemma2DecoderLayer", "T5Gemma2EncoderLayer", "T5GemmaEncoderLayer"),
    "T5GemmaDecoderLayer": DECODER_LAYER,
}
