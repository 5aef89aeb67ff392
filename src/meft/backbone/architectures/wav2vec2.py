"""wav2vec 2.0, HuBERT, WavLM: norms after the residual of attention, or before both halves ("stable")."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .base import Architecture, rows
from .residual import Sublayer, two_residuals

_AFTER = (
    Sublayer(("attention",), after=("dropout",), closing="layer_norm"),
    Sublayer(("feed_forward",), closing="final_layer_norm"),
)
_BEFORE = (
    Sublayer(("attention",), before="layer_norm", after=("dropout",)),
    Sublayer(("feed_forward",), before="final_layer_norm"),
)

LAYER = two_residuals(*_AFTER, feed_forward_exit="feed_forward.output_dense")
# A language adapter that some checkpoints have behind the layer (`adapter_layer`) is not covered, hence no known child.
STABLE_LAYER = two_residuals(*_BEFORE, feed_forward_exit="feed_forward.output_dense")


def wavlm(attention: Sublayer, feed_forward: Sublayer) -> Architecture:
    """WavLM's attention returns weights and a position bias; its layers hand the bias on to the next one."""
    layout = two_residuals(attention, feed_forward, feed_forward_exit="feed_forward.output_dense", returns_rest=True)

    def attention_block(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        hidden, _, bias = layout.attention_block(layer, hidden, *args, **kwargs)
        return hidden, bias

    return replace(layout, attention_block=attention_block)


ROWS = {
    **rows(
        LAYER,
        "Data2VecAudioEncoderLayer",
        "HubertEncoderLayer",
        "SEWEncoderLayer",
        "UniSpeechEncoderLayer",
        "UniSpeechSatEncoderLayer",
        "Wav2Vec2EncoderLayer",
    ),
    **rows(
        STABLE_LAYER,
        "HubertEncoderLayerStableLayerNorm",
        "UniSpeechEncoderLayerStableLayerNorm",
        "UniSpeechSatEncoderLayerStableLayerNorm",
        "Wav2Vec2EncoderLayerStableLayerNorm",
    ),
    "WavLMEncoderLayer": wavlm(*_AFTER),
    "WavLMEncoderLayerStableLayerNorm": wavlm(*_BEFORE),
}
