"""What users of PEFT call on a model: counts, copies, casts, modules of their own, checkpointing, threads."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import meft
from support import models
from support.peft_helpers import (
    METHODS,
    adapted,
    assert_close,
    assert_equal,
    batch_of,
    enlarge,
    gradients,
    outputs,
    taken,
    unchanged,
    visible,
)


def test_counts_of_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    """2 x (32 x 4 + 4 + 4 x 32 + 32) an adapted layer, and the head's 3 x 32 + 3."""
    base = models.build("bert", layers=3)
    whole = sum(parameter.numel() for parameter in base.parameters())
    model = adapted("bert", frozen_layers=1)
    adapters, head = 2 * 2 * (32 * 4 + 4 + 4 * 32 + 32), 3 * 32 + 3
    assert model.get_nb_trainable_parameters() == (adapters + head, whole + adapters + head)
    model.print_trainable_parameters()
    assert f"trainable params: {adapters + head:,d}" in capsys.readouterr().out
    assert model.num_parameters(only_trainable=True) == adapters + head


@pytest.mark.parametrize(
    ("coupling", "adapters"), [("meft1", 2), ("meft2", 2), ("meft3", 2), ("momentum", 2), ("adapter", 2)]
)
def test_number_of_adapters_a_layer(coupling: str, adapters: int) -> None:
    model = adapted("bart", coupling, frozen_layers=1, cached_layers=1)
    names = [name for name, _ in model.named_parameters() if ".meft_" in name]
    assert len(names) == 2 * 2 * adapters * 4


def test_access_to_what_is_inside() -> None:
    base = models.build("bert", layers=3)
    layers = list(base.bert.encoder.layer)
    model = get_peft_model(base, meft.MeftConfig(task_type="SEQ_CLS"))
    assert model.get_base_model() is base is model.base_model.model
    assert model.config is base.config and model.device == base.device and model.dtype == base.dtype
    for index, wrapper in enumerate(base.bert.encoder.layer):
        assert isinstance(wrapper, meft.MeftLayer)
        assert wrapper.base_layer is wrapper.get_base_layer() is layers[index]
        assert wrapper.attention is layers[index].attention
    assert model.targeted_module_names == [f"bert.encoder.layer.{index}" for index in range(3)]
    assert "MeftLayer" in repr(model)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = base.bert.encoder.layer[0].no_such_attribute


def test_status() -> None:
    model = adapted("bert")
    status = model.get_model_status()
    assert status.peft_types == {"default": "MEFT"} and status.active_adapters == ["default"]
    assert status.num_adapter_layers == 4  # three layers and the head
    assert status.requires_grad == {"default": True} and status.enabled is True
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_copies_are_independent() -> None:
    model, batch = adapted("bart", dropout=0.2), batch_of("bart")
    twin = copy.deepcopy(model)
    expected = gradients(model, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert_equal(gradients(twin, batch), expected)
    twin.unload()
    assert any(isinstance(module, meft.MeftLayer) for module in model.modules())


def test_copies_and_pickles_of_a_model_in_use() -> None:
    """A forward pass alive does not travel along, nor does it matter."""
    model, batch = adapted("bert"), batch_of("bert")
    loss = model(**batch).loss
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    third = torch.load(file, weights_only=False)
    loss.backward()
    expected = taken(model)
    assert_equal(gradients(twin, batch), expected)
    assert_equal(gradients(third, batch), expected)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.double()])
@pytest.mark.parametrize("coupling", METHODS)
def test_casting_a_whole_model(coupling: str, cast: Callable[[nn.Module], nn.Module]) -> None:
    model, batch = cast(adapted("opt", coupling)), batch_of("opt")
    dtype = next(model.parameters()).dtype
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    found = gradients(model, batch)
    assert found and all(g.dtype == dtype and torch.isfinite(g).all() for g in found.values())


def test_half_precision_runs_or_says_why_not() -> None:
    model, batch = adapted("bert").half(), batch_of("bert")
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, batch).values())


@pytest.mark.parametrize("coupling", METHODS)
def test_resized_embeddings(coupling: str) -> None:
    model = adapted("opt", coupling)
    before = outputs(model.eval(), batch_of("opt")).view(3, 7, -1)
    model.resize_token_embeddings(models.VOCABULARY + 5)
    after = outputs(model, batch_of("opt")).view(3, 7, -1)
    assert after.shape[-1] == models.VOCABULARY + 5
    assert torch.equal(after[..., : models.VOCABULARY], before)
    assert gradients(model.train(), batch_of("opt"))


