"""ViT, DeiT and relatives: a norm before attention and before the MLP, dropout after both."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Architecture, arguments, rows
from .residual import Sublayer, two_residuals

LAYER = two_residuals(
    Sublayer(("attention",), before="layernorm_before", after=("dropout",)),
    Sublayer(("mlp",), before="layernorm_after", after=("dropout",)),
)
PIXIO_LAYER = two_residuals(
    Sublayer(("attention",), before="layernorm_before", after=("dropout", "drop_path")),
    Sublayer(("mlp",), before="layernorm_after", after=("dropout", "drop_path")),
)


def yolos_feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    # `output` adds the residual.
    return layer.output(layer.intermediate(layer.layernorm_after(hidden)), hidden)


def yolos_attention_block(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return layer.attention(layer.layernorm_before(hidden), **arguments(layer, args, kwargs)) + hidden


YOLOS_LAYER = Architecture(
    feed_forward_entry="intermediate",
    feed_forward_exit="output.dense",
    attention_exit="attention.output.dense",
    attention_block=yolos_attention_block,
    feed_forward_block=yolos_feed_forward_block,
    children=frozenset({"attention", "intermediate", "output", "layernorm_before", "layernorm_after"}),
)

ROWS = {
    **rows(
        LAYER,
        "ASTLayer",
        "DeiTLayer",
        "IJepaLayer",
        "VideoPrismLayer",
        "ViTLayer",
        "ViTMAELayer",
        "ViTMSNLayer",
        "VivitLayer",
    ),
    **rows(YOLOS_LAYER, "DPTViTLayer", "VideoMAELayer", "YolosLayer"),
    "PixioLayer": PIXIO_LAYER,
}
