"""The life of MEFT adapters in a PEFT model: added, disabled, switched, deleted and taken out again."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import meft
from meft.errors import ConfigError, UnsupportedModelError
from support import models
from support.peft_helpers import (
    COUPLINGS,
    METHODS,
    TASK_OF,
    adapted,
    anatomy,
    assert_close,
    assert_equal,
    batch_of,
    enlarge,
    gradients,
    outputs,
    snapshot,
    taken,
    unchanged,
    unread,
)


def add(model: PeftModel, name: str, coupling: str, **options: Any) -> None:
    task = model.peft_config["default"].task_type
    model.add_adapter(name, meft.MeftConfig(task_type=task, coupling=coupling, bottleneck_dim=3, **options))
    enlarge(model, name, seed=8)


def adapters_of(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in found.items() if ".meft_" in name}


# --- Disabled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("coupling", METHODS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_disabled_is_the_base_model(family: str, coupling: str, train: bool) -> None:
    """Bit for bit: the logits, every hidden state, and, with the same seed, what dropout drops."""
    base = models.build(family, TASK_OF[family], layers=3, dropout=0.3).train(train)
    model, batch = adapted(family, coupling, dropout=0.3).train(train), batch_of(family)
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch), outputs(base, batch))
        assert not any(parameter.requires_grad for parameter in model.parameters())
        torch.manual_seed(1)
        actual = model(**batch, output_hidden_states=True)
        torch.manual_seed(1)
        expected = base(**batch, output_hidden_states=True)
        for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
            assert [*map(len, (actual.get(name) or (), expected.get(name) or ()))].count(0) in (0, 2)
            for one, other in zip(actual.get(name) or (), expected.get(name) or (), strict=True):
                assert torch.equal(one, other)
    assert not torch.equal(outputs(model, batch), outputs(base, batch))
    adapters = {name: parameter for name, parameter in model.named_parameters() if ".meft_" in name}
    idle = unread(model)
    assert all(parameter.requires_grad == (name not in idle) for name, parameter in adapters.items())


@pytest.mark.parametrize("backward", ["reversible", "cached"])
@pytest.mark.parametrize("coupling", METHODS)
def test_a_reference_pass_between_forward_and_backward(coupling: str, backward: str) -> None:
    """What DPO does: the policy's pass, the reference's pass with adapters disabled, then the policy's gradients."""
    model, batch = adapted("opt", coupling, dropout=0.2, backward=backward), batch_of("opt")
    expected = gradients(model, batch)
    torch.manual_seed(1)
    loss = model(**batch).loss
    with torch.no_grad(), model.disable_adapter():
        model(**batch)
    loss.backward()
    assert_equal(taken(model), expected)


# --- What changes between forward and backward ------------------------------------------------------------------------


def _switch(model: PeftModel) -> None:
    model.set_adapter("other")


def _evaluate(model: PeftModel) -> None:
    model.eval()


def _freeze(model: PeftModel) -> None:
    model.requires_grad_(False)


def _thaw_the_base(model: PeftModel) -> None:
    for parameter in model.get_base_model().parameters():
        parameter.requires_grad_(True)


def _another_pass(model: PeftModel) -> None:
    model(**batch_of("bart", seed=3))
    model.eval()(**batch_of("bart", seed=4))


def _new_adapter(model: PeftModel) -> None:
    add(model, "third", "meft3")
    model.set_adapter("third")


def _random_numbers(model: PeftModel) -> None:
    torch.manual_seed(99)
    torch.rand(7)


def _disabled(model: PeftModel) -> AbstractContextManager[None]:
    return model.disable_adapter()


CHANGES = (_switch, _evaluate, _freeze, _thaw_the_base, _another_pass, _new_adapter, _random_numbers)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("change", [*CHANGES, _disabled])
def test_changes_between_forward_and_backward(change: Callable[[PeftModel], Any], coupling: str) -> None:
    """A backward pass belongs to its forward pass: what the model looks like by then does not matter.

    PyTorch gives parameters that require no gradient by then none; the gradient of the input passes through every
    layer and both stacks all the same.
    """
    model, batch = adapted("bart", coupling, dropout=0.2), batch_of("bart")
    add(model, "other", "meft2" if coupling == "meft1" else "meft1")
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()

    def passed() -> tuple[Tensor, dict[str, Tensor]]:
        found, embedded_gradient = taken(model), embedded.grad
        assert embedded_gradient is not None
        embedded.grad = None
        return embedded_gradient, found

    torch.manual_seed(1)
    model(inputs_embeds=embedded, **batch).loss.backward()
    expected_input, expected = passed()
    torch.manual_seed(1)
    loss = model(inputs_embeds=embedded, **batch).loss
    context = change(model)
    with context or nullcontext():
        flags = {name: module.training for name, module in model.named_modules()}
        wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        loss.backward()
        assert {name: module.training for name, module in model.named_modules()} == flags
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    actual_input, actual = passed()
    assert torch.equal(actual_input, expected_input)
    assert actual.keys() == {name for name in expected if wanted[name]}
    assert all(torch.equal(gradient, expected[name]) for name, gradient in actual.items())


