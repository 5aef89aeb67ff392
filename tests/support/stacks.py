"""A small model whose layers can be given anything: for what Transformers' own models do rarely, or not yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

WIDTH = 8


class Block(GradientCheckpointingLayer):
    """h + tanh(W h); a subclass returns or leaves behind more."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states + torch.tanh(self.mlp(self.norm(hidden_states)))


Loop = Callable[["Stacked", Tensor], Tensor]


def plain_loop(model: Stacked, hidden: Tensor) -> Tensor:
    for layer in model.layers:
        hidden = layer(hidden)
    return hidden


class Stacked(nn.Module):
    """A list of layers, and the loop that runs them."""

    def __init__(self, layers: Sequence[nn.Module], loop: Loop = plain_loop) -> None:
        super().__init__()
        self.layers, self.loop = nn.ModuleList(layers), loop

    def forward(self, hidden: Tensor) -> Tensor:
        return self.loop(self, hidden)


def hidden_state(width: int = WIDTH, seed: int = 0) -> Tensor:
    """A leaf of shape (2, 3, width) that requires gradients."""
    return torch.randn(2, 3, width, generator=torch.Generator().manual_seed(seed)).requires_grad_()
