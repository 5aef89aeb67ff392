"""`make_reversible` and `restore`: any model in place, with LoRA or full fine-tuning, and back without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import meft
from meft.backbone.layers import ReversibleLayer
from meft.errors import ModifiedTensorError, ReconstructionError, UnsupportedModelError
from support import models
from support.peft_helpers import (
    COUPLINGS,
    TASK_OF,
    anatomy,
    assert_close,
    assert_equal,
    batch_of,
    gradients,
    llama,
    neox,
    outputs,
    snapshot,
    taken,
)

FAMILY_COUPLINGS = [(family, coupling) for family in models.FAMILIES for coupling in COUPLINGS]

PROJECTIONS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "bart": ["q_proj", "v_proj"],
    "opt": ["q_proj", "v_proj"],
    "opt_350m": ["q_proj", "v_proj"],
}


def base_of(family: str, **options: Any) -> PreTrainedModel:
    return models.build(family, TASK_OF[family], **{"layers": 3, **options})


def with_lora(model: nn.Module, family: str) -> PeftModel:
    config = LoraConfig(task_type=TASK_OF[family], target_modules=PROJECTIONS[family], r=4, lora_dropout=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return model.train()


# --- There and back ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Layer drop:meft.errors.MeftWarning")
@pytest.mark.parametrize(("family", "coupling"), FAMILY_COUPLINGS)
def test_there_and_back(family: str, coupling: str) -> None:
    """Names stay, the very objects come back, and so do training flags, frozen parameters and layer drop."""
    model = base_of(family, dropout=0.2).eval()
    layer = next(iter(models.stacks(model).values()))[1].train()
    next(layer.children()).eval()
    for module in model.modules():
        if hasattr(module, "layerdrop"):
            module.layerdrop = 0.25
    before, weights, names = anatomy(model), snapshot(model), [name for name, _ in model.named_parameters()]
    expected = outputs(model, batch_of(family))
    assert meft.make_reversible(model, coupling, frozen_layers=1, cached_layers=1) is model
    assert_equal(model.state_dict(), weights)
    assert [name for name, _ in model.named_parameters()] == names
    assert sum(isinstance(module, ReversibleLayer) for module in model.modules()) == (6 if family == "bart" else 3)
    assert not torch.equal(outputs(model, batch_of(family)), expected)
    assert not any(module.layerdrop for module in model.modules() if hasattr(module, "layerdrop"))
    assert meft.restore(model) is model
    assert anatomy(model) == before
    assert_equal(model.state_dict(), weights)
    assert torch.equal(outputs(model, batch_of(family)), expected)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_restoring_keeps_what_was_done_meanwhile(family: str) -> None:
    """Weights as trained, training flags as last set, and parameters frozen by the user."""
    model = meft.make_reversible(base_of(family))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    first = next(iter(models.stacks(model).values()))[0]
    for parameter in first.parameters():
        parameter.requires_grad_(False)
    model.eval()
    weights = snapshot(model)
    meft.restore(model)
    assert_equal(model.state_dict(), weights)
    assert not any(module.training for module in model.modules())
    first = next(iter(models.stacks(model).values()))[0]
    assert not isinstance(first, ReversibleLayer)
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_frozen_layers_require_no_gradient_until_restored() -> None:
    model = meft.make_reversible(base_of("bert"), frozen_layers=2)
    layers = model.bert.encoder.layer
    assert [all(p.requires_grad for p in layer.parameters()) for layer in layers] == [False, False, True]
    assert not any(".layer.0." in name or ".layer.1." in name for name in gradients(model, batch_of("bert")))
    meft.restore(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("call", ["eval", "train", "requires_grad_", "double", "zero_grad", "apply", "children"])
def test_modules_behave_as_before(call: str) -> None:
    """What users do to a model reaches the pretrained layers' own modules and parameters."""
    model = meft.make_reversible(base_of("bart"))
    twin = base_of("bart")
    for one in (model, twin):
        if call == "requires_grad_":
            one.requires_grad_(False)
        elif call == "apply":
            one.apply(lambda module: module.weight.data.fill_(0.5) if isinstance(module, nn.Linear) else None)
        else:
            getattr(one, call)()
    meft.restore(model)
    assert {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()} == {
        name: (p.dtype, p.requires_grad) for name, p in twin.named_parameters()
    }
    assert {n: m.training for n, m in model.named_modules()} == {n: m.training for n, m in twin.named_modules()}
    assert_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("family", models.FAMILIES)
def test_dropout_follows_the_mode(family: str) -> None:
    """Some layers drop by their own flag, some by those of their children."""
    model, batch = meft.make_reversible(base_of(family, dropout=0.5)), batch_of(family)
    assert not torch.equal(outputs(model, batch, seed=1), outputs(model, batch, seed=2))
    model.eval()
    assert torch.equal(outputs(model, batch, seed=1), outputs(model, batch, seed=2))
    model.train()
    assert not torch.equal(outputs(model, batch, seed=1), outputs(model, batch, seed=2))


