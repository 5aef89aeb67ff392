"""GPT-2 and relatives: norms before, dropout inside attention and feed-forward, cross-attention in decoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Architecture, arguments, rows
from .residual import Sublayer, two_residuals
from .stages import Given, Replaced, Stages, attended, ordinary

_ATTENTION = Sublayer(("attn",), before="ln_1")
_FEED_FORWARD = Sublayer(("mlp",), before="ln_2")


def attention_block(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    given = arguments(layer, args, kwargs)
    encoder = {name: given.pop(name) for name in ("encoder_hidden_states", "encoder_attention_mask")}
    hidden, _ = _ATTENTION.run(layer, hidden, given)
    if encoder["encoder_hidden_states"] is None:
        return hidden
    attended, _ = layer.crossattention(
        layer.ln_cross_attn(hidden),
        past_key_values=given["past_key_values"],
        attention_mask=given["attention_mask"],
        **encoder,
    )
    return hidden + attended


def feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    return _FEED_FORWARD.run(layer, hidden, {})[0]


def _before(layer: Any, hidden: Tensor, given: Given, shape: torch.Size, part: slice) -> tuple[Tensor, ...]:
    return layer.attn.c_attn(_ATTENTION.enter(layer, hidden)).split(layer.attn.split_size, dim=2)


def _attend(layer: Any, boundary: tuple[Tensor, ...], given: Given) -> Tensor:
    inner = layer.attn
    further = {name: value for name, value in given.items() if name not in _NAMED}
    mask = given.get("attention_mask")
    return attended(inner, boundary, mask, width=inner.head_dim, dropout=inner.attn_dropout.p, **further)


def _after(layer: Any, hidden: Tensor, o: Tensor) -> Tensor:
    return _ATTENTION.leave(layer, hidden, layer.attn.resid_dropout(layer.attn.c_proj(o)))


def _reordered(layer: Any) -> str | None:
    return "reorder_and_upcast_attn asks for an attention of its own" if layer.attn.reorder_and_upcast_attn else None


_NAMED = (
    "attention_mask",
    "past_key_values",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "output_attentions",
    "use_cache",
)
_CHILDREN = frozenset({"c_attn", "c_proj", "attn_dropout", "resid_dropout"})
STAGES = Stages(
    _before, _attend, _after, ordinary, {"attn": Replaced(frozenset({"GPT2Attention"}), _CHILDREN)}, _reordered
)
LAYER = Architecture(
    feed_forward_entry="mlp",
    feed_forward_exit="mlp.c_proj",
    attention_exit="attn.c_proj",
    attention_block=attention_block,
    feed_forward_block=feed_forward_block,
    children=frozenset({"ln_1", "attn", "ln_2", "mlp", "ln_cross_attn", "crossattention"}),
    stages=STAGES,
)
# Without cross-attention, which they would call otherwise.
BIGCODE_LAYER = two_residuals(
    _ATTENTION,
    _FEED_FORWARD,
    attention_exit="attn.c_proj",
    feed_forward_exit="mlp.c_proj",
    withheld=("encoder_hidden_states", "encoder_attention_mask"),
)
NEO_LAYER = two_residuals(
    _ATTENTION,
    _FEED_FORWARD,
    attention_exit="attn.attention.out_proj",
    feed_forward_exit="mlp.c_proj",
    extras=False,
    returns_rest=True,
)

ROWS = {
    **rows(LAYER, "DecisionTransformerGPT2Block", "GPT2Block"),
    "GPTBigCodeBlock": BIGCODE_LAYER,
    "GPTNeoBlock": NEO_LAYER,
}
