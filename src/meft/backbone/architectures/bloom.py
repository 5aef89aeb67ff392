"""BLOOM and MPT: attention biased by distance; the feed-forward adds the residual itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Architecture


def attention_block(
    layer: Any,
    hidden: Tensor,
    alibi: Tensor,
    attention_mask: Tensor,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Any, ...]:
    normed = layer.input_layernorm(hidden)
    # As the attention of the pretrained layer: it adds the residual, and keeps further arguments out.
    return layer.self_attention(
        normed,
        normed if layer.apply_residual_connection_post_layernorm else hidden,
        layer_past=layer_past,
        attention_mask=attention_mask,
        alibi=alibi,
        use_cache=use_cache,
        output_attentions=output_attentions,
    )


def feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    normed = layer.post_attention_layernorm(hidden)
    return layer.mlp(normed, normed if layer.apply_residual_connection_post_layernorm else hidden)


def sliced(layer: Any) -> str | None:
    """Emulated tensor parallelism multiplies by slices of the projections and does not call them."""
    if layer.mlp.pretraining_tp > 1 and layer.mlp.slow_but_exact:
        return (
            f"slow_but_exact=True with pretraining_tp={layer.mlp.pretraining_tp} passes its output projections by, "
            "and with them an adapter there; set slow_but_exact=False"
        )
    return None


LAYER = Architecture(
    feed_forward_entry="mlp",
    feed_forward_exit="mlp.dense_4h_to_h",
    attention_exit="self_attention.dense",
    attention_block=attention_block,
    feed_forward_block=feed_forward_block,
    children=frozenset({"input_layernorm", "self_attention", "post_attention_layernorm", "mlp"}),
    refuses=sliced,
)


def mpt_attention_block(
    layer: Any,
    hidden: Tensor,
    position_bias: Tensor,
    attention_mask: Tensor,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Any, ...]:
    attended, weights = layer.attn(
        layer.norm_1(hidden), position_bias=position_bias, attention_mask=attention_mask, past_key_values=layer_past
    )
    return layer.resid_attn_dropout(attended) + hidden, weights


def mpt_feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    return layer.ffn(layer.norm_2(hidden), hidden)


MPT_LAYER = Architecture(
    feed_forward_entry="ffn",
    feed_forward_exit="ffn.down_proj",
    attention_exit="attn",
    attention_block=mpt_attention_block,
    feed_forward_block=mpt_feed_forward_block,
    children=frozenset({"norm_1", "attn", "norm_2", "ffn", "resid_attn_dropout"}),
)

ROWS = {"BloomBlock": LAYER, "MptBlock": MPT_LAYER}
