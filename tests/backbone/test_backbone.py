"""A reversible backbone under whatever trains: methods of PEFT, full fine-tuning, in either order, switched later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import meft
from meft.backbone.layers import ReversibleLayer
from meft.errors import UnsupportedModelError
from support.peft_helpers import assert_close, assert_equal, batch_of, gradients, llama, outputs, snapshot

TASK = "CAUSAL_LM"
BATCH = batch_of("opt", TASK)
SAME = {"rtol": 1e-4, "atol": 1e-5}

Method = Callable[[nn.Module], nn.Module]


def peft(config: Any) -> Method:
    """A method of PEFT, its weights drawn anew so that they matter, the same each time."""

    def apply(model: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        model = get_peft_model(model, config())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    return apply


def bitfit(model: nn.Module) -> nn.Module:
    """Trains biases only, here also those of norms, since a Llama has no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name or "norm" in name)
    return model


def full(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


def lora(**options: Any) -> Callable[[], LoraConfig]:
    return lambda: LoraConfig(**{"task_type": TASK, "target_modules": ["q_proj", "down_proj"], "r": 4} | options)


INSIDE: dict[str, Method] = {
    "lora": peft(lora(lora_dropout=0.1)),
    "lora on all layers, ranks stabilised": peft(lora(target_modules="all-linear", use_rslora=True)),
    "dora": peft(lora(use_dora=True)),
    "lora beside trained embeddings": peft(lora(modules_to_save=["embed_tokens"])),
    "loha": peft(lambda: LoHaConfig(task_type=TASK, target_modules=["v_proj"], r=4)),
    "ia3": peft(
        lambda: IA3Config(
            task_type=TASK, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
    ),
}
PROMPTS: dict[str, Method] = {
    "prompt tuning": peft(lambda: PromptTuningConfig(task_type=TASK, num_virtual_tokens=3)),
    "p-tuning": peft(lambda: PromptEncoderConfig(task_type=TASK, num_virtual_tokens=3, encoder_hidden_size=16)),
}
METHODS = {**INSIDE, **PROMPTS, "bitfit": bitfit, "full": full}


def built(method: Method, order: str = "method first", **options: Any) -> nn.Module:
    """The same weights in either order."""
    model = llama()
    if order == "reversible first":
        return method(meft.make_reversible(model, **options)).train()
    return meft.make_reversible(method(model), **options).train()


def wrapped(model: nn.Module) -> int:
    return sum(isinstance(module, ReversibleLayer) for module in model.modules())


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["method first", "reversible first"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_stored_activations(method: str, order: str) -> None:
    model = built(METHODS[method], order)
    found = gradients(model, BATCH)
    assert_close(found, gradients(built(METHODS[method], backward="cached"), BATCH), 1e-6)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(found) == trainable
    assert wrapped(model) == 3


@pytest.mark.parametrize("options", [{"sign": "random"}, {"granularity": "block"}, {"coupling": "meft3"}], ids=str)
@pytest.mark.parametrize("method", ["lora", "ia3", "prompt tuning", "bitfit"])
def test_under_other_couplings(method: str, options: dict[str, Any]) -> None:
    found, stored = (
        gradients(built(METHODS[method], **options, backward=backward), BATCH) for backward in ("reversible", "cached")
    )
    assert_close(found, stored, 1e-6)


def test_prefix_tuning_is_refused_in_training() -> None:
    """Prefixes come as a filled cache, which a rebuilt layer could not read again; evaluation reads it."""
    model = built(peft(lambda: PrefixTuningConfig(task_type=TASK, num_virtual_tokens=3)))
    with pytest.raises(UnsupportedModelError, match=r"holding 3 tokens \(prefix tuning"):
        model(**BATCH)
    assert torch.isfinite(model.eval()(**BATCH).loss)


# --- There and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["method first", "reversible first"])
@pytest.mark.parametrize("method", METHODS)
def test_restored_it_is_the_model_trained_without(method: str, order: str) -> None:
    """The same names, the same weights, the same outputs."""
    model, plain = built(METHODS[method], order).eval(), METHODS[method](llama()).eval()
    assert not torch.equal(outputs(model, BATCH), outputs(plain, BATCH))
    meft.restore(model)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert_equal(model.state_dict(), plain.state_dict())
    assert torch.equal(outputs(model, BATCH), outputs(plain, BATCH))


@pytest.mark.parametrize("method", INSIDE)
def test_saved_it_is_an_ordinary_checkpoint(method: str, tmp_path: Path) -> None:
    """Still reversible or restored: the files of the model trained without, which load on a plain base."""
    model, plain = built(METHODS[method], "reversible first"), METHODS[method](llama()).eval()
    model.save_pretrained(tmp_path / "reversible")
    meft.restore(model).save_pretrained(tmp_path / "restored")
    plain.save_pretrained(tmp_path / "plain")
    expected = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    for name in ("reversible", "restored"):
        assert_equal(load_file(tmp_path / name / "adapter_model.safetensors"), expected)
        loaded = PeftModel.from_pretrained(llama(), tmp_path / name).eval()
        assert torch.equal(outputs(loaded, BATCH), outputs(plain, BATCH))


def test_loaded_onto_a_reversible_backbone(tmp_path: Path) -> None:
    model = built(METHODS["lora"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(meft.make_reversible(llama()), tmp_path, is_trainable=True).train()
    assert_equal(gradients(loaded, BATCH), gradients(model, BATCH))


# --- Merging and unloading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["method first", "reversible first"])
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "ia3"])
def test_merged_before_and_after_restoring(method: str, order: str) -> None:
    """Merging takes the adapter's layers away and leaves the coupling; restoring takes that, in any order."""
    expected = METHODS[method](llama()).eval().merge_and_unload()
    coupled = outputs(built(METHODS[method], order).eval(), BATCH)
    merged = built(METHODS[method], order).eval().merge_and_unload(safe_merge=True)
    assert wrapped(merged) == 3
    torch.testing.assert_close(outputs(merged, BATCH), coupled, rtol=1e-3, atol=1e-3)
    merged = meft.restore(merged)
    restored = meft.restore(built(METHODS[method], order).eval()).merge_and_unload()
    for model in (merged, restored):
        assert wrapped(model) == 0
        assert_equal(model.state_dict(), expected.state_dict())
        assert torch.equal(outputs(model, BATCH), outputs(expected, BATCH))


@pytest.mark.parametrize("order", ["method first", "reversible first"])
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_unloaded_before_and_after_restoring(method: str, order: str) -> None:
    plain = outputs(METHODS[method](llama()).unload().eval(), BATCH)
    base = built(METHODS[method], order).unload()
    assert wrapped(base) == 3 and gradients(full(base.train()), BATCH)
    assert torch.equal(outputs(meft.restore(base.eval()), BATCH), plain)
    assert torch.equal(outputs(meft.restore(built(METHODS[method], order)).unload().eval(), BATCH), plain)


# --- Adapters added, switched, disabled and deleted later -------------------------------------------------------------


def with_second(order: str, *, use_dora: bool = True) -> PeftModel:
    model = built(METHODS["lora"], order)
    torch.manual_seed(4)
    model.add_adapter("other", lora(use_dora=use_dora, target_modules=["v_proj"], init_lora_weights=False)())
    return model.train()


@pytest.mark.parametrize("order", ["method first", "reversible first"])
def test_adapters_switched_and_deleted(order: str) -> None:
    model = with_second(order)
    first = gradients(model, BATCH)
    assert_equal(first, gradients(built(METHODS["lora"]), BATCH))
    model.set_adapter("other")
    second = gradients(model, BATCH)
    assert all(".other." in name for name in second)
    twin = with_second(order)
    meft.make_reversible(meft.restore(twin), backward="cached")
    twin.set_adapter("other")
    assert_close(second, gradients(twin, BATCH), 1e-6)
    model.delete_adapter("default")
    assert_equal(gradients(model, BATCH), second)
    model.eval()
    coupled = outputs(model, BATCH)
    meft.restore(model)
    assert not torch.equal(outputs(model, BATCH), coupled) and list(model.peft_config) == ["other"]


@pytest.mark.parametrize("order", ["method first", "reversible first"])
def test_adapters_disabled(order: str) -> None:
    model = with_second(order).eval()
    bare = outputs(meft.make_reversible(llama()).eval(), BATCH)
    with model.disable_adapter():
        assert torch.equal(outputs(model, BATCH), bare)
    assert not torch.equal(outputs(model, BATCH), bare)
    meft.restore(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model, BATCH), outputs(llama().eval(), BATCH))


def test_several_adapters_of_a_method_together() -> None:
    """LoRA adds up, which a coupling does not mind; so does a weighted sum."""
    found = []
    for backward in ("reversible", "cached"):
        model = built(METHODS["lora"], backward=backward)
        torch.manual_seed(4)
        model.add_adapter("other", lora(init_lora_weights=False)())
        model.add_weighted_adapter(["default", "other"], [0.3, 0.7], "sum", combination_type="linear")
        model.base_model.set_adapter(["default", "sum"])
        found.append(gradients(model.train(), BATCH))
    assert {name.split(".")[-2] for name in found[0]} == {"default", "sum"}
    assert_close(*found, 1e-6)


def test_another_adapter_for_each_row() -> None:
    model = with_second("method first", use_dora=False).eval()
    rows: list[Tensor] = []
    for name in ("default", "other"):
        model.set_adapter(name)
        rows.append(outputs(model, BATCH).view(3, -1))
    found = outputs(model, {**BATCH, "adapter_names": ["default", "other", "default"]}).view(3, -1)
    for index, expected in enumerate((rows[0][0], rows[1][1], rows[0][2])):
        torch.testing.assert_close(found[index], expected, **SAME)


def test_made_reversible_again_and_again() -> None:
    """Nothing is left behind by a conversion that was taken back."""
    model = METHODS["lora"](llama()).train()
    plain, weights = gradients(model, BATCH), snapshot(model)
    for options in ({"gamma": 1 / 8}, {"coupling": "meft1"}, {"sign": "random"}, {}):
        meft.make_reversible(model, **options)
        assert_equal(gradients(model, BATCH), gradients(built(METHODS["lora"], **options), BATCH))
        meft.restore(model)
    assert_equal(model.state_dict(), weights)
    assert_equal(gradients(model, BATCH), plain)
