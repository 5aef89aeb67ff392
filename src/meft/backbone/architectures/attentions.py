"""What stands before and after the attention of a layer: the stages of a layer whose attention is laid out as usual.

    q, k, v = rotary(norms(projections(norm(hidden))))     token-wise
    o = attention(q, k, v)                                 whole, by any backend of Transformers
    hidden = feed_forward(hidden + output projection(o))   token-wise

A row says how one attention module of Transformers departs from that, and holds, as those of layers do, for modules
that run the `forward` of the row's class. What a layer's other half is, its own row knows (`residual.Sublayer`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Architecture
from .stages import Given, Stages, attended, called_by_name, ordinary

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

    def stages(self, known: Architecture) -> Stages:
        """The stages of a layer with such an attention module, whose other half its own row knows."""
        assert known.halves is not None
        half = known.halves[0]
        (name,) = half.modules

        def before(layer: Any, hidden: Tensor, given: Given, shape: torch.Size, part: slice) -> tuple[Tensor, ...]:
            tables = rotary_tile(given["position_embeddings"], shape, part)
            return self._before(getattr(layer, name), half.enter(layer, hidden), tables)

        def attend(layer: Any, boundary: tuple[Tensor, ...], given: Given) -> Tensor:
            return self._attend(getattr(layer, name), boundary, given)

        def after(layer: Any, hidden: Tensor, o: Tensor) -> Tensor:
            return half.leave(layer, hidden, getattr(layer, name).o_proj(o))

        return Stages(before, attend, after, _with_rotary, exit=f"{name}.o_proj")

    @property
    def children(self) -> frozenset[str]:
        return _PROJECTIONS | ({"q_norm", "k_norm"} if self.norms else set())

    def _before(self, module: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        shape = (*hidden.shape[:-1], -1, module.head_dim)
        q, k = self._heads(module, hidden, "q", shape), self._heads(module, hidden, "k", shape)
        v = module.v_proj(hidden)
        q, k = called_by_name(module, "apply_rotary_pos_emb")(q, k, *rotary)
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

    def _attend(self, module: Any, boundary: tuple[Tensor, ...], given: Given) -> Tensor:
        further = {name: value for name, value in given.items() if name not in _NAMED}
        if self.sliding:
            holder = module if self.sliding == "module" else module.config
            further["sliding_window"] = getattr(holder, "sliding_window", None)
        if self.softcap:
            further["softcap"] = module.attn_logit_softcapping
        return attended(
            module,
            boundary,
            given.get("attention_mask"),
            width=module.head_dim,
            dropout=module.attention_dropout,
            **further,
        )


_PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_NAMED = ("position_embeddings", "attention_mask", "past_key_values")


def _with_rotary(layer: Any, given: Given, shape: torch.Size) -> bool:
    """Accepts ordinary calls with rotary embeddings of the tokens."""
    found = given.get("position_embeddings")
    if not ordinary(layer, given, shape) or not isinstance(found, tuple) or len(found) != 2:
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
