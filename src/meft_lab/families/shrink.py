"""Tiny configurations of any model type of Transformers, made from its default one.

A default configuration describes a model of full size. Every attribute whose name says what it counts (widths, heads,
layers, words, positions, experts, pixels) is replaced by a small number, in configurations inside a configuration too.
Attributes with other names keep their values; a family whose model cannot be built that way says what else to change.

Example:
    >>> tiny_config("llama").hidden_size
    32
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from meft.errors import ConfigError, UnsupportedModelError

VOCABULARY = 40
HIDDEN = 32
HEADS = 4
LAYERS = 3
POSITIONS = 64
PIXELS, PATCH = 16, 4
DROPOUT = 0.1

_SIZES: tuple[tuple[str, int], ...] = (
    (r"(?!type_).*vocab_size(_per_layer_input)?|n_words", VOCABULARY),
    (r"(num_(hidden_|encoder_|decoder_|text_)?|n_|encoder_|decoder_)layers?|num_blocks|depth", LAYERS),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|num_key_value_heads_.*", HEADS // 2),
    (r"(num_|n_)(attention_|attn_|decoder_attention_)?heads?|(en|de)coder_attention_heads|attention_heads", HEADS),
    (
        r"(global_)?head_dim|head_size|d_kv|kv_channels|.*_head_dim|attention_head_size|attention_head_dim",
        HIDDEN // HEADS,
    ),
    (r"rotary_dim", HIDDEN // HEADS // 2),
    (r"[qk]v?_lora_rank", HIDDEN // 2),
    (
        r".*intermediate_size(_mlp)?|.*ffn_dim|.*ffn_hidden_size|d_?ff|n_inner|d_inner|hidden_dim|.*_ffn_size|feed_forward_size",
        2 * HIDDEN,
    ),
    (
        r"(out_|encoder_|text_|mm_|embedding_|per_layer_)?hidden_size(_per_layer_input)?|d_model|n_embd|dim|"
        r"emb(ed|edding)?_(dim|size)|word_embed_proj_dim|projection_dim|proj_dim|lru_width|output_dim|.*_embed_dim",
        HIDDEN,
    ),
    (r"(moe_)?num_(local_|routed_)?experts|n_routed_experts|num_moe_experts", 4),
    (r"(moe_)?(num_)?(experts|expert)_(per|top)_?(tok|token|k)?|moe_topk|moe_k|num_experts_per_tok(en)?", 2),
    (r"n_group|topk_group|first_k_dense_replace|n_shared_experts|num_shared_experts", 1),
    (
        r"max_(encoder_|decoder_)?position_embeddings|n_positions|n_ctx|max_(source|target)_positions|seq_length|max_seq_len",
        POSITIONS,
    ),
    (r"image_size|img_size", PIXELS),
    (r"patch_size|encoder_stride", PATCH),
    (r"conv_dim", HIDDEN),
    (r"num_mel_bins|feature_size|d_mel", 16),
    (r"sliding_window(_size)?|attention_window_size|local_attention|window_size|attention_chunk_size", 4),
    (r"sliding_window_pattern|full_attention_interval|global_attn_every_n_layers|no_rope_layer_interval", 2),
)
"""(pattern that the whole name of an attribute matches, its tiny value); the first match counts."""

_PER_LAYER = ("intermediate_size",)
_PER_AXIS = ("image_size", "patch_size", "conv_dim")
_MASKS_INPUTS = re.compile(r"mask_(time|feature)_prob")
_TOKEN = re.compile(r".*token_(id|index)|.*_token")
_TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "decoder_start_token_id": 2}
FIRST_SPECIAL = 3


def tiny_config(model_type: str, changes: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """Makes a tiny configuration of a model type.

    Args:
        model_type: as in `config.model_type`.
        changes: attributes that need another value than the general rules give, {"text_config": {...}} for those of a
            configuration inside.

    Raises:
        ConfigError: the installed Transformers has no such model type.
        UnsupportedModelError: the values do not fit together for this model type.
    """
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"model_type is {model_type!r}, which Transformers {transformers.__version__} does not have. Give one of "
            "its model types, as in the config.json of a checkpoint."
        )
    try:
        return CONFIG_MAPPING[model_type](**_tiny_values(CONFIG_MAPPING[model_type], changes or {}))
    except Exception as error:  # what does not fit is said by any kind of error
        raise UnsupportedModelError(
            f"No tiny configuration of {model_type} can be made: {type(error).__name__}: {error} The sizes that "
            "meft families chooses do not fit this model type."
        ) from error


def _tiny_values(config_class: type[PretrainedConfig], changes: Mapping[str, Any]) -> dict[str, Any]:
    defaults = vars(config_class())
    values: dict[str, Any] = {}
    specials = iter(range(FIRST_SPECIAL, VOCABULARY))
    for name, default in defaults.items():
        if isinstance(default, PretrainedConfig):
            inside = changes.get(name, {})
            values[name] = {"model_type": default.model_type, **_tiny_values(type(default), inside)}
        else:
            tiny = _tiny(name, default, specials)
            if tiny is not None:
                values[name] = tiny
    if defaults.get("head_dim", 0) is None and {"hidden_size", "num_attention_heads"} <= defaults.keys():
        values["head_dim"] = HIDDEN // HEADS  # some models of this kind do not derive it
    rope = defaults.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        values["rope_parameters"] = {**rope, "mrope_section": [HIDDEN // HEADS // 2 - 2, 1, 1]}
    if "kv_lora_rank" in defaults:
        values["num_key_value_heads"] = HEADS  # keys are not shared between heads where they are compressed
    if defaults.get("pad_token_id", 0) is None:
        values["pad_token_id"] = _TOKENS["pad_token_id"]  # batches are padded
    given = {name: value for name, value in changes.items() if not isinstance(values.get(name), dict)}
    return {**values, **given}


def _tiny(name: str, default: Any, specials: Any) -> Any:
    """The tiny value of one attribute, None to leave it to the configuration's own default."""
    if _TOKEN.fullmatch(name):
        return _token(name, default, specials)
    if isinstance(default, bool):
        return False if name == "apply_spec_augment" else None
    if _MASKS_INPUTS.fullmatch(name):
        return 0.0
    if "drop" in name and isinstance(default, float) and default < 1:
        return None if "layer" in name and "hidden" not in name else DROPOUT
    size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
    if default is None:
        return VOCABULARY if name == "vocab_size" else None  # models of sound leave it to their tokenizer
    if size is None:
        return None
    if isinstance(default, int):
        return min(size, default) if name == "first_k_dense_replace" else size
    if not isinstance(default, list | tuple):
        return None
    return [size] * len(default) if name in _PER_AXIS else size if name in _PER_LAYER else None


def _token(name: str, default: Any, specials: Any) -> Any:
    """Ids of special tokens stay where they are when there are so many words, and move below them otherwise."""
    if isinstance(default, list) and name in _TOKENS:
        return _TOKENS[name]
    if not isinstance(default, int) or isinstance(default, bool) or default < VOCABULARY:
        return None
    return _TOKENS[name] if name in _TOKENS else next(specials)
