"""OLMo 2 and relatives: the norm stands after attention and after the feed-forward, before the residual.

(The first OLMo is laid out as Llama.)
"""

from __future__ import annotations

from .base import rows
from .residual import Sublayer, two_residuals

LAYER = two_residuals(
    Sublayer(("self_attn",), after=("post_attention_layernorm",)),
    Sublayer(("mlp",), after=("post_feedforward_layernorm",)),
)

ROWS = rows(
    LAYER,
    "Exaone4DecoderLayer",
    "Exaone4_5_DecoderLayer",
    "FlexOlmoDecoderLayer",
    "Olmo2DecoderLayer",
    "Olmo3DecoderLayer",
)