def test_tied_weights_stay_tied() -> None:
    model = adapted("bart")
    base = model.get_base_model()
    assert base.lm_head.weight is base.model.encoder.embed_tokens.weight is base.model.decoder.embed_tokens.weight
    base = model.unload()
    assert base.lm_head.weight is base.model.encoder.embed_tokens.weight


def test_modules_to_save_of_the_users_own() -> None:
    base = models.build("bert", layers=3)
    model = get_peft_model(base, meft.MeftConfig(task_type="SEQ_CLS", modules_to_save=["pooler"]))
    found = gradients(model, batch_of("bert"))
    assert {name.split(".modules_to_save")[0].rsplit(".", 1)[-1] for name in found if "modules_to_save" in name} == {
        "pooler",
        "classifier",
    }


def test_embeddings_trained_beside_the_adapters() -> None:
    """The streams' own gradient then goes on below the lowest layer."""
    base = models.build("bert", layers=3)
    model = get_peft_model(base, meft.MeftConfig(task_type="SEQ_CLS", modules_to_save=["word_embeddings"]))
    stored = get_peft_model(
        models.build("bert", layers=3),
        meft.MeftConfig(task_type="SEQ_CLS", modules_to_save=["word_embeddings"], backward="cached"),
    )
    for one in (model, stored):
        enlarge(one)
    found = gradients(model, batch_of("bert"))
    assert any("word_embeddings" in name for name in found)
    assert_close(found, gradients(stored, batch_of("bert")), 1e-5)


@pytest.mark.parametrize("coupling", METHODS)
def test_children_of_layers_trained_beside_the_adapters(coupling: str) -> None:
    batch, norms = batch_of("bert"), {"task_type": "SEQ_CLS", "modules_to_save": ["LayerNorm"]}
    found = []
    for backward in ("reversible", "cached"):
        model = get_peft_model(
            models.build("bert", layers=3), meft.MeftConfig(coupling=coupling, backward=backward, **norms)
        )
        enlarge(model)
        found.append(gradients(model, batch))
        assert sum("LayerNorm" in name for name in found[-1]) == 2 * (1 + 2 * 3)
    assert_close(*found, 1e-5)


# The name that Transformers 5.17 has.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize(("frozen", "reentrant"), [(0, False), (0, True), (1, False)])
def test_gradient_checkpointing_of_adapters_on_ordinary_layers(reentrant: bool, frozen: int) -> None:
    """Layers that are not reversible can be checkpointed: those that train run again in the backward pass."""
    model, batch = adapted("bert", "adapter", dropout=0.2, frozen_layers=frozen), batch_of("bert")
    expected = gradients(model, batch)
    calls: list[nn.Module] = []
    for layer in model.get_base_model().bert.encoder.layer:
        layer.base_layer.intermediate.register_forward_hook(lambda module, args, output: calls.append(module))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_close(gradients(model, batch), expected, 1e-6)
    assert len(calls) == 3 + (3 - frozen)


def test_inputs_that_require_gradients() -> None:
    model = adapted("bert")
    model.enable_input_require_grads()
    assert gradients(model, batch_of("bert"))


def test_lora_beside_meft_is_refused() -> None:
    """PEFT holds adapters of one method in a model; LoRA goes under `make_reversible` instead."""
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    model = adapted("bert")
    with unchanged(model), pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", lora)
    assert list(model.peft_config) == ["default"]


def test_one_configuration_for_two_models() -> None:
    config = meft.MeftConfig(task_type="SEQ_CLS")
    for layers in (2, 3):
        model = get_peft_model(models.build("bert", layers=layers), config)
        assert gradients(model, batch_of("bert"))


@pytest.mark.parametrize("coupling", METHODS)
def test_inference_in_several_threads(coupling: str) -> None:
    """As the base model, one model serves several threads at once."""
    model = adapted("bert", coupling).eval()
    batches = [batch_of("bert", seed=seed, size=8, length=18) for seed in range(3)]
    expected = [outputs(model, batch) for batch in batches]

    def correct(index: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(visible(model(**batches[index])), expected[index]) for _ in range(15))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(correct, range(3)))
    finally:
        sys.setswitchinterval(interval)


def test_the_head_of_bart_is_trained_and_saved_by_default(tmp_path: Path) -> None:
    model = get_peft_model(models.build("bart", "SEQ_CLS"), meft.MeftConfig(task_type="SEQ_CLS"))
    assert any("classification_head" in name for name in gradients(model, models.batch("bart", "SEQ_CLS")))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.build("bart", "SEQ_CLS", seed=1), tmp_path)
    for name, tensor in model.state_dict().items():
        if "classification_head.modules_to_save" in name:
            assert torch.equal(loaded.state_dict()[name], tensor)
