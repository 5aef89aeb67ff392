"""ALBERT: norms after the residuals, a feed-forward in two children; the model runs the same layers repeatedly."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.pytorch_utils import apply_chunking_to_forward

from .base import Architecture


def attention_block(layer: Any, hidden: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    hidden, _ = layer.attention(hidden, attention_mask, **kwargs)
    return hidden


def feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    output = apply_chunking_to_forward(layer.ff_chunk, layer.chunk_size_feed_forward, layer.seq_len_dim, hidden)
    return layer.full_layer_layer_norm(output + hidden)


LAYER = Architecture(
    feed_forward_entry="ffn",
    feed_forward_exit="ffn_output",
    attention_exit="attention.dense",
    attention_block=attention_block,
    feed_forward_block=feed_forward_block,
    children=frozenset({"attention", "ffn", "activation", "ffn_output", "full_layer_layer_norm", "dropout"}),
)
ROWS = {"AlbertLayer": LAYER}
