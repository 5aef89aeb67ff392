"""Granite: as Llama, both outputs multiplied by a constant before the residual; its mixtures of experts likewise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .base import rows
from .residual import Sublayer, two_residuals

_ATTENTION = Sublayer(("self_attn",), before="input_layernorm", after=("residual_multiplier",))


def shared_feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    """Experts, and beside them a feed-forward that every token takes (none in some layers)."""
    normed = layer.post_attention_layernorm(hidden)
    output = layer.block_sparse_moe(normed)
    if layer.shared_mlp is not None:
        output = output + layer.shared_mlp(normed)
    return hidden + output * layer.residual_multiplier


LAYER = two_residuals(_ATTENTION, Sublayer(("mlp",), before="post_attention_layernorm", after=("residual_multiplier",)))
MOE_LAYER = two_residuals(
    _ATTENTION, Sublayer(("block_sparse_moe",), before="post_attention_layernorm", after=("residual_multiplier",))
)
SHARED_MOE_LAYER = replace(
    MOE_LAYER, feed_forward_block=shared_feed_forward_block, children=MOE_LAYER.children | {"shared_mlp"}
)
MINICPM_LAYER = two_residuals(
    Sublayer(("self_attn",), before="input_layernorm", after=("residual_scale",)),
    Sublayer(("mlp",), before="post_attention_layernorm", after=("residual_scale",)),
)

ROWS = {
    **rows(
        LAYER,
        "GraniteDecoderLayer",
        "Granite4VisionTextDecoderLayer",
        "GraniteDoclingTextDecoderLayer",
        "GraniteSWADecoderLayer",
    ),
    "GraniteMoeDecoderLayer": MOE_LAYER,
    **rows(SHARED_MOE_LAYER, "GraniteMoeSharedDecoderLayer", "GraniteMoeSWADecoderLayer"),
    "MiniCPM3DecoderLayer": MINICPM_LAYER,
}
