"""The record of how one class of layers runs in stages, and what the families' stages share.

boundary = before(hidden)             token-wise: norm, projections
o = attend(boundary)                  whole: attention, by any backend of Transformers
hidden = after(hidden, o)             token-wise: output projection, residual, norm; then the feed-forward block
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Given = Mapping[str, Any]
"""What a layer was called with besides the hidden state, by name."""


@dataclass(frozen=True)
class Replaced:
    """A module whose own `forward` the stages stand in for.

    Attributes:
        owners: the classes of Transformers whose `forward` it may run.
        children: names of all children it may have; the stages would leave out another one.
    """

    owners: frozenset[str]
    children: frozenset[str]


@dataclass(frozen=True)
class Stages:
    """The stages of one class of layers; in one tile they compute what its attention block computes, bit for bit.

    Attributes:
        before: (layer, tile of the hidden state, arguments, shape of the hidden state, tile) -> boundary.
        attend: (layer, boundary, arguments) -> what attention makes, (samples, tokens, width).
        after: (layer, tile of the hidden state, tile of what attention made) -> hidden after the attention's half.
        accepts: (layer, arguments, shape) -> whether a call is an ordinary training call, which runs so.
        replaced: modules whose `forward` is not called, by path.
        refuses: (layer) -> why this layer of the class runs whole, or None.
        exit: the module whose output is what the attention computes, where the row's `attention_exit` is not called.
        returns_tuple: whether the layer returns the hidden state as a tuple of one.
    """

    before: Callable[[Any, Tensor, Given, torch.Size, slice], tuple[Tensor, ...]]
    attend: Callable[[Any, tuple[Tensor, ...], Given], Tensor]
    after: Callable[[Any, Tensor, Tensor], Tensor]
    accepts: Callable[[Any, Given, torch.Size], bool]
    replaced: Mapping[str, Replaced] = field(default_factory=dict)
    refuses: Callable[[Any], str | None] = lambda layer: None
    exit: str | None = None
    returns_tuple: bool = False


def ordinary(layer: Any, given: Given, shape: torch.Size) -> bool:
    """Accepts calls with neither a cache, nor states of an encoder, nor attention weights to return."""
    asked = ("past_key_values", "past_key_value", "layer_past", "encoder_hidden_states", "head_mask")
    return (
        len(shape) == 3
        and all(given.get(name) is None for name in asked)
        and not given.get("output_attentions")
        and not given.get("use_cache")
    )


def attended(
    module: Any,
    boundary: tuple[Tensor, ...],
    mask: Tensor | None,
    *,
    width: int,
    dropout: float,
    **further: Any,
) -> Tensor:
    """Runs an attention module's backend on q, k and v, each (samples, tokens, heads * width of a head)."""
    q, k, v = (part.view(*part.shape[:-1], -1, width).transpose(1, 2) for part in boundary)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, called_by_name(module, "eager_attention_forward")
    )
    output, _ = attention(
        module, q, k, v, mask, dropout=dropout if module.training else 0.0, scaling=module.scaling, **further
    )
    return output.reshape(*output.shape[:2], -1).contiguous()


def called_by_name(module: nn.Module, name: str) -> Callable[..., Any]:
    """What a module's own code calls by a name."""
    code = next(kind.__module__ for kind in type(module).__mro__ if "forward" in vars(kind))
    found: Callable[..., Any] = getattr(sys.modules[code], name)
    return found