# --- Full fine-tuning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "coupling"), FAMILY_COUPLINGS)
def test_full_fine_tuning(family: str, coupling: str) -> None:
    """Every parameter, embeddings included, gets the gradient that stored activations give."""
    found, stored = (
        gradients(meft.make_reversible(base_of(family, dropout=0.1), coupling, backward=backward), batch_of(family))
        for backward in ("reversible", "cached")
    )
    assert set(found) == {name for name, _ in base_of(family).named_parameters()} & set(found)
    assert any("embed" in name for name in found)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert_close(found, stored, 1e-5)


@pytest.mark.parametrize("build", [llama, neox, lambda: llama(tie_word_embeddings=True)], ids=["llama", "neox", "tied"])
@pytest.mark.parametrize("coupling", ["meft1", "meft2", "momentum"])
def test_other_models(coupling: str, build: Callable[[], PreTrainedModel]) -> None:
    """Layers without a row in the table are taken as a whole."""
    batch = batch_of("opt", "CAUSAL_LM")
    found, stored = (
        gradients(meft.make_reversible(build().train(), coupling, backward=backward), batch)
        for backward in ("reversible", "cached")
    )
    assert len(found) == len(list(build().parameters()))
    assert_close(found, stored, 1e-5)


def test_full_fine_tuning_saves_an_ordinary_checkpoint(tmp_path: Any) -> None:
    model = meft.make_reversible(base_of("opt"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for name, gradient in gradients(model, batch_of("opt")).items():
        model.get_parameter(name).grad = gradient
    optimizer.step()
    optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert_equal(loaded.state_dict(), model.state_dict())
    assert not any(isinstance(module, ReversibleLayer) for module in loaded.modules())
    plain = meft.restore(model)
    assert torch.equal(outputs(loaded.eval(), batch_of("opt")), outputs(plain.eval(), batch_of("opt")))
    again = [gradients(meft.make_reversible(one.train()), batch_of("opt")) for one in (loaded, plain)]
    assert_equal(*again)


def test_weights_changed_before_backward_are_refused() -> None:
    model = meft.make_reversible(base_of("bert"))
    loss = model(**batch_of("bert")).loss
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.weight.mul_(2)
    with pytest.raises(ModifiedTensorError, match=r"Call backward\(\) before optimizer\.step\(\)"):
        loss.backward()


def test_parameters_swapped_for_a_call_are_missed() -> None:
    """torch.func.functional_call: an error, not silently fewer gradients."""
    model = meft.make_reversible(base_of("bert"))
    swapped = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    loss = torch.func.functional_call(model, swapped, (), batch_of("bert")).loss
    with pytest.raises(ModifiedTensorError, match=r"no longer its own.*functional_call"):
        loss.backward()


# --- LoRA -------------------------------------------------------------------------------------------------------------


def lora_first(family: str, coupling: str, backward: str) -> nn.Module:
    return meft.make_reversible(with_lora(base_of(family, dropout=0.1), family), coupling, backward=backward)


def reversible_first(family: str, coupling: str, backward: str) -> nn.Module:
    return with_lora(meft.make_reversible(base_of(family, dropout=0.1), coupling, backward=backward), family)


@pytest.mark.parametrize("order", [lora_first, reversible_first])
@pytest.mark.parametrize(("family", "coupling"), FAMILY_COUPLINGS)
def test_lora_in_either_order(family: str, coupling: str, order: Callable[..., PeftModel]) -> None:
    model, stored = order(family, coupling, "reversible"), lora_first(family, coupling, "cached")
    found = gradients(model, batch_of(family))
    assert all("lora_" in name or "modules_to_save" in name for name in found)
    assert any("lora_A" in name for name in found)
    assert_close(found, gradients(stored, batch_of(family)), 1e-5)


@pytest.mark.parametrize("order", [lora_first, reversible_first])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_lora_disabled_saved_merged_and_restored(family: str, order: Callable[..., PeftModel], tmp_path: Any) -> None:
    """An ordinary LoRA checkpoint comes out, which loads on the plain model and merges."""
    model, batch = order(family, "momentum", "reversible").eval(), batch_of(family)
    plain = with_lora(base_of(family, dropout=0.1), family).eval()
    bare = meft.make_reversible(base_of(family, dropout=0.1)).eval()
    assert not torch.equal(outputs(model, batch), outputs(plain, batch))
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch), outputs(bare, batch))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of(family), tmp_path).eval()
    assert torch.equal(outputs(loaded, batch), outputs(plain, batch))
    meft.restore(model)
    assert torch.equal(outputs(model, batch), outputs(plain, batch))
    assert_equal(model.state_dict(), plain.state_dict())
    merged, expected = model.merge_and_unload(), plain.merge_and_unload()
    assert torch.equal(outputs(merged, batch), outputs(expected, batch))


