"""ModernBERT, encoder and decoder: norms before (the first layer has none before its attention)."""

from __future__ import annotations

from .base import rows
from .residual import Sublayer, two_residuals

LAYER = two_residuals(
    Sublayer(("attn",), before="attn_norm"), Sublayer(("mlp",), before="mlp_norm"), attention_exit="attn.Wo"
)
# Norms after the residuals, dropout as modules before them.
NOMIC_LAYER = two_residuals(
    Sublayer(("self_attn",), after=("post_attention_dropout",), closing="post_attention_layernorm"),
    Sublayer(("mlp",), after=("post_mlp_dropout",), closing="post_mlp_layernorm"),
)

ROWS = {
    **rows(LAYER, "ModernBertDecoderLayer", "ModernBertEncoderLayer"),
    **rows(NOMIC_LAYER, "GteLayer", "JinaEmbeddingsV3Layer", "NomicBertLayer"),
}
