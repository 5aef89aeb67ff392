"""mBART, Pegasus, NLLB, Whisper and relatives: as BART, with the norms before attention and feed-forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .base import Architecture, arguments, dropped, rows

_ENCODER = ("encoder_hidden_states", "encoder_attention_mask")


def attention_block(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    given = arguments(layer, args, kwargs)
    encoder, mask = (given.pop(name, None) for name in _ENCODER)
    given.pop("use_cache", None)
    attended, _ = layer.self_attn(layer.self_attn_layer_norm(hidden), **given)
    hidden = hidden + dropped(layer, attended, layer.dropout)
    if encoder is None:
        return hidden
    attended, _ = layer.encoder_attn(
        layer.encoder_attn_layer_norm(hidden), key_value_states=encoder, **{**given, "attention_mask": mask}
    )
    return hidden + dropped(layer, attended, layer.dropout)


def feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    inner = layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden)))
    inner = dropped(layer, inner, layer.activation_dropout)
    return hidden + dropped(layer, layer.fc2(inner), layer.dropout)


def encoder_feed_forward_block(layer: Any, hidden: Tensor) -> Tensor:
    hidden = feed_forward_block(layer, hidden)
    # As the pretrained layer: float16 activations are kept from overflowing.
    if hidden.dtype == torch.float16:
        largest = torch.finfo(hidden.dtype).max - 1000
        hidden = torch.clamp(hidden, min=-largest, max=largest)
    return hidden


ENCODER_LAYER = Architecture(
    feed_forward_entry="fc1",
    feed_forward_exit="fc2",
    attention_exit="self_attn.out_proj",
    attention_block=attention_block,
    feed_forward_block=encoder_feed_forward_block,
    children=frozenset({"self_attn", "self_attn_layer_norm", "activation_fn", "fc1", "fc2", "final_layer_norm"}),
)
DECODER_LAYER = replace(
    ENCODER_LAYER,
    feed_forward_block=feed_forward_block,
    children=ENCODER_LAYER.children | {"encoder_attn", "encoder_attn_layer_norm"},
)

ROWS = {
    **rows(
        ENCODER_LAYER,
        "AudioFlamingo3EncoderLayer",
        "BlenderbotEncoderLayer",
        "M2M100EncoderLayer",
        "MBartEncoderLayer",
        "MossTranscribeDiarizeAudioLayer",
        "PegasusEncoderLayer",
        "Qwen2AudioEncoderLayer",
        "Speech2TextEncoderLayer",
        "VoxtralEncoderLayer",
        "WhisperEncoderLayer",
    ),
    **rows(
        DECODER_LAYER,
        "BigBirdPegasusDecoderLayer",
        "BioGptDecoderLayer",
        "BlenderbotDecoderLayer",
        "M2M100DecoderLayer",
        "MBartDecoderLayer",
        "MusicgenDecoderLayer",
        "PPFormulaNetDecoderLayer",
        "PegasusDecoderLayer",
        "PegasusXDecoderLayer",
        "Speech2TextDecoderLayer",
        "WhisperDecoderLayer",
        "XGLMDecoderLayer",
    ),
}
