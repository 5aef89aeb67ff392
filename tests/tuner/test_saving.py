"""Saving and loading: what comes back is what was saved, bit for bit, and a damaged or foreign folder is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import AutoModel, PreTrainedModel

import meft
from meft.errors import CheckpointError, ConfigError
from support import models
from support.peft_helpers import (
    METHODS,
    TASK_OF,
    adapted,
    assert_equal,
    batch_of,
    enlarge,
    gradients,
    outputs,
    unchanged,
)

AUTO_CLASS = {
    "SEQ_CLS": AutoPeftModelForSequenceClassification,
    "TOKEN_CLS": AutoPeftModelForTokenClassification,
    "QUESTION_ANS": AutoPeftModelForQuestionAnswering,
    "CAUSAL_LM": AutoPeftModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoPeftModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": AutoPeftModelForFeatureExtraction,
}

OPTIONS: dict[str, Any] = {
    "meft1": {"lam": 0.125, "output": ("sum", 0.1)},
    "meft2": {"beta": 0.25, "output": "newest"},
    "meft3": {"frozen_layers": 1, "cached_layers": 1},
    "momentum": {"gamma": 0.5, "fraction_bits": 18},
    "adapter": {},
}


def base_of(family: str, task: str | None = None, **options: Any) -> PreTrainedModel:
    return models.build(family, task or TASK_OF[family], layers=3, **options)


def trained(family: str, coupling: str, task: str | None = None, **options: Any) -> PeftModel:
    """A model whose adapters and head were moved by two steps of an optimizer."""
    model = adapted(family, coupling, task, **{**OPTIONS[coupling], **options})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for seed in range(2):
        for name, gradient in gradients(model, batch_of(family, task), seed).items():
            model.get_parameter(name).grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    return model


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("coupling", METHODS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_round_trip(family: str, coupling: str, tmp_path: Path) -> None:
    """Outputs and gradients of the loaded model are the saved one's."""
    model, batch = trained(family, coupling), batch_of(family)
    folder = saved(model, tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = PeftModel.from_pretrained(base_of(family), folder)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(outputs(loaded.eval(), batch), outputs(model.eval(), batch))
    assert_equal(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))
    trainable = PeftModel.from_pretrained(base_of(family), folder, is_trainable=True).train()
    assert_equal(gradients(trainable, batch), gradients(model.train(), batch))


@pytest.mark.parametrize(("family", "task"), models.FAMILY_TASKS)
def test_auto_classes(family: str, task: str, tmp_path: Path) -> None:
    base = base_of(family, task)
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base").train()
    model = get_peft_model(base, meft.MeftConfig(task_type=task, coupling="meft3"))
    enlarge(model)
    folder, batch = saved(model, tmp_path / "adapter"), batch_of(family, task)
    loaded = AUTO_CLASS[task].from_pretrained(folder)
    assert type(loaded) is type(model)
    assert torch.equal(outputs(loaded.eval(), batch), outputs(model.eval(), batch))


def test_auto_class_without_a_task(tmp_path: Path) -> None:
    base_of("bert", "FEATURE_EXTRACTION").save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, meft.MeftConfig())
    enlarge(model)
    folder, batch = saved(model, tmp_path / "adapter"), batch_of("bert", "FEATURE_EXTRACTION")
    loaded = AutoPeftModel.from_pretrained(folder)
    assert torch.equal(outputs(loaded.eval(), batch), outputs(model.eval(), batch))


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("name", ["default", "other", "meft_f_down"])
@pytest.mark.parametrize("coupling", ["meft3", "momentum"])
def test_other_adapter_names_and_low_memory(coupling: str, name: str, low_memory: bool, tmp_path: Path) -> None:
    model, batch = trained("bart", coupling), batch_of("bart")
    folder = saved(model, tmp_path)
    loaded = PeftModel.from_pretrained(base_of("bart"), folder, adapter_name=name, low_cpu_mem_usage=low_memory)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(outputs(loaded.eval(), batch), outputs(model.eval(), batch))


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_base(autocast: bool, low_memory: bool, tmp_path: Path) -> None:
    """PEFT keeps adapters on a half-precision base in float32 unless told not to."""
    options = {"autocast_adapter_dtype": autocast, "low_cpu_mem_usage": low_memory}
    config = meft.MeftConfig(task_type="SEQ_CLS")
    model = get_peft_model(base_of("bert", dtype=torch.bfloat16), config, autocast_adapter_dtype=autocast)
    enlarge(model)
    folder, batch = saved(model, tmp_path), batch_of("bert")
    loaded = PeftModel.from_pretrained(base_of("bert", dtype=torch.bfloat16), folder, **options)
    for held in (model, loaded):
        dtypes = {parameter.dtype for name, parameter in held.named_parameters() if ".meft_" in name}
        assert dtypes == {torch.float32 if autocast else torch.bfloat16}
        assert held.get_base_model().dtype == torch.bfloat16
    assert torch.equal(outputs(loaded.eval(), batch), outputs(model.eval(), batch))
    assert_equal(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))


@pytest.mark.parametrize("coupling", METHODS)
def test_the_configuration_comes_back(coupling: str, tmp_path: Path) -> None:
    model = adapted("bart", coupling, **OPTIONS[coupling])
    folder = saved(model, tmp_path)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["peft_type"] == "MEFT"
    assert written["coupling"] == coupling
    assert "loaded_from" not in written
    loaded = PeftConfig.from_pretrained(folder)
    assert type(loaded) is meft.MeftConfig
    config = model.peft_config["default"]
    for field in config.__dataclass_fields__:
        if field != "inference_mode":
            assert getattr(loaded, field) == getattr(config, field), field
    assert loaded.plan() == config.plan()
    again = get_peft_model(base_of("bart"), meft.MeftConfig.from_pretrained(folder))
    again.save_pretrained(tmp_path / "again")
    rewritten = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert rewritten == written


