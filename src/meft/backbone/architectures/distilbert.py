"""DistilBERT: norms after the residuals, no dropout but the feed-forward's own."""

from __future__ import annotations

from .residual import Sublayer, two_residuals

LAYER = two_residuals(
    Sublayer(("attention",), closing="sa_layer_norm"),
    Sublayer(("ffn",), closing="output_layer_norm"),
    feed_forward_exit="ffn.lin2",
)

ROWS = {"TransformerBlock": LAYER}
