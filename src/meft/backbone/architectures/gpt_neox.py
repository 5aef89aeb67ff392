"""GPT-NeoX, StableLM and Falcon where they compute attention and feed-forward one after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Architecture, arguments, dropped, named
from .parallel import by_residual, falcon
from .residual import Sublayer, two_residuals

LAYER = two_residuals(
    Sublayer(("attention",), before="input_layernorm", after=("post_attention_dropout",)),
    Sublayer(("mlp",), before="post_attention_layernorm", after=("post_mlp_dropout",)),
    refuses=by_residual,
)
STABLELM_LAYER = two_residuals(
    Sublayer(("self_attn",), before="input_layernorm"),
    Sublayer(("mlp",), before="post_attention_layernorm", after=("dropout",)),
    extras=False,
    refuses=by_residual,
)


def falcon_attention_block(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    given = named(layer, arguments(layer, args, kwargs))
    attended, weights = layer.self_attention(layer.input_layernorm(hidden), **given)
    return hidden + dropped(layer, attended, layer.config.attention_dropout), weights


def falcon_feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    output = layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden + dropped(layer, output, layer.config.hidden_dropout)


FALCON_LAYER = Architecture(
    feed_forward_entry="mlp",
    feed_forward_exit="mlp",
    attention_exit="self_attention",
    attention_block=falcon_attention_block,
    feed_forward_block=falcon_feed_forward_block,
    # Its parallel layouts have the two norms `ln_attn` and `ln_mlp`; they are refused, but get a parallel adapter.
    children=frozenset({"input_layernorm", "self_attention", "post_attention_layernorm", "mlp"}),
    refuses=falcon,
)

ROWS = {"FalconDecoderLayer": FALCON_LAYER, "GPTNeoXLayer": LAYER, "StableLmDecoderLayer": STABLELM_LAYER}