def test_saving_twice_and_over_a_save(tmp_path: Path) -> None:
    model, batch = adapted("bert"), batch_of("bert")
    first = outputs(model.eval(), batch)
    saved(model, tmp_path)
    enlarge(model, seed=9)
    second = outputs(model, batch)
    assert not torch.equal(first, second)
    saved(model, tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(base_of("bert"), tmp_path).eval(), batch), second)


def test_two_adapters_are_saved_apart(tmp_path: Path) -> None:
    model, batch = adapted("bert", "meft1"), batch_of("bert")
    model.add_adapter("other", meft.MeftConfig(task_type="SEQ_CLS", coupling="momentum"))
    enlarge(model, "other", seed=7)
    saved(model.eval(), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()
    loaded = PeftModel.from_pretrained(base_of("bert"), tmp_path)
    loaded.load_adapter(tmp_path / "other", adapter_name="second")
    assert torch.equal(outputs(loaded.eval(), batch), outputs(model, batch))
    loaded.set_adapter("second")
    model.set_adapter("other")
    assert torch.equal(outputs(loaded.eval(), batch), outputs(model.eval(), batch))


def test_state_dicts_by_hand(tmp_path: Path) -> None:
    """get_peft_model_state_dict, set_peft_model_state_dict, torch.save, save_adapter_only."""
    model, batch = trained("opt", "meft2"), batch_of("opt")
    state = get_peft_model_state_dict(model)
    assert all(".meft_" in name and "default" not in name for name in state)
    other = adapted("opt", "meft2", **OPTIONS["meft2"])
    assert not torch.equal(outputs(other.eval(), batch), outputs(model.eval(), batch))
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert torch.equal(outputs(other, batch), outputs(model, batch))
    torch.save(model.state_dict(), tmp_path / "all.pt")
    third = adapted("opt", "meft2", **OPTIONS["meft2"])
    third.load_state_dict(torch.load(tmp_path / "all.pt"))
    assert torch.equal(outputs(third.eval(), batch), outputs(model, batch))


# --- Folders that must be refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=["empty", "no header", "half a header", "one byte short"])
def test_a_truncated_file(kept: int, tmp_path: Path) -> None:
    folder = saved(adapted("bert"), tmp_path)
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()[:kept]
    weights.write_bytes(content)
    base = base_of("bert")
    with unchanged(base), pytest.raises(CheckpointError) as caught:
        PeftModel.from_pretrained(base, folder)
    text = str(caught.value)
    assert (
        str(weights) in text
        and f"{len(content)} bytes" in text
        and "truncated" in text
        and "Copy or download it again" in text
    )
    assert weights.read_bytes() == content


@pytest.mark.parametrize(
    ("other", "received"),
    [
        (lambda: models.build("bert", layers=2), "2 BertLayer of width 32"),
        (lambda: models.build("bert", layers=3, hidden=16), "3 BertLayer of width 16"),
        (lambda: models.build("roberta", layers=3), "3 RobertaLayer of width 32"),
        (lambda: models.build("bart", layers=3), "3 BartEncoderLayer of width 32 and 3 BartDecoderLayer of width 32"),
    ],
)
def test_an_adapter_for_another_base_model(other: Any, received: str, tmp_path: Path) -> None:
    folder = saved(adapted("bert"), tmp_path)
    base = other()
    with unchanged(base), pytest.raises(CheckpointError) as caught:
        PeftModel.from_pretrained(base, folder)
    text = str(caught.value)
    assert str(folder) in text and "3 BertLayer of width 32" in text and received in text
    assert type(base).__name__ in text and "its own base model" in text


def test_an_adapter_for_another_base_model_as_second_adapter(tmp_path: Path) -> None:
    folder = saved(adapted("bert", layers=2), tmp_path)
    model, batch = adapted("bert").eval(), batch_of("bert")
    before = outputs(model, batch)
    with unchanged(model), pytest.raises(CheckpointError, match="2 BertLayer of width 32"):
        model.load_adapter(folder, adapter_name="other")
    assert torch.equal(outputs(model, batch), before)
    assert list(model.peft_config) == ["default"] and model.active_adapter == "default"


@pytest.mark.parametrize("name", ["nobody/no-such-adapter", "no-such-folder"])
def test_an_unknown_hub_id_gives_the_ordinary_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (
        lambda: PeftModel.from_pretrained(base_of("bert"), name),
        lambda: meft.MeftConfig.from_pretrained(name),
    ):
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'") as caught:
            load()
        assert not isinstance(caught.value, meft.MeftError)


def test_an_edited_configuration(tmp_path: Path) -> None:
    folder = saved(adapted("bert"), tmp_path)
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text())
    for changed, text in (
        ({"coupling": "meft9"}, "coupling='meft9' is unknown"),
        ({"frozen_layers": 3}, "frozen_layers=3 leaves nothing to train"),
        ({"lam": 0.0}, "lam=0.0"),
    ):
        path.write_text(json.dumps({**written, **changed}))
        base = base_of("bert")
        with unchanged(base), pytest.raises(ConfigError, match=text):
            PeftModel.from_pretrained(base, folder)


def test_options_of_a_later_version_are_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = saved(adapted("bert"), tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "a_later_option": 1}))
    with pytest.warns(UserWarning, match="a_later_option"):
        PeftModel.from_pretrained(base_of("bert"), folder)
