"""DeBERTa, DeBERTa-v2 and MPNet: laid out as BERT, relative positions handed to the attention, weights returned."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .base import Architecture, arguments, named, rows
from .stages import Given, Replaced, Stages, ordinary


def attention_block(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return layer.attention(hidden, **named(layer, arguments(layer, args, kwargs)))


def feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    return layer.output(layer.intermediate(hidden), hidden)


LAYER = Architecture(
    feed_forward_entry="intermediate",
    feed_forward_exit="output.dense",
    attention_exit="attention.output.dense",
    attention_block=attention_block,
    feed_forward_block=feed_forward_block,
    children=frozenset({"attention", "intermediate", "output"}),
)


def _mpnet_before(layer: Any, hidden: Tensor, given: Given, shape: torch.Size, part: slice) -> tuple[Tensor, ...]:
    inner = layer.attention.attn
    return inner.q(hidden), inner.k(hidden), inner.v(hidden)


def _mpnet_attend(layer: Any, boundary: tuple[Tensor, ...], given: Given) -> Tensor:
    inner = layer.attention.attn
    q, k, v = (part.view(*part.shape[:-1], -1, inner.attention_head_size).transpose(1, 2) for part in boundary)
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(inner.attention_head_size)
    # Each may be None.
    for added in (given.get("position_bias"), given.get("attention_mask")):
        scores = scores if added is None else scores + added
    o = torch.matmul(inner.dropout(nn.functional.softmax(scores, dim=-1)), v)
    return o.transpose(1, 2).flatten(2)


def _mpnet_after(layer: Any, hidden: Tensor, o: Tensor) -> Tensor:
    attention = layer.attention
    return attention.LayerNorm(attention.dropout(attention.attn.o(o)) + hidden)


MPNET_STAGES = Stages(
    _mpnet_before,
    _mpnet_attend,
    _mpnet_after,
    ordinary,
    {
        "attention": Replaced(frozenset({"MPNetAttention"}), frozenset({"attn", "LayerNorm", "dropout"})),
        "attention.attn": Replaced(frozenset({"MPNetSelfAttention"}), frozenset({"q", "k", "v", "o", "dropout"})),
    },
    returns_tuple=True,
)
MPNET_LAYER = replace(LAYER, attention_exit="attention.attn.o", stages=MPNET_STAGES)

ROWS = {**rows(LAYER, "DebertaLayer", "DebertaV2Layer"), "MPNetLayer": MPNET_LAYER}