@pytest.mark.parametrize("order", [lora_first, reversible_first])
def test_merging_while_reversible(order: Callable[..., PeftModel]) -> None:
    model, batch = order("opt", "momentum", "reversible").eval(), batch_of("opt")
    before = outputs(model, batch)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, batch), before, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, batch), before, rtol=1e-3, atol=1e-3)
    assert sum(isinstance(module, ReversibleLayer) for module in merged.modules()) == 3
    assert not any("lora" in name for name in merged.state_dict())
    restored = meft.restore(merged)
    plain = with_lora(base_of("opt", dropout=0.1), "opt").eval().merge_and_unload()
    torch.testing.assert_close(outputs(restored, batch), outputs(plain, batch))


@pytest.mark.parametrize("order", [lora_first, reversible_first])
def test_a_reference_pass_between_forward_and_backward(order: Callable[..., PeftModel]) -> None:
    """What DPO does with LoRA: the base model as reference, through the same reversible layers."""
    model, batch = order("opt", "momentum", "reversible"), batch_of("opt")
    expected = gradients(model, batch)
    torch.manual_seed(1)
    loss = model(**batch).loss
    with torch.no_grad(), model.disable_adapter():
        model(**batch)
    loss.backward()
    assert_equal(taken(model), expected)


@pytest.mark.parametrize("order", [lora_first, reversible_first])
def test_lora_adapters_switched_and_unloaded(order: Callable[..., PeftModel]) -> None:
    """The rebuilt layers would run another adapter, which the integrity check notices."""
    model, batch = order("opt", "momentum", "reversible"), batch_of("opt")
    expected = gradients(model, batch)
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj"], init_lora_weights=False))
    model.set_adapter("other")
    assert all(".other." in name for name in gradients(model, batch))
    model.set_adapter("default")
    assert_equal(gradients(model, batch), expected)
    loss = model(**batch).loss
    model.set_adapter("other")
    # PEFT 0.18 keeps what it switches where it is not seen; the rebuilt values tell.
    recent = Version(peft.__version__) >= Version("0.21")
    told = "Layer 2 returned other values in the recomputation" if recent else "is not the original"
    with pytest.raises(ReconstructionError, match=told):
        loss.backward()
    base = model.unload()
    assert torch.equal(outputs(base.eval(), batch), outputs(meft.make_reversible(base_of("opt")).eval(), batch))


def test_other_peft_methods() -> None:
    batch = batch_of("bert")
    for config in (
        IA3Config(task_type="SEQ_CLS", target_modules=["key", "value"], feedforward_modules=[]),
        PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    ):
        found = []
        for backward in ("reversible", "cached"):
            torch.manual_seed(4)
            model = get_peft_model(base_of("bert"), config)
            found.append(gradients(meft.make_reversible(model, backward=backward), batch))
        assert_close(*found, 1e-5)


def test_prefix_tuning_is_refused() -> None:
    """Prefixes come as a filled cache, which a rebuilt layer could not read again."""
    model = get_peft_model(base_of("bert"), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))
    meft.make_reversible(model)
    with pytest.raises(UnsupportedModelError, match="prefix tuning"):
        model(**batch_of("bert"))


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_backward_hooks_see_what_passes_between_layers(coupling: str) -> None:
    """Full backward hooks hang on aliases of the hidden state; those of FSDP do likewise."""
    model, batch = meft.make_reversible(base_of("bert"), coupling), batch_of("bert")
    expected = gradients(model, batch)
    seen: list[tuple[int, Tensor]] = []
    for index, layer in enumerate(model.bert.encoder.layer):
        layer.register_full_backward_hook(lambda module, above, below, index=index: seen.append((index, below[0])))
    assert_equal(gradients(model, batch), expected)
    assert [index for index, _ in seen] == [2, 1, 0]
    assert all(gradient.shape == (3, 7, 32) and gradient.count_nonzero() for _, gradient in seen)


# --- Copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bart", "opt"])
def test_copies_are_independent(family: str) -> None:
    model, batch = meft.make_reversible(base_of(family, dropout=0.2)), batch_of(family)
    loss = model(**batch).loss
    twin = copy.deepcopy(model)
    loss.backward()
    model.zero_grad()
    expected = gradients(model, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert_equal(gradients(twin, batch), expected)
    plain = meft.restore(twin)
    assert_equal(plain.state_dict(), base_of(family).state_dict())
    assert torch.equal(outputs(plain.eval(), batch), outputs(base_of(family).eval(), batch))
    assert any(isinstance(module, ReversibleLayer) for module in model.modules())


def test_a_pass_cut_short_leaves_nothing_behind() -> None:
    """An error between two layers, of the model or of a hook; the next pass, and a copy, begin anew."""
    model, batch = meft.make_reversible(base_of("bert", dropout=0.2)), batch_of("bert")
    expected = gradients(model, batch)

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        raise InterruptedError

    handle = model.bert.encoder.layer[1].register_forward_hook(fail)
    with pytest.raises(InterruptedError):
        model(**batch)
    handle.remove()
    twin = copy.deepcopy(model)
    assert_equal(gradients(twin, batch), expected)
    assert_equal(gradients(model, batch), expected)
