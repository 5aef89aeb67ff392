from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from meft.cli import main
from meft.verification.doctor import examine

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


def llama(dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, attention_dropout=dropout, use_cache=False, **SIZES)
    return LlamaForCausalLM(config).train()


BATCH = {"input_ids": torch.arange(24).view(2, 12)}


class Drifting(nn.Module):
    """As a kernel that adds up in an order of its own: other last bits in every call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, itertools.count()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden) * (1 + 1e-6 * next(self.calls))


def test_a_sound_model_passes_also_with_dropout() -> None:
    model = llama(dropout=0.5)
    found = examine(model, BATCH)
    assert found.passed() and [one.name for one in found.layers] == [f"model.layers.{index}" for index in range(3)]
    assert "3 of 3 layers return the same bits twice" in str(found) and "tensor code" in str(found)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_module_that_does_not_is_named_with_what_to_set() -> None:
    model = llama()
    model.model.layers[1].mlp.down_proj = Drifting(model.model.layers[1].mlp.down_proj)
    found = examine(model, BATCH)
    assert not found.passed() and [one.forward for one in found.layers] == [True, False, True]
    assert found.layers[1].module == "mlp.down_proj"
    assert "model.layers.1: its output has other bits the second time in mlp.down_proj. Call torch.use_det" in str(
        found
    )


@pytest.mark.parametrize("sound", [True, False])
def test_the_command(sound: bool, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any) -> None:
    llama().save_pretrained(tmp_path)
    if not sound:
        plain, calls = LlamaMLP.forward, itertools.count()
        monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x) * (1 + 1e-6 * next(calls)))
    words = ["doctor", str(tmp_path), "--task_type", "CAUSAL_LM", "--seq_length", "8", "--device", "cpu"]
    assert _code(words) == (0 if sound else 1)
    text = capsys.readouterr().out
    assert ("3 of 3 layers" in text) == sound and ("time in mlp." in text) != sound


def _code(words: list[str]) -> int:
    try:
        return main(words) or 0
    except SystemExit as end:
        return int(end.code or 0)
