"""Models of images and of sound."""

from __future__ import annotations

from typing import Any

from ..family import Family
from ..inputs import features, frames_of_mel, mel_frames, pixels, waveform

_IMAGES: dict[str, Any] = {"inputs": pixels, "head": "image_classification"}
_STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}

VISION = (
    Family("vit", **_IMAGES),
    Family("deit", **_IMAGES),
    Family("dinov2", {"layerscale_value": 0.5}, **_IMAGES),
    Family("dinov2_with_registers", **_IMAGES),
    Family("dinov3_vit", inputs=pixels),
    Family("beit", **_IMAGES),
    Family("data2vec-vision", **_IMAGES),
    Family("vit_mae", {"mask_ratio": 0.0}, inputs=pixels),
    Family("vit_msn", **_IMAGES),
    Family("ijepa", **_IMAGES),
    Family("clip_vision_model", inputs=pixels),
    Family("siglip_vision_model", inputs=pixels),
    Family("sam_vision_model", {"global_attn_indexes": [0, 2], "window_size": 2}, inputs=pixels),
    Family("pixtral", inputs=pixels),
)

AUDIO = (
    Family("whisper", inputs=mel_frames),
    Family("wav2vec2", inputs=waveform),
    Family("wav2vec2", _STABLE, name="wav2vec2, stable norm (large)", inputs=waveform),
    Family("hubert", inputs=waveform),
    Family("wavlm", inputs=waveform),
    Family("unispeech", inputs=waveform),
    Family("data2vec-audio", inputs=waveform),
    Family("wav2vec2-bert", {"vocab_size": 40, "feature_projection_input_dim": 16}, inputs=features(16)),
    Family("speech_to_text", {"input_feat_per_channel": 16, "conv_channels": 32}, inputs=features(16)),
    Family("moonshine", inputs=waveform),
    Family("audio-spectrogram-transformer", {"max_length": 32}, inputs=frames_of_mel),
)
