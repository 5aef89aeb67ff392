"""A row of the table holds for layers that run the code it was written for, and for no others."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from meft.backbone.architectures import TABLE, architecture_of, split_of
from meft.errors import UnsupportedModelError
from meft_lab.families.shrink import tiny_config

ROW = TABLE["LlamaDecoderLayer"]


class Renamed(LlamaDecoderLayer):
    """A subclass as users write it, and as FSDP makes it: another name, the same forward."""


class Overriding(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super().forward(hidden_states, **kwargs) * 2


class Wrapping(LlamaDecoderLayer):
    @wraps(LlamaDecoderLayer.forward)
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return LlamaDecoderLayer.forward(self, *args, **kwargs) * 2


def namesake() -> type[nn.Module]:
    class LlamaDecoderLayer(nn.Module):
        def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
            super().__init__()
            self.self_attn = self.mlp = nn.Linear(32, 32)

        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return self.mlp(hidden_states)

    # As if it stood at the top of a module.
    LlamaDecoderLayer.forward.__qualname__ = "LlamaDecoderLayer.forward"
    return LlamaDecoderLayer


def layer(kind: type[nn.Module] = LlamaDecoderLayer) -> nn.Module:
    return kind(tiny_config("llama"), 0)


@pytest.mark.parametrize("kind", [LlamaDecoderLayer, Renamed, type("FSDPLlamaDecoderLayer", (Renamed,), {})])
def test_the_class_and_its_heirs(kind: type[nn.Module]) -> None:
    assert architecture_of(layer(kind)) is ROW
    assert split_of(layer(kind), "layers.0") is ROW


@pytest.mark.parametrize("kind", [Overriding, Wrapping, namesake()])
def test_another_forward(kind: type[nn.Module]) -> None:
    assert architecture_of(layer(kind)) is None
    with pytest.raises(UnsupportedModelError, match=f"cannot split layers.0 of M, a {kind.__name__}, into"):
        split_of(layer(kind), "layers.0 of M")


def test_a_namesake_is_told_so() -> None:
    with pytest.raises(UnsupportedModelError, match=r"block: its forward is not the one of Transformers\. The known"):
        split_of(layer(namesake()), "layers.0")


def test_a_patched_class(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained = layer()
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, hidden_states, **kwargs: hidden_states)
    assert architecture_of(pretrained) is None


def test_a_patched_instance() -> None:
    pretrained = layer()
    pretrained.forward = lambda hidden_states, **kwargs: hidden_states  # type: ignore[method-assign]
    assert architecture_of(pretrained) is None


def test_hooks_of_accelerate_run_the_same_code() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    pretrained = add_hook_to_module(layer(), AlignDevicesHook("cpu", io_same_device=True))
    assert "forward" in vars(pretrained) and architecture_of(pretrained) is ROW
