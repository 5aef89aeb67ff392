"""BERT and RoBERTa: post-norm, dropout as modules (transformers `BertLayer`, `RobertaLayer`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.pytorch_utils import apply_chunking_to_forward

from .base import Architecture


def attention_block(
    layer: Any,
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Tensor:
    hidden, _ = layer.attention(hidden, attention_mask, past_key_values=past_key_values, **kwargs)
    if layer.is_decoder and encoder_hidden_states is not None:
        hidden, _ = layer.crossattention(
            hidden, None, encoder_hidden_states, encoder_attention_mask, past_key_values=past_key_values, **kwargs
        )
    return hidden


def feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    return apply_chunking_to_forward(layer.feed_forward_chunk, layer.chunk_size_feed_forward, layer.seq_len_dim, hidden)


LAYER = Architecture(
    feed_forward_entry="intermediate",
    feed_forward_exit="output.dense",
    attention_exit="attention.output.dense",
    attention_block=attention_block,
    feed_forward_block=feed_forward_block,
)
