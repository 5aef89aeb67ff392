"""What tiny models are called with: words, pixels, sounds, drawn at random to the sizes of a configuration.

Every function takes a configuration and a generator, and returns keyword arguments of `ROWS` rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

Inputs = dict[str, Tensor]

ROWS, LENGTH = 3, 8
# Words below are special tokens of one family or another.
FIRST_WORD, LAST_WORD = 24, 40
# Of images for models that take any.
_SIDE = 32


def words(rows: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(FIRST_WORD, LAST_WORD, (rows, length), generator=generator)


def text(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """Tokens with a mask: row i ends with the end token, where classifiers of BART look, and i tokens of padding."""
    tokens = config.get_text_config()
    pad, end = token_id(tokens, "pad_token_id", 1), token_id(tokens, "eos_token_id", 2)
    ids, mask = words(ROWS, LENGTH, generator), torch.ones(ROWS, LENGTH, dtype=torch.long)
    for row in range(ROWS):
        ids[row, LENGTH - row :], mask[row, LENGTH - row :] = pad, 0
        ids[row, LENGTH - row - 1] = end
    return {"input_ids": ids, "attention_mask": mask}


def pixels(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or _SIDE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": torch.randn(ROWS, getattr(vision, "num_channels", 3), height, width, generator=generator)}


def waveform(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """Samples of a sound, for models that begin with convolutions over it."""
    return {"input_values": torch.randn(ROWS, 1600, generator=generator)}


def mel_frames(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """A spectrogram (rows, bins, frames) of the one length that Whisper takes."""
    frames = 2 * config.max_source_positions
    return {"input_features": torch.randn(ROWS, config.num_mel_bins, frames, generator=generator)}


def frames_of_mel(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """A spectrogram (rows, frames, bins)."""
    frames = getattr(config, "max_length", 16)
    return {"input_values": torch.randn(ROWS, frames, config.num_mel_bins, generator=generator)}


def features(count: int) -> Any:
    """Sound as frames of `count` numbers."""

    def inputs(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
        return {"input_features": torch.randn(ROWS, 16, count, generator=generator)}

    return inputs


def text_and_pixels(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
    """A text and an image a row, for two towers that are compared."""
    return {**text(config, generator), **pixels(config, generator)}


def with_images(count: int, **others: Any) -> Any:
    """Inputs of a model that reads images as words: `count` image tokens a row in front of the text."""

    def inputs(config: PretrainedConfig, generator: torch.Generator) -> Inputs:
        made = text(config, generator)
        token = getattr(config, "image_token_id", None)
        token = config.image_token_index if token is None else token
        image = torch.full((ROWS, count), token)
        made["input_ids"] = torch.cat([image, made["input_ids"]], dim=1)
        made["attention_mask"] = torch.cat([torch.ones_like(image), made["attention_mask"]], dim=1)
        made |= pixels(config, generator) | {name: make(config, generator) for name, make in others.items()}
        return made

    return inputs


def guessed(model: PreTrainedModel) -> Any:
    """The function above that fits two towers, or what a model calls its main input; words where that says nothing."""
    if hasattr(model.config, "vision_config") and hasattr(model.config, "projection_dim"):
        return text_and_pixels
    if model.main_input_name == "input_features":
        return mel_frames if hasattr(model.config, "max_source_positions") else frames_of_mel
    if model.main_input_name == "input_values":
        return frames_of_mel if hasattr(model.config, "num_mel_bins") else waveform
    return pixels if model.main_input_name == "pixel_values" else text


def token_id(config: PretrainedConfig, name: str, otherwise: int) -> int:
    """A special token of a configuration, which may have several, or none."""
    token = getattr(config, name, None)
    token = token[0] if isinstance(token, list) and token else token
    return token if isinstance(token, int) else otherwise
