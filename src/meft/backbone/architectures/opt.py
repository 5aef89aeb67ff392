"""OPT: pre-norm, and the post-norm layout of the 350m model (transformers `OPTDecoderLayer`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Architecture, dropped


def attention_block(
    layer: Any,
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    before = layer.do_layer_norm_before
    attended, _ = layer.self_attn(
        hidden_states=layer.self_attn_layer_norm(hidden) if before else hidden,
        past_key_values=past_key_values,
        position_ids=position_ids,
        attention_mask=attention_mask,
        **kwargs,
    )
    hidden = hidden + dropped(layer, attended, layer.dropout)
    return hidden if before else layer.self_attn_layer_norm(hidden)


def feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    before = layer.do_layer_norm_before
    # As the pretrained layer: tokens of all sequences in one matrix.
    tokens = hidden.reshape(-1, hidden.size(-1))
    inner = layer.activation_fn(layer.fc1(layer.final_layer_norm(tokens) if before else tokens))
    tokens = (tokens + dropped(layer, layer.fc2(inner), layer.dropout)).view(hidden.shape)
    return tokens if before else layer.final_layer_norm(tokens)


LAYER = Architecture(
    feed_forward_entry="fc1",
    feed_forward_exit="fc2",
    attention_exit="self_attn.out_proj",
    attention_block=attention_block,
    feed_forward_block=feed_forward_block,
    children=frozenset({"self_attn", "self_attn_layer_norm", "activation_fn", "fc1", "fc2", "final_layer_norm"}),
)

ROWS = {"OPTDecoderLayer": LAYER}
