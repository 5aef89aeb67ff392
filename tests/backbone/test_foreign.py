"""Other libraries around reversible layers: what works under gradient checkpointing works, the rest says why not."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

import meft
from meft.engine.replay import of_one_call
from meft.errors import UnsupportedModelError
from support import models
from support.peft_helpers import adapted, assert_close, assert_equal, batch_of, gradients, llama, taken

IDS = torch.tensor([[4, 5, 6, 7, 8, 3], [9, 3, 5, 6, 7, 6], [3, 4, 5, 6, 7, 9]])
WORDS = {"input_ids": IDS, "labels": IDS}


def reversible(kind: str, **options: Any) -> Any:
    if kind == "meft":
        return adapted("bert", **options)
    return meft.make_reversible(models.build("bert", layers=3), **options)


# --- torch.func and forward mode --------------------------------------------------------------------------------------


def one_gradient(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return grad(lambda w: functional_call(model, w, (), batch).loss)(weights)


def each_gradient(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: Any, ids: Tensor, label: Tensor) -> Tensor:
        return functional_call(model, weights, (), {"input_ids": ids[None], "labels": label[None]}).loss

    return vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(weights, batch["input_ids"], batch["labels"])


def tangent(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    ones = {name: torch.ones_like(p) for name, p in weights.items()}
    return jvp(lambda w: functional_call(model, w, (), batch).loss, (weights,), (ones,))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("backward", ["reversible", "cached"])
@pytest.mark.parametrize("kind", ["full", "meft"])
@pytest.mark.parametrize("transform", [one_gradient, each_gradient, tangent])
def test_transforms_are_refused(transform: Any, kind: str, backward: str, mode: str) -> None:
    model = reversible(kind, backward=backward).train(mode == "train")
    with pytest.raises(UnsupportedModelError, match=r"under a transform of torch\.func .*meft\.restore\(model\)"):
        transform(model, batch_of("bert"))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_forward_mode_is_refused(mode: str) -> None:
    model = reversible("full").train(mode == "train")
    embedded = model.bert.embeddings.word_embeddings(IDS).detach()
    with forward_ad.dual_level(), pytest.raises(UnsupportedModelError, match="forward-mode differentiation"):
        model(inputs_embeds=forward_ad.make_dual(embedded, torch.ones_like(embedded)))
    meft.restore(model)
    with forward_ad.dual_level():
        made = model(inputs_embeds=forward_ad.make_dual(embedded, torch.ones_like(embedded))).logits
        assert forward_ad.unpack_dual(made).tangent is not None


# --- Programs ---------------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python:torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["full", "meft"])
def test_tracing_is_refused_and_export_works(kind: str) -> None:
    model = reversible(kind)
    batch = {name: value for name, value in batch_of("bert").items() if name != "labels"}
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"torch\.jit\.trace .*torch\.export\.export"):
        torch.jit.trace(Logits(model.eval()), (batch["input_ids"], batch["attention_mask"]))
    with torch.no_grad():
        exported = torch.export.export(Logits(model), (), kwargs=batch, strict=False).module()
        assert torch.equal(exported(**batch), model(**batch).logits)


# --- Per-sample gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "meft"])
def test_opacus_is_refused(kind: str) -> None:
    """Its GradSampleModule gives all trained weights this attribute, and its hooks fill it."""
    model = reversible(kind)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad_sample = None
    with pytest.raises(UnsupportedModelError, match=r"grad_sample: per-sample gradients \(Opacus\)"):
        model(**batch_of("bert"))
    with torch.no_grad():
        model.eval()(**batch_of("bert"))


# --- PEFT's methods that hand something to layers for the time of a call ----------------------------------------------


def activated() -> nn.Module:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        alora_invocation_tokens=[6, 7],
        init_lora_weights=False,
    )
    return get_peft_model(llama(), config)


def poly() -> nn.Module:
    config = peft.PolyConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, n_tasks=3, n_skills=2, n_splits=1, init_weights=False
    )
    return get_peft_model(llama(), config)


@pytest.mark.parametrize("make", [activated, poly])
def test_methods_that_use_hooks_for_the_time_of_a_call(make: Any) -> None:
    def found(backward: str) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = meft.make_reversible(make(), backward=backward).train()
        more = {"task_ids": torch.tensor([0, 1, 2])} if make is poly else {}
        model(**WORDS, **more).loss.backward()
        return taken(model)

    assert_equal(found("reversible"), found("cached"))


def test_hooks_of_another_threads_call_are_neither_recorded_nor_taken_off() -> None:
    """They place adapters for the time of one call, on modules that all threads share."""
    model, seen = meft.make_reversible(llama()), []
    module = model.model.layers[1].mlp
    expected = gradients(model, WORDS)

    @of_one_call
    def passing(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(len(seen))
        return output

    handle = module.register_forward_hook(passing)
    loss = model(**WORDS).loss
    handle.remove()
    loss.backward()
    assert_equal(taken(model), expected)
    assert len(seen) == 1
    lasting = module.register_forward_hook(lambda module, args, output: None)
    loss = model(**WORDS).loss
    lasting.remove()
    handle = module.register_forward_hook(passing)
    loss.backward()
    assert len(seen) == 2 and list(module._forward_hooks.values()) == [passing]
    handle.remove()


def test_hooks_of_a_forward_pass_are_those_of_its_recomputation() -> None:
    """Taken off before the backward pass, and others put on; the modules have theirs again afterwards."""
    expected = {}
    for backward in ("cached", "reversible"):
        model = meft.make_reversible(llama(), backward=backward)
        module = model.model.layers[1].mlp
        handle = module.register_forward_hook(lambda module, args, output: 2 * output)
        loss = model(**WORDS).loss
        handle.remove()
        later = module.register_forward_hook(lambda module, args, output: 3 * output)
        loss.backward()
        assert list(module._forward_hooks) == [later.id]
        later.remove()
        expected[backward] = taken(model)
    assert_close(expected["reversible"], expected["cached"], 1e-6)
    assert gradients(model, WORDS)
