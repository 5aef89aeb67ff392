"""BERT, RoBERTa, ELECTRA and relatives: residuals and norms inside the sublayers, the feed-forward in two children."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import apply_chunking_to_forward

from .base import Architecture, arguments, named, rows
from .stages import Given, Replaced, Stages, attended, ordinary


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


def _before(layer: Any, hidden: Tensor, given: Given, shape: torch.Size, part: slice) -> tuple[Tensor, ...]:
    inner = layer.attention.self
    return inner.query(hidden), inner.key(hidden), inner.value(hidden)


def _attend(layer: Any, boundary: tuple[Tensor, ...], given: Given) -> Tensor:
    inner = layer.attention.self
    further = {name: value for name, value in given.items() if name not in _NAMED}
    width, dropout = inner.attention_head_size, inner.dropout.p
    return attended(inner, boundary, given.get("attention_mask"), width=width, dropout=dropout, **further)


def _after(layer: Any, hidden: Tensor, o: Tensor) -> Tensor:
    return layer.attention.output(o, hidden)


_NAMED = ("attention_mask", "encoder_hidden_states", "encoder_attention_mask", "past_key_values")
_STAGED = (
    "Bert",
    "BertGeneration",
    "Camembert",
    "Data2VecText",
    "Electra",
    "Ernie",
    "RoCBert",
    "Roberta",
    "XLMRoberta",
)
STAGES = Stages(
    _before,
    _attend,
    _after,
    ordinary,
    {
        "attention": Replaced(frozenset(f"{name}Attention" for name in _STAGED), frozenset({"self", "output"})),
        "attention.self": Replaced(
            frozenset(f"{name}SelfAttention" for name in _STAGED), frozenset({"query", "key", "value", "dropout"})
        ),
    },
)
LAYER = Architecture(
    feed_forward_entry="intermediate",
    feed_forward_exit="output.dense",
    attention_exit="attention.output.dense",
    attention_block=attention_block,
    feed_forward_block=feed_forward_block,
    children=frozenset({"attention", "crossattention", "intermediate", "output"}),
    stages=STAGES,
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