def test_two_adapters_in_one_loss() -> None:
    """Passes of two adapters alive at once; each gets its own gradients once it may have them again."""
    model, batch = adapted("bart", "meft1", dropout=0.2), batch_of("bart")
    add(model, "other", "momentum")
    expected = gradients(model, batch, seed=1)
    model.set_adapter("other")
    expected |= gradients(model, batch, seed=2)
    model.set_adapter("default")
    torch.manual_seed(1)
    first = model(**batch).loss
    model.set_adapter("other")
    torch.manual_seed(2)
    second = model(**batch).loss
    model.base_model.set_requires_grad("default", True)
    (first + second).backward()
    assert_equal(taken(model), expected)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_gradient_accumulation_over_passes_alive_at_once(coupling: str) -> None:
    model = adapted("bart", coupling)
    batches = [batch_of("bart", seed=seed) for seed in range(3)]
    expected: dict[str, Tensor] = {}
    for batch in batches:
        for name, gradient in gradients(model, batch).items():
            expected[name] = expected.get(name, 0) + gradient
    losses = [model(**batch).loss for batch in batches]
    torch.stack(losses).sum().backward()
    assert_close(taken(model), expected, 1e-5)


# --- Several adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("first", METHODS)
def test_two_adapters_are_as_each_alone(first: str, second: str) -> None:
    """Outputs and gradients of each, whichever was added first; neither trains the other."""
    batch = batch_of("bart")
    # The loss in tiles, which a model without coupled adapters does not have, rounds otherwise.
    options = {name: {} if name == "adapter" else {"fused_loss": False} for name in {first, second}}
    alone = {name: adapted("bart", name, **options[name]) for name in {first, second}}
    model = adapted("bart", first, **options[first])
    model.add_adapter("other", copy.deepcopy(alone[second].peft_config["default"]))
    enlarge(model, "other")
    for adapter, coupling in (("default", first), ("other", second), ("default", first)):
        model.set_adapter(adapter)
        assert torch.equal(outputs(model, batch), outputs(alone[coupling], batch))
        found = gradients(model, batch)
        assert {name for name in found if ".meft_" in name} == {
            name for name, _ in model.named_parameters() if ".meft_" in name and f".{adapter}." in name
        }
        expected = {
            name.replace(".default.", f".{adapter}."): g for name, g in gradients(alone[coupling], batch).items()
        }
        assert_equal(found, expected)


def test_a_second_adapter_is_not_trained_before_it_is_set() -> None:
    model = adapted("bert")
    add(model, "other", "momentum", frozen_layers=1)
    assert model.active_adapters == ["default"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".other." in name)
    model.set_adapter("other")
    assert model.active_adapter == "other"
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert wanted and all(".other." in name for name in wanted)
    assert not any(".layer.0." in name for name in wanted)


def test_delete_an_adapter() -> None:
    model, batch = adapted("bert", "meft1").eval(), batch_of("bert")
    before = outputs(model, batch)
    add(model, "other", "momentum")
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert not any(".other." in name for name in model.state_dict())
    assert torch.equal(outputs(model, batch), before)
    add(model, "other", "momentum")
    model.set_adapter("other")
    after = outputs(model, batch)
    model.delete_adapter("default")
    assert model.active_adapter == "other"
    assert torch.equal(outputs(model, batch), after)


def test_delete_the_active_adapter() -> None:
    model, batch = adapted("bert", "meft1").eval(), batch_of("bert")
    add(model, "other", "momentum")
    model.set_adapter("other")
    expected = outputs(model, batch)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Adapter default was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapter == "other"
    assert torch.equal(outputs(model, batch), expected)
    assert gradients(model.train(), batch)


def test_delete_the_last_adapter() -> None:
    base = models.build("bert", layers=3).eval()
    model, batch = adapted("bert").eval(), batch_of("bert")
    model.delete_adapter("default")
    unloaded = model.unload()
    assert torch.equal(outputs(unloaded, batch), outputs(base, batch))


@pytest.mark.parametrize("names", [["default", "other"], ["other", "default"]])
def test_two_adapters_at_once_are_refused(names: list[str]) -> None:
    model = adapted("bert")
    add(model, "other", "momentum")
    for activate in (model.base_model.set_adapter, model.set_adapter):
        with unchanged(model), pytest.raises((ConfigError, TypeError)) as caught:
            activate(names)
    with unchanged(model), pytest.raises(ConfigError) as caught:
        model.base_model.set_adapter(names)
    text = str(caught.value)
    assert str(names) in text and "one coupling only" in text and f"set_adapter({names[0]!r})" in text
    model.base_model.set_adapter(["other"])
    assert model.base_model.active_adapters == ["other"]


def test_adapters_mixed_within_a_batch_are_refused() -> None:
    model, batch = adapted("bert").eval(), batch_of("bert")
    add(model, "other", "momentum")
    batch.pop("labels")
    with pytest.raises(ConfigError, match=r"adapter_names=\['default', 'other', '__base__'\] asks for .*set_adapter"):
        model(**batch, adapter_names=["default", "other", "__base__"])


