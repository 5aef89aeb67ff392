"""Layers whose attention and feed-forward read the same input and are added up: there is nothing between them.

Some do so always, some by their configuration; the latter have a row in the table for the other case.
"""

from __future__ import annotations

from typing import Any

from torch import nn

REASON = "its attention and its feed-forward read the same input, so there is nothing between them to couple"

ALWAYS = frozenset(
    {
        "CodeGenBlock",
        "Cohere2DecoderLayer",
        "Cohere2MoeDecoderLayer",
        "CohereCompassDecoderLayer",
        "CohereDecoderLayer",
        "GPTJBlock",
        "PhiDecoderLayer",
    }
)


def by_residual(layer: Any) -> str | None:
    """GPT-NeoX and StableLM."""
    return f"{REASON} (use_parallel_residual=True)" if layer.use_parallel_residual else None


def falcon(layer: Any) -> str | None:
    for option in ("new_decoder_architecture", "parallel_attn"):
        if getattr(layer.config, option):
            return f"{REASON} ({option}=True)"
    return None


def always(layer: nn.Module, owner: str | None) -> str | None:
    """Why a layer whose `forward` belongs to the class `owner` does not split, or None."""
    return REASON if owner in ALWAYS else None
