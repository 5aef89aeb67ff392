"""Moonshine's decoder: as Llama, with cross-attention between attention and feed-forward (its encoder is as Llama)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .base import arguments, rows
from .residual import Sublayer, two_residuals

_SELF = Sublayer(("self_attn",), before="input_layernorm")
_CROSS = Sublayer(("encoder_attn",), before="post_attention_layernorm")
_OF_ENCODER = ("encoder_hidden_states", "encoder_attention_mask", "encoder_position_ids", "encoder_position_embeddings")


def attention_block(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    given = arguments(layer, args, kwargs)
    encoder, mask, *_ = (given.pop(name) for name in _OF_ENCODER)
    hidden, _ = _SELF.run(layer, hidden, given)
    if encoder is None:
        return hidden
    crossed = {name: given[name] for name in ("past_key_values", "use_cache")}
    return _CROSS.run(layer, hidden, {"key_value_states": encoder, "attention_mask": mask, **crossed})[0]


_ALONE = two_residuals(_SELF, Sublayer(("mlp",), before="final_layernorm"))
DECODER_LAYER = replace(_ALONE, attention_block=attention_block, children=_ALONE.children | _CROSS.children)

ROWS = rows(DECODER_LAYER, "MoonshineDecoderLayer", "MoonshineStreamingDecoderLayer")
