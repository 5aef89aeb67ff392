"""Recurrent models, vision models that change their width, and old ones."""

from __future__ import annotations

from typing import Any

from ..family import Family
from ..inputs import pixels

_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
_ZAMBA = {"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
_ZAMBA2 = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "use_mamba_kernels": False}
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}

_IMAGES: dict[str, Any] = {"inputs": pixels, "head": "image_classification"}
_SWIN = {"depths": [1, 1], "num_heads": [2, 4], "window_size": 2}
_PYRAMID = {
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 2, 2, 4],
    "depths": [1] * 4,
    "sr_ratios": [1] * 4,
}
_CONVOLUTIONS = {"hidden_sizes": [8, 16], "depths": [1, 1]}

UNUSUAL = (
    Family("mamba"),
    Family("mamba2", {"num_heads": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8}),
    Family("falcon_mamba"),
    Family("rwkv", {"use_cache": False}),
    Family(
        "xlstm", {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "chunk_size": 8, "use_cache": False}
    ),
    Family("recurrent_gemma"),
    Family("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    Family("bamba", {**_MAMBA_HEADS, "attn_layer_indices": [1]}),
    Family("zamba", _ZAMBA),
    Family("zamba2", {**_ZAMBA2, "n_mamba_heads": 8, "mamba_d_state": 8, "chunk_size": 8}),
    Family("falcon_h1", {**_MAMBA_HEADS, "mamba_d_ssm": 64}),
    Family("granitemoehybrid", {**_MAMBA_HEADS, **_LINEAR_AND_FULL}),
    Family("nemotron_h", {"mamba_num_heads": 8, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 8}),
    Family("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}),
    Family("qwen3_next", {**_LINEAR_AND_FULL, "linear_num_key_heads": 2, "linear_num_value_heads": 4}),
    Family("olmo_hybrid", _LINEAR_AND_FULL),
    Family("minimax", _LINEAR_AND_FULL),
    Family("swin", _SWIN, **_IMAGES),
    Family("swinv2", _SWIN, **_IMAGES),
    Family("segformer", _PYRAMID, **_IMAGES),
    Family("pvt_v2", {**_PYRAMID, "image_size": 32}, **_IMAGES),
    Family("convnext", {**_CONVOLUTIONS, "num_stages": 2}, **_IMAGES),
    Family("resnet", {**_CONVOLUTIONS, "embedding_size": 8}, **_IMAGES),
    Family("xlnet"),
    Family("xlm"),
    Family("ctrl"),
    Family("canine", {"num_hash_buckets": 16}),
    Family("mobilebert", {"embedding_size": 16, "intra_bottleneck_size": 16}),
    Family("funnel"),
)
