"""`PeftType.MEFT`, and what importing the package does to PEFT and Transformers: everything needed, and only once."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType, TaskType, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import meft
import meft.tuner.peft_type
import meft.tuner.tuner
from meft.errors import CheckpointError, ConfigError
from support import models
from support.peft_helpers import METHODS, assert_equal, batch_of, enlarge, gradients, outputs, taken, unchanged


def test_a_member_like_any_other() -> None:
    member = PeftType("MEFT")
    assert member is PeftType["MEFT"] is PeftType.MEFT is meft.MeftConfig().peft_type
    assert isinstance(member, PeftType) and isinstance(member, str)
    assert (member.name, member.value, member.value.lower()) == ("MEFT", "MEFT", "meft")
    assert member == "MEFT" and hash(member) == hash("MEFT") and member != PeftType.LORA
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "MEFT")
    assert str(member) == str(PeftType.LORA).replace("LORA", "MEFT")
    assert list(PeftType).count(member) == 1 and list(PeftType)[-1] is member
    assert member in PeftType and "MEFT" in PeftType.__members__
    assert {member: 1}["MEFT"] == 1


def test_members_there_before_are_untouched() -> None:
    assert PeftType("LORA") is PeftType.LORA
    with pytest.raises(ValueError, match="is not a valid PeftType"):
        PeftType("NO_SUCH_METHOD")
    with pytest.raises(AttributeError):
        _ = PeftType.NO_SUCH_METHOD


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles(protocol: int) -> None:
    assert pickle.loads(pickle.dumps(PeftType.MEFT, protocol)) is PeftType.MEFT
    config = meft.MeftConfig(coupling="meft2", output=("sum", 0.1))
    assert pickle.loads(pickle.dumps(config, protocol)) == config


def test_copies_and_json() -> None:
    member = PeftType.MEFT
    assert copy.copy(member) is copy.deepcopy(member) is member
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "MEFT"}
    config = meft.MeftConfig(coupling="meft1", lam=0.125, output=("sum", 0.1), modules_to_save=["pooler"])
    twin = copy.deepcopy(config)
    assert twin == config and twin.modules_to_save is not config.modules_to_save
    assert copy.copy(config) == config


def test_configurations_through_a_dict() -> None:
    config = meft.MeftConfig(task_type="SEQ_CLS", coupling="meft1", output=("sum", 0.1), frozen_layers=2)
    written = json.loads(json.dumps(config.to_dict(), default=str))
    assert written["output"] == ["sum", 0.1]
    again = get_peft_config({**written, "task_type": TaskType.SEQ_CLS})
    assert type(again) is meft.MeftConfig and again == config
    assert meft.MeftConfig.from_peft_type(**{**written, "task_type": "SEQ_CLS"}) == config


def test_registered_once() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MEFT] is meft.MeftConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MEFT] is meft.MeftModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.MEFT] == "meft_"
    meft.tuner.tuner.register()
    assert importlib.import_module("meft") is meft
    assert importlib.reload(meft.tuner.peft_type).MEFT is PeftType.MEFT
    importlib.reload(meft)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MEFT] is meft.MeftConfig
    assert list(PeftType).count(PeftType.MEFT) == 1


@pytest.mark.parametrize("task", [None, "SEQ_CLS", TaskType.SEQ_CLS])
def test_task_types(task: Any) -> None:
    assert meft.MeftConfig(task_type=task).task_type == task


def test_an_invalid_task_type() -> None:
    with pytest.raises(ValueError, match="Invalid task type"):
        meft.MeftConfig(task_type="NO_SUCH_TASK")


def test_target_modules_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"target_modules=\['query'\] is not an option .* frozen_layers"):
        meft.MeftConfig(target_modules=["query"])  # type: ignore[arg-type]


_LOAD = """
import sys
from peft import AutoPeftModelForSequenceClassification as Auto
try:
    Auto.from_pretrained(sys.argv[1])
except KeyError as error:
    print(error)
import meft
model = Auto.from_pretrained(sys.argv[1])
print(type(model).__name__, model.peft_config["default"].coupling)
"""


def test_loading_in_another_process(tmp_path: Path) -> None:
    """`import meft` is all it takes; without it PEFT does not know the name."""
    base = models.build("bert", layers=2)
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    get_peft_model(base, meft.MeftConfig(task_type="SEQ_CLS", coupling="meft3")).save_pretrained(tmp_path / "adapter")
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "adapter")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["'MEFT'", "PeftModelForSequenceClassification", "meft3"], found.stderr


# --- Transformers' own adapters ---------------------------------------------------------------------------------------


# PEFT says so of every second adapter that is injected without a PeftModel.
SECOND = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")


@SECOND
@pytest.mark.parametrize("coupling", METHODS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_adapters_of_a_transformers_model(family: str, coupling: str, tmp_path: Path) -> None:
    """add_adapter, save_pretrained, load_adapter, enable, disable, switch and delete, without a PeftModel."""
    task = "FEATURE_EXTRACTION"
    model, batch = models.build(family, task, layers=3), batch_of(family, task)
    plain = outputs(model.eval(), batch)
    model.train().add_adapter(meft.MeftConfig(coupling=coupling, bottleneck_dim=4))
    enlarge(model)
    found = gradients(model, batch)
    assert found and all(".meft_" in name for name in found)
    expected = outputs(model.eval(), batch)
    assert not torch.equal(expected, plain)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    loaded = models.build(family, task, layers=3).eval()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(outputs(loaded.eval(), batch), expected)
    loaded.disable_adapters()
    assert torch.equal(outputs(loaded, batch), plain)
    loaded.enable_adapters()
    loaded.add_adapter(meft.MeftConfig(coupling="momentum"), "second")
    loaded.set_adapter("default")
    assert torch.equal(outputs(loaded, batch), expected)
    loaded.delete_adapter("second")
    assert torch.equal(outputs(loaded, batch), expected)
    as_peft = PeftModel.from_pretrained(models.build(family, task, layers=3), tmp_path).eval()
    assert torch.equal(outputs(as_peft, batch), expected)


@SECOND
def test_two_adapters_of_a_transformers_model_at_once_are_refused() -> None:
    model, batch = models.build("bert", layers=2), batch_of("bert")
    for name in ("one", "two"):
        model.add_adapter(meft.MeftConfig(), name)
    with pytest.raises(ConfigError, match=r"\['one', 'two'\] are active together"):
        model.set_adapter(["one", "two"])
    model.set_adapter("one")
    assert gradients(model, batch)


def test_a_transformers_model_refuses_a_foreign_adapter(tmp_path: Path) -> None:
    get_peft_model(models.build("bert", layers=2), meft.MeftConfig()).save_pretrained(tmp_path)
    model = models.build("bert", layers=3)
    with unchanged(model), pytest.raises(CheckpointError, match="2 BertLayer of width 32"):
        model.load_adapter(str(tmp_path))


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_models_train() -> None:
    """Reversible layers break the graph and run as they are; what stands around them is compiled."""
    model, batch = models.build("bert", layers=1, dropout=0.1), batch_of("bert")
    meft.make_reversible(model)
    expected = gradients(model, batch)
    compiled = torch.compile(model, backend="eager")
    torch.manual_seed(1)
    compiled(**batch).loss.backward()
    assert_equal(taken(model), expected)
