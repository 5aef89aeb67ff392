"""What stands before and after the attention of a layer: the stages of a layer whose attention is laid out as usual.

    q, k, v = rotary(norms(projections(norm(hidden))))     token-wise
    o = attention(q, k, v)                                 whole, by any backend of Transformers
    hidden = feed_forward(hidden + output projection(o))   token-wise

A row says how one attention module of Transformers departs from that, and holds, as those of layers do, for modules
that run the `forward` of the row's class. What a layer's other half is, its own row knows (`residual.Sublayer`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Norms = Literal["", "heads", "transposed", "flat"]


@dataclass(frozen=True)
class Attention:
    """Facts about one class of attention modules with q_proj, k_proj, v_proj and o_proj.

    Attributes:
        norms: where q_norm and k_norm stand: on the heads before or after they change places with the tokens, or on
            all heads at once; "" for none.
        sliding: whether the backend is told a sliding window, and whose attribute it is.
        softcap: whether it is told to cap its logits.
    """

    norms: Norms = ""
    sliding: Literal["", "module", "config"] = ""
    softcap: bool = False

    @property
    def children(self) -> frozenset[str]:
        return _PROJECTIONS | ({"q_norm", "k_norm"} if self.norms else set())

    def before(self, module: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(..., tokens, width) -> q, k and v, each (..., tokens, heads * width of a head)."""
        shape = (*hidden.shape[:-1], -1, module.head_dim)
        q, k = self._heads(module, hidden, "q", shape), self._heads(module, hidden, "k", shape)
        v = module.v_proj(hidden)
        q, k = _named(module, "apply_rotary_pos_emb")(q, k, *rotary)
        return _together(q), _together(k), v

    def _heads(self, module: Any, hidden: Tensor, which: str, shape: tuple[int, ...]) -> Tensor:
        norm = getattr(module, f"{which}_norm") if self.norms else None
        found = getattr(module, f"{which}_proj")(hidden)
        if norm is not None and self.norms == "flat":
            found = norm(found)
        found = found.view(shape)
        if norm is not None and self.norms == "heads":
            found = norm(found)
        found = found.transpose(1, 2)
        return norm(found) if norm is not None and self.norms == "transposed" else found

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, given: Mapping[str, Any]) -> Tensor:
        """q, k and v of all tokens -> (..., tokens, heads * width of a head)."""
        further = {name: value for name, value in given.items() if name not in _NAMED}
        if self.sliding:
            holder = module if self.sliding == "module" else module.config
            further["sliding_window"] = getattr(holder, "sliding_window", None)
        if self.softcap:
            further["softcap"] = module.attn_logit_softcapping
        q, k, v = (part.view(*part.shape[:-1], -1, module.head_dim).transpose(1, 2) for part in (q, k, v))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            module.config._attn_implementation, _named(module, "eager_attention_forward")
        )
        dropout = module.attention_dropout if module.training else 0.0
        output, _ = attention(
            module, q, k, v, given.get("attention_mask"), dropout=dropout, scaling=module.scaling, **further
        )
        return output.reshape(*output.shape[:2], -1).contiguous()


_PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_NAMED = ("position_embeddings", "attention_mask", "past_key_values")


def rotary_of(given: Mapping[str, Any], shape: torch.Size) -> bool:
    """Tells whether a call has rotary embeddings of its tokens, and no cache."""
    found = given.get("position_embeddings")
    if given.get("past_key_values") is not None or not isinstance(found, tuple) or len(found) != 2 or len(shape) != 3:
        return False
    return all(
        isinstance(part, Tensor) and part.dim() == 3 and part.shape[0] in (1, shape[0]) and part.shape[1] == shape[1]
        for part in found
    )


def rotary_tile(tables: tuple[Tensor, Tensor], shape: torch.Size, part: slice) -> tuple[Tensor, Tensor]:
    """Cuts the tokens of a tile out of rotary embeddings, of shape (1 or samples, tokens, width)."""
    if part.stop - part.start == shape[0] * shape[1]:
        return tables
    first, second = (_rows(table, shape, part).unsqueeze(0) for table in tables)
    return first, second


def _rows(table: Tensor, shape: torch.Size, part: slice) -> Tensor:
    rows = table.reshape(-1, table.shape[-1])
    if table.shape[0] == shape[0]:
        return rows[part]
    return rows[torch.arange(part.start, part.stop, device=table.device) % shape[1]]


def _together(heads: Tensor) -> Tensor:
    """(samples, heads, tokens, width) -> (samples, tokens, heads * width)."""
    return heads.transpose(1, 2).flatten(2)


def _named(module: nn.Module, name: str) -> Callable[..., Any]:
    """What a module's own code calls by a name."""
    found: Callable[..., Any] = getattr(sys.modules[_code_of(module)], name)
    return found


def _code_of(module: nn.Module) -> str:
    return next(kind.__module__ for kind in type(module).__mro__ if "forward" in vars(kind))


ATTENTIONS: dict[str, Attention] = {
    **dict.fromkeys(
        (
            "ArceeAttention",
            "AriaTextAttention",
            "CsmAttention",
            "Emu3Attention",
            "Ernie4_5Attention",
            "Ernie4_5_MoeAttention",
            "EuroBertAttention",
            "GemmaAttention",
            "GlmAttention",
            "HeliumAttention",
            "Jais2Attention",
            "LlamaAttention",
            "NemotronAttention",
            "PhimoeAttention",
            "Qwen2MoeAttention",
            "SolarOpenAttention",
        ),
        Attention(),
    ),
    **dict.fromkeys(("CwmAttention", "MinistralAttention", "Qwen2Attention"), Attention(sliding="module")),
    **dict.fromkeys(("MistralAttention", "MixtralAttention"), Attention(sliding="config")),
    **dict.fromkeys(
        ("Dots1Attention", "MellumAttention", "Qwen3Attention", "Qwen3MoeAttention"),
        Attention(norms="heads", sliding="module"),
    ),
    **dict.fromkeys(("FlexOlmoAttention", "Olmo2Attention"), Attention(norms="flat")),
    **dict.fromkeys(("Gemma2Attention", "VaultGemmaAttention"), Attention(sliding="module", softcap=True)),
    "Gemma3Attention": Attention(norms="transposed", sliding="module"),
}
"""Attention classes of Transformers, by name, and how their stages depart from the usual."""
