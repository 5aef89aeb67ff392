"""The checks see what goes wrong: each is shown a model or a library with one thing broken."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

from meft.backbone.layers import ReversibleLayer
from meft.errors import UnsupportedModelError
from meft_lab.families import check as checks
from meft_lab.families.catalogue import CATALOGUE
from meft_lab.families.check import WORKS, PlainModelError, Subject, Verdict, check, check_head
from meft_lab.families.family import Family
from meft_lab.families.inputs import pixels
from meft_lab.families.matrix import quiet

LLAMA = Family("llama")


@pytest.fixture(autouse=True)
def without_reports() -> Iterator[None]:
    with quiet():
        yield


@pytest.fixture
def subject() -> Subject:
    return Subject.make(LLAMA)


def test_nothing_broken(subject: Subject) -> None:
    assert check(subject, "meft1") == Verdict(WORKS)


@pytest.mark.parametrize("way", ["meft1", "full"])
def test_a_layer_that_computes_something_else_the_second_time(
    subject: Subject, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, honest = itertools.count(), LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: honest(self, x) + 0.01 * next(count))
    found = check(subject, way)
    assert found.state == "failed"
    assert found.detail.startswith("training step: ReconstructionError: ")


def test_wrong_gradients(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that has other gradients when it is run again than when its activations were kept."""
    honest = LlamaMLP.forward

    def forward(self: LlamaMLP, x: Tensor) -> Tensor:
        inside = any("_backward" in name for name in _callers())
        return _Doubled.apply(honest(self, x)) if inside else honest(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    found = check(subject, "full")
    assert found.state == "failed"
    assert found.detail.startswith("reconstruction and gradients: gradients differ from those of stored activations by")


def test_adapters_that_do_not_move(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    found = check(subject, "momentum")
    assert found.state == "failed"
    assert found.detail.startswith(
        "training step: 12 trained parameters did not move: base_model.model.model.layers.0."
    )


def test_parameters_that_no_loss_reaches_need_not_move() -> None:
    """The last layer of LLaVA's vision tower, whose output is not read, and a stack that no word goes through."""
    subject = Subject.make(CATALOGUE["llava, both towers"])
    assert subject.reached["model.vision_tower.encoder.layers"] == {0, 1}
    assert subject.reached["model.language_model.layers"] == {0, 1, 2}
    assert check_head(subject, "momentum") == Verdict(WORKS)


def test_a_cache_that_is_not_filled(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ReversibleLayer.forward

    def forward(self: ReversibleLayer, *args: Any, **kwargs: Any) -> Any:
        return honest(self, *args, **{**kwargs, "past_key_values": None})

    monkeypatch.setattr(ReversibleLayer, "forward", forward)
    found = check(subject, "full")
    assert found.state == "failed"
    assert found.detail.startswith("generation: ")


def test_a_cache_that_the_plain_model_does_not_fill_either(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = LlamaAttention.forward

    def forward(self: LlamaAttention, *args: Any, **kwargs: Any) -> Any:
        return honest(self, *args, **{**kwargs, "past_key_values": None})

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    assert check(subject, "full") == Verdict(
        WORKS, "The plain model, too, generates other words with a cache than without."
    )


@pytest.mark.parametrize("way", ["meft2", "full"])
def test_weights_that_are_lost_on_loading(subject: Subject, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = (checks, "make_reversible") if way == "full" else (checks.PeftModel, "from_pretrained")
    honest = getattr(owner, name)

    def load(*args: Any, **kwargs: Any) -> nn.Module:
        loaded = honest(*args, **kwargs)
        with torch.no_grad():
            next(p for name, p in loaded.named_parameters() if way == "full" or "meft_g_up" in name).add_(1e-3)
        return loaded

    monkeypatch.setattr(owner, name, load)
    found = check(subject, way)
    assert found.state == "failed"
    assert found.detail.startswith("saving and loading: 1 weights are others after loading: ")


def test_weights_that_the_plain_model_loses_too(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = type(subject.base).from_pretrained

    def load(*args: Any, **kwargs: Any) -> nn.Module:
        loaded = honest(*args, **kwargs)
        loaded.model.embed_tokens.weight.data[1] = 0
        return loaded

    monkeypatch.setattr(type(subject.base), "from_pretrained", load)
    assert check(subject, "full") == Verdict(WORKS, "The plain model, too, comes back with other weights.")


def test_buffers_that_the_plain_model_changes(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = LlamaMLP.forward

    def forward(self: LlamaMLP, x: Tensor) -> Tensor:
        if self.training and not torch.is_inference_mode_enabled():
            self.seen = self.seen + 1  # without a change of what is computed
        return honest(self, x)

    for layer in subject.base.model.layers:
        layer.mlp.register_buffer("seen", torch.zeros(()))
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    assert check(subject, "meft1") == Verdict(
        WORKS, "The plain model changes its buffers in training, and PEFT does not save them."
    )


def test_outputs_that_change_on_loading(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = checks.make_reversible
    monkeypatch.setattr(checks, "make_reversible", lambda model, **options: honest(model, gamma=0.5, **options))
    found = check(subject, "full")
    assert found == Verdict("failed", "saving and loading: other outputs after loading: loss, logits")


def test_a_layer_that_is_left_out_of_the_reconstruction(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Subject.converted

    def converted(self: Subject, way: str) -> nn.Module:
        model = honest(self, way)
        for layer in model.model.layers:
            reversible_stack = layer._placement.reversible_stack
        reversible_stack.plan = type(reversible_stack.plan)(**{**vars(reversible_stack.plan), "cached_layers": 1})
        return model

    monkeypatch.setattr(Subject, "converted", converted)
    found = check(subject, "full")
    assert found.state == "failed"
    assert "layers rebuilt are {'model.layers': 2}, not {'model.layers': 3}" in found.detail


def test_a_loss_that_is_not_finite(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = checks.loss_on
    monkeypatch.setattr(checks, "loss_on", lambda model, batch: honest(model, batch) * float("inf"))
    assert check_head(subject, "full") == Verdict("failed", "training step: the loss is inf")


def test_an_error_of_another_kind_is_a_failure(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = LlamaDecoderLayer.forward

    def forward(self: LlamaDecoderLayer, *args: Any, **kwargs: Any) -> Any:
        if any("run_layer" in name for name in _callers()):
            raise KeyError("hidden_states")
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    assert check(subject, "meft1") == Verdict("failed", "first forward pass: KeyError: 'hidden_states'")


def test_a_refusal_in_the_middle_of_the_training_is_a_failure(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(*_: Any) -> None:
        raise UnsupportedModelError("too late")

    monkeypatch.setattr(checks, "verify", verify)
    assert check(subject, "meft1") == Verdict("failed", "reconstruction and gradients: UnsupportedModelError: too late")


def test_a_plain_model_that_cannot_be_run() -> None:
    with pytest.raises(PlainModelError, match="You must specify exactly one of input_ids"):
        _ = Subject.make(Family("llama", inputs=pixels, head="base")).reached
    with pytest.raises(PlainModelError, match="No tiny configuration of llama can be made"):
        Subject.make(Family("llama", {"hidden_size": 33}))


def test_checks_leave_the_model_and_the_generator_alone(subject: Subject) -> None:
    before = {name: tensor.clone() for name, tensor in subject.base.state_dict().items()}
    state = torch.get_rng_state()
    check(subject, "full")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.base.state_dict().items())
    assert all(parameter.grad is None for parameter in subject.base.parameters())


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def _callers() -> list[str]:
    import sys

    frame, names = sys._getframe(1), []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names
