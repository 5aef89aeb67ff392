"""Layers that `meft3` refuses to split, and what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel

import meft
from meft.backbone.architectures import FAMILIES, feed_forward_of, split_of
from meft.errors import UnsupportedModelError
from meft_lab.families.shrink import tiny_config

INSTEAD = 'Use coupling="meft1", "meft2" or "momentum", which take a layer as a whole.'


def layer_of(model_type: str, **changes: Any) -> nn.Module:
    """The first layer of a tiny model."""
    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_config(model_type, changes))
    return next(child[0] for child in model.modules() if isinstance(child, nn.ModuleList) and len(child) == 3)


def refusal(layer: nn.Module) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        split_of(layer, "layers.0 of Model")
    text = str(caught.value)
    start = (
        f'coupling="meft3" cannot split layers.0 of Model, a {type(layer).__name__}, into an attention and a '
        "feed-forward block: "
    )
    assert text.startswith(start) and text.endswith(f". {INSTEAD}")
    return text.removeprefix(start).removesuffix(f". {INSTEAD}")


@pytest.mark.parametrize(
    ("model_type", "changes", "why"),
    [
        ("gptj", {}, ""),
        ("codegen", {}, ""),
        ("phi", {}, ""),
        ("cohere", {}, ""),
        ("cohere2", {}, ""),
        ("gpt_neox", {}, " (use_parallel_residual=True)"),
        ("stablelm", {"use_parallel_residual": True}, " (use_parallel_residual=True)"),
        ("falcon", {}, " (parallel_attn=True)"),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, " (new_decoder_architecture=True)"),
    ],
)
def test_parallel_layers(model_type: str, changes: dict[str, Any], why: str) -> None:
    """Refused by `meft3`; the others find their feed-forward."""
    layer = layer_of(model_type, **changes)
    assert refusal(layer) == (
        f"its attention and its feed-forward read the same input, so there is nothing between them to couple{why}"
    )
    assert feed_forward_of(layer, "layers.0") == (layer.mlp, layer.mlp)


def test_a_parallel_model_stays_whole() -> None:
    model = AutoModel.from_config(tiny_config("phi"))
    layers = list(model.layers)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0 of PhiModel, a PhiDecoderLayer"):
        meft.make_reversible(model, "meft3")
    assert list(model.layers) == layers
    meft.make_reversible(model, "meft1")


def test_children_that_the_blocks_would_leave_out() -> None:
    layer = layer_of("llama")
    layer.add_module("prompt", nn.Identity())
    known = "input_layernorm, mlp, post_attention_layernorm, self_attn"
    assert refusal(layer) == f"it has prompt besides {known}, and the blocks would leave it out"
    layer.add_module("memory", nn.Identity())
    assert refusal(layer) == f"it has prompt and memory besides {known}, and the blocks would leave them out"


def test_children_that_some_checkpoints_have() -> None:
    """Language adapters of wav2vec 2.0, cross-attention of GPTBigCode."""
    speech = {"do_stable_layer_norm": True, "adapter_attn_dim": 8}
    assert refusal(layer_of("wav2vec2", **speech)).startswith("it has adapter_layer besides attention, dropout, ")
    assert refusal(layer_of("gpt_bigcode", add_cross_attention=True, multi_query=False)).startswith(
        "it has crossattention and ln_cross_"
    )


def test_layers_that_pass_their_projections_by() -> None:
    layer = layer_of("bloom", slow_but_exact=True, pretraining_tp=2)
    assert refusal(layer) == (
        "slow_but_exact=True with pretraining_tp=2 passes its output projections by, and with them an adapter there; "
        "set slow_but_exact=False"
    )
    split_of(layer_of("bloom", slow_but_exact=True, pretraining_tp=1), "layers.0")


def test_unknown_layers() -> None:
    text = refusal(layer_of("mamba"))
    families = ", ".join(family.__name__.rpartition(".")[2] for family in FAMILIES)
    assert text == (
        f"it is not known. The known layers are those of {families} and what is laid out as they are "
        "(meft.backbone.architectures.TABLE)"
    )
    assert "albert, bart, bert, " in families and ", llama, " in families
