"""BERT, RoBERTa, ELECTRA and relatives: residuals and norms inside the sublayers, the feed-forward in two children."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.pytorch_utils import apply_chunking_to_forward

from .base import Architecture, arguments, named, rows


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


def encoder_attention_block(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Of copies without a decoder, whose attention returns one tensor."""
    return layer.attention(hidden, **arguments(layer, args, kwargs))


def convbert_attention_block(
    layer: Any,
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    hidden = layer.attention(hidden, attention_mask, **kwargs)
    if layer.is_decoder and encoder_hidden_states is not None:
        hidden = layer.crossattention(
            hidden, encoder_attention_mask, encoder_hidden_states=encoder_hidden_states, **kwargs
        )
    return hidden


def weights_attention_block(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Of older copies, whose layers return the attention weights as well."""
    given = named(layer, arguments(layer, args, kwargs))
    encoder, mask = (given.pop(name, None) for name in ("encoder_hidden_states", "encoder_attention_mask"))
    outputs = layer.attention(hidden, **given)
    if encoder is None or not layer.is_decoder:
        return outputs
    crossed = layer.crossattention(outputs[0], **{**given, "attention_mask": mask, "encoder_hidden_states": encoder})
    return (crossed[0], *outputs[1:], *crossed[1:])


def esm_attention_block(
    layer: Any,
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Tensor:
    shared = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **kwargs}
    hidden = layer.attention(hidden, **shared)
    if layer.is_decoder and encoder_hidden_states is not None:
        hidden = layer.crossattention(
            hidden,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **shared,
        )
    return hidden


LAYER = Architecture(
    feed_forward_entry="intermediate",
    feed_forward_exit="output.dense",
    attention_exit="attention.output.dense",
    attention_block=attention_block,
    feed_forward_block=feed_forward_block,
    children=frozenset({"attention", "crossattention", "intermediate", "output"}),
)
# The norm stands inside `intermediate`, before its projection.
PRENORM_LAYER = replace(LAYER, feed_forward_entry="intermediate.dense")
# The norm stands between the blocks, in `feed_forward_chunk`.
XL_LAYER = replace(LAYER, children=LAYER.children | {"LayerNorm"})
ENCODER_LAYER = replace(LAYER, attention_block=encoder_attention_block, children=LAYER.children - {"crossattention"})
WEIGHTS_LAYER = replace(LAYER, attention_block=weights_attention_block)
CONVBERT_LAYER = replace(LAYER, attention_block=convbert_attention_block)
MEGATRON_LAYER = replace(WEIGHTS_LAYER, children=LAYER.children | {"ln"})
ESM_LAYER = replace(
    XL_LAYER,
    attention_block=esm_attention_block,
    feed_forward_block=lambda layer, hidden: layer.feed_forward_chunk(hidden),
)

ROWS = {
    **rows(
        LAYER,
        "BertGenerationLayer",
        "BertLayer",
        "BridgeTowerTextLayer",
        "CamembertLayer",
        "Data2VecTextLayer",
        "ElectraLayer",
        "ErnieLayer",
        "RoCBertLayer",
        "RobertaLayer",
        "XLMRobertaLayer",
    ),
    "RobertaPreLayerNormLayer": PRENORM_LAYER,
    "XLMRobertaXLLayer": XL_LAYER,
    **rows(
        ENCODER_LAYER,
        "AlignTextLayer",
        "AltRobertaLayer",
        "ChineseCLIPTextLayer",
        "ClapTextLayer",
        "LayoutLMLayer",
        "MarkupLMLayer",
        "SplinterLayer",
    ),
    **rows(
        WEIGHTS_LAYER,
        "NystromformerLayer",
        "RemBertLayer",
        "RoFormerLayer",
        "TapasLayer",
        "VisualBertLayer",
        "YosoLayer",
    ),
    "ConvBertLayer": CONVBERT_LAYER,
    "MegatronBertLayer": MEGATRON_LAYER,
    **rows(ESM_LAYER, "EsmLayer", "EvollaSaProtLayer"),
}
