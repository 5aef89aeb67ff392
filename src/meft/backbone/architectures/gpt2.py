"""GPT-2 and relatives: norms before, dropout inside attention and feed-forward, cross-attention in decoders."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Architecture, arguments, rows
from .residual import Sublayer, two_residuals

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


LAYER = Architecture(
    feed_forward_entry="mlp",
    feed_forward_exit="mlp.c_proj",
    attention_exit="attn.c_proj",
    attention_block=attention_block,
    feed_forward_block=feed_forward_block,
    children=frozenset({"ln_1", "attn", "ln_2", "mlp", "ln_cross_attn", "crossattention"}),
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
