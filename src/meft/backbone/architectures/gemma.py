"""Gemma 2 and 3, and relatives with four norms a layer: before and after attention, before and after the feed-forward.

(The first Gemma is laid out as Llama.)
"""

from __future__ import annotations

from .base import rows
from .residual import Sublayer, two_residuals

LAYER = two_residuals(
    Sublayer(("self_attn",), before="input_layernorm", after=("post_attention_layernorm",)),
    Sublayer(("mlp",), before="pre_feedforward_layernorm", after=("post_feedforward_layernorm",)),
)
GLM4_LAYER = two_residuals(
    Sublayer(("self_attn",), before="input_layernorm", after=("post_self_attn_layernorm",)),
    Sublayer(("mlp",), before="post_attention_layernorm", after=("post_mlp_layernorm",)),
)
AFMOE_LAYER = two_residuals(
    Sublayer(("self_attn",), before="input_layernorm", after=("post_attention_layernorm",)),
    Sublayer(("mlp",), before="pre_mlp_layernorm", after=("post_mlp_layernorm",)),
)
HYPERCLOVAX_LAYER = two_residuals(
    Sublayer(("self_attn",), before="input_layernorm", after=("post_norm1", "residual_multiplier")),
    Sublayer(("mlp",), before="post_attention_layernorm", after=("post_norm2", "residual_multiplier")),
)

ROWS = {
    **rows(
        LAYER, "Gemma2DecoderLayer", "Gemma3DecoderLayer", "Gemma4VisionEncoderLayer", "MuseGlimmerTextDecoderLayer"
    ),
    **rows(
        GLM4_LAYER,
        "Glm4DecoderLayer",
        "Glm4vTextDecoderLayer",
        "GlmImageTextDecoderLayer",
        "GlmOcrTextDecoderLayer",
        "Kolibri1DecoderLayer",
    ),
    "AfmoeDecoderLayer": AFMOE_LAYER,
    "HyperCLOVAXDecoderLayer": HYPERCLOVAX_LAYER,
}
