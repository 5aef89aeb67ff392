"""The record of facts about one family of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """Facts about one class of pretrained layers; module names are relative to the layer.

    Attributes:
        feed_forward_entry: module whose input is what the feed-forward receives.
        feed_forward_exit: module whose output is what the feed-forward computes, before dropout and residual.
        attention_exit: output projection of the self-attention, before dropout and residual.
        attention_block: (layer, hidden, *args, **kwargs of the layer) -> hidden after attention, its residual and its
            norm; cross-attention belongs to it.
        feed_forward_block: (layer, hidden) -> hidden after the feed-forward, its residual and its norm. One block
            after the other computes what the layer computes.
    """

    feed_forward_entry: str
    feed_forward_exit: str
    attention_exit: str
    attention_block: Callable[..., Tensor]
    feed_forward_block: Callable[[Any, Tensor], Tensor]


def dropped(layer: nn.Module, hidden: Tensor, probability: float) -> Tensor:
    """Functional dropout under the layer's training flag."""
    return nn.functional.dropout(hidden, p=probability, training=layer.training)