# --- Taken out again --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Layer drop:meft.errors.MeftWarning")
@pytest.mark.parametrize("coupling", METHODS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_unload_gives_back_the_very_base_model(family: str, coupling: str) -> None:
    """The same objects under the same names with the same weights, and layer drop as it was."""
    base, batch = models.build(family, "FEATURE_EXTRACTION", layers=3), batch_of(family, "FEATURE_EXTRACTION")
    drops = [module for module in base.modules() if hasattr(module, "layerdrop")]
    assert len(drops) == (0 if "bert" in family else 2 if family == "bart" else 1)
    for module in drops:
        module.layerdrop = 0.25
    expected = outputs(base.eval(), batch)
    base.train()
    before, weights = anatomy(base), snapshot(base)
    model = get_peft_model(base, meft.MeftConfig(coupling=coupling, frozen_layers=1))
    assert all(module.layerdrop == (0.25 if coupling == "adapter" else 0) for module in drops)
    gradients(model, batch)
    assert model.unload() is base
    after = anatomy(base)
    for part in ("modules", "layerdrop"):
        assert after[part] == before[part]
    # As with every PEFT method, what was the base stays frozen.
    assert after["parameters"] == {name: (identity, False) for name, (identity, _) in before["parameters"].items()}
    assert_equal(base.state_dict(), weights)
    assert torch.equal(outputs(base.eval(), batch), expected)


def test_unload_keeps_the_trained_head() -> None:
    """As with every PEFT method, `modules_to_save` replace what they were copied from."""
    model = adapted("bert")
    head = model.get_base_model().classifier.modules_to_save["default"]
    assert model.unload().classifier is head


@pytest.mark.filterwarnings("ignore:Layer drop:meft.errors.MeftWarning")
@pytest.mark.parametrize("order", [("default", "other"), ("other", "default")])
def test_unload_after_deleting_adapters_restores_layer_drop(order: tuple[str, str]) -> None:
    base = models.build("opt", "CAUSAL_LM", layers=3).eval()
    base.model.decoder.layerdrop = 0.25
    model = get_peft_model(base, meft.MeftConfig(task_type="CAUSAL_LM"))
    add(model, "other", "momentum")
    model.base_model.set_adapter([order[1]])
    for name in order:
        model.delete_adapter(name)
    assert model.unload().model.decoder.layerdrop == 0.25


def test_adapters_can_be_added_after_unloading() -> None:
    model, batch = adapted("bert", "meft1"), batch_of("bert")
    base = model.unload()
    again = get_peft_model(base, meft.MeftConfig(task_type="SEQ_CLS", coupling="meft3", bottleneck_dim=4))
    enlarge(again)
    assert torch.equal(outputs(again.eval(), batch), outputs(adapted("bert", "meft3").eval(), batch))


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_merging_is_refused(merge: str) -> None:
    model = adapted("bert")
    with unchanged(model), pytest.raises(ConfigError) as caught:
        getattr(model, merge)()
    text = str(caught.value)
    assert "cannot be merged" in text and "LoRA under make_reversible" in text


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"frozen_layers": 3}, "frozen_layers=3 leaves nothing to train: .* has 3 layers. Use at most frozen_layers=2"),
        ({"frozen_layers": 8}, "frozen_layers=8 leaves nothing to train"),
        ({"cached_layers": 4}, "frozen_layers=0 and cached_layers=4 are more than the 3 layers .* cached_layers=3"),
        ({"frozen_layers": 2, "cached_layers": 2}, "frozen_layers=2 and cached_layers=2 .* cached_layers=1"),
    ],
)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_more_layers_than_there_are(family: str, options: dict[str, int], text: str) -> None:
    base = models.build(family, TASK_OF[family], layers=3)
    with unchanged(base), pytest.raises(ConfigError, match=text) as caught:
        get_peft_model(base, meft.MeftConfig(task_type=TASK_OF[family], **options))
    assert type(base).__name__.split("For")[0] in str(caught.value)


def test_a_refused_second_adapter_leaves_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    model, batch = adapted("bert").eval(), batch_of("bert")
    before = outputs(model, batch)
    with unchanged(model), pytest.raises(ConfigError, match="frozen_layers=9"):
        add(model, "other", "meft3", frozen_layers=9)
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert torch.equal(outputs(model, batch), before)
    add(model, "other", "meft3")


def test_a_reversible_model_is_refused() -> None:
    base = meft.make_reversible(models.build("bert", layers=3))
    with unchanged(base), pytest.raises(ConfigError, match=re.escape("Call meft.restore(model) before")):
        get_peft_model(base, meft.MeftConfig(task_type="SEQ_CLS"))


def test_a_model_without_layers_is_refused() -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UnsupportedModelError, match="Sequential has no stack of layers"):
        get_peft_model(base, meft.MeftConfig())
