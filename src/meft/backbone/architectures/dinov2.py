"""DINOv2, DINOv3 and BEiT: a norm before, layer scale and drop path after attention and after the MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .base import arguments, rows
from .residual import Sublayer, two_residuals

LAYER = two_residuals(
    Sublayer(("attention",), before="norm1", after=("layer_scale1", "drop_path")),
    Sublayer(("mlp",), before="norm2", after=("layer_scale2", "drop_path")),
)

_BEIT = two_residuals(
    Sublayer(("attention",), before="layernorm_before", after=("dropout", "lambda_1", "drop_path")),
    Sublayer(("mlp",), before="layernorm_after", after=("dropout", "lambda_2", "drop_path")),
    withheld=("interpolate_pos_encoding", "resolution"),
    children=("relative_position_bias",),
)


def beit_attention_block(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As the others, with the bias of relative positions in the mask, where the layer has its own."""
    given = arguments(layer, args, kwargs)
    if layer.relative_position_bias is not None:
        height, width = given["resolution"]
        window = (height // layer.patch_size, width // layer.patch_size)
        bias = layer.relative_position_bias(window, given["interpolate_pos_encoding"], dim_size=hidden.shape[1])
        mask = given["attention_mask"]
        given["attention_mask"] = bias if mask is None else bias + mask
    return _BEIT.attention_block(layer, hidden, **given)


BEIT_LAYER = replace(_BEIT, attention_block=beit_attention_block)
DATA2VEC_LAYER = two_residuals(
    Sublayer(("attention",), before="layernorm_before", after=("lambda_1", "drop_path")),
    Sublayer(("intermediate", "output"), before="layernorm_after", after=("lambda_2", "drop_path")),
    attention_exit="attention.output.dense",
    feed_forward_exit="output.dense",
    returns_rest=True,
)

ROWS = {
    **rows(
        LAYER,
        "Dinov2Layer",
        "Dinov2WithRegistersLayer",
        "DINOv3ViTLayer",
        "RadioLayer",
        "Sapiens2Layer",
        "Tipsv2VisionLayer",
    ),
    "BeitLayer": BEIT_LAYER,
    "Data2VecVisionLayer": DATA2VEC_LAYER,
}
