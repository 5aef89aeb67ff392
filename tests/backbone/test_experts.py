from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import meft
from meft.backbone import experts


def mixtral(implementation: str) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        experts_implementation=implementation,
    )
    return MixtralForCausalLM(config).train()


def test_experts_on_a_processor_stay_as_they_are() -> None:
    model = meft.make_reversible(mixtral("eager"))
    assert model.config._experts_implementation == "eager"


def test_experts_on_an_accelerator_add_up_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(experts, "on_accelerator", lambda device: True)
    monkeypatch.setattr("meft.backbone.conversion.logger.warning", said.append)
    model = meft.make_reversible(mixtral("eager"))
    assert model.config._experts_implementation == "grouped_mm"
    assert len(said) == 1 and said[0].startswith(
        "The experts of model.layers of MixtralModel run as grouped_mm instead"
    )
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    meft.restore(model)
    assert model.config._experts_implementation == "eager"
    # What was chosen is not chosen again.
    meft.make_reversible(mixtral("batched_mm"))
    assert len(said) == 1


def test_experts_stay_where_nothing_else_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "on_accelerator", lambda device: True)
    monkeypatch.setattr(
        MixtralForCausalLM.__mro__[1], "get_correct_experts_implementation", lambda self, wanted: "eager"
    )
    assert meft.make_reversible(mixtral("eager")).config._experts_implementation == "eager"
