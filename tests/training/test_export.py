"""`meft export`: LoRA becomes a plain model, MEFT's adapters a folder with their base inside; whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTConfig,
    ViTForImageClassification,
)

import meft
from meft import cli
from meft.backbone.layers import ReversibleLayer
from meft.errors import CheckpointError, ConfigError, OutputFolderError
from meft.storage import files as storage
from meft.training.export import Exported
from support import models
from support.peft_helpers import assert_equal, batch_of, enlarge, gradients, llama, outputs, snapshot
from support.tiny import hidden_files, make_model, make_tokenizer

TASK = "CAUSAL_LM"
BATCH = batch_of("opt", TASK)
SAME = {"rtol": 1e-4, "atol": 1e-5}
MERGEABLE: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(task_type=TASK, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "dora": lambda: LoraConfig(task_type=TASK, target_modules=["v_proj"], use_dora=True, init_lora_weights=False),
    "ia3": lambda: IA3Config(task_type=TASK, target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False),
}


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    """A pretrained model with its tokenizer."""
    folder = tmp_path / "base"
    llama().save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def pretrained(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def trained(folder: Path, config: Any) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(pretrained(folder), config).eval()


def meft_adapter(folder: Path, coupling: str, **options: Any) -> PeftModel:
    model = trained(folder, meft.MeftConfig(task_type=TASK, coupling=coupling, bottleneck_dim=4, **options))
    enlarge(model)
    return model


def no_pickles(folder: Path) -> bool:
    endings = {path.suffix for path in folder.rglob("*") if path.is_file()}
    return endings <= {".json", ".safetensors", ".md", ".jinja"}


# --- A plain model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MERGEABLE)
def test_a_saved_adapter_becomes_a_plain_model(method: str, base_folder: Path, tmp_path: Path) -> None:
    model = trained(base_folder, MERGEABLE[method]())
    model.save_pretrained(tmp_path / "adapter")
    found = meft.export(tmp_path / "adapter", tmp_path / "out")
    assert (found.folder, found.kind) == (tmp_path / "out", "model")
    assert found.code == (
        f"from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained('{found.folder}')"
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(outputs(plain, BATCH), outputs(model, BATCH), **SAME)
    assert list(plain.state_dict()) == list(llama().state_dict())
    assert no_pickles(tmp_path / "out") and not hidden_files(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the cat")["input_ids"]


@pytest.mark.parametrize("order", ["lora first", "reversible first"])
def test_a_reversible_model_in_memory(order: str, base_folder: Path, tmp_path: Path) -> None:
    """Folded into what `restore` and `merge_and_unload` would leave; the model itself stays reversible."""
    base = pretrained(base_folder)
    if order == "reversible first":
        meft.make_reversible(base)
    torch.manual_seed(3)
    model = get_peft_model(base, MERGEABLE["lora"]())
    if order == "lora first":
        meft.make_reversible(model)
    before, weights = gradients(model.train(), BATCH), snapshot(model)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    assert meft.export(model, tmp_path / "out", tokenizer=tokenizer).kind == "model"
    assert_equal(model.state_dict(), weights)
    assert_equal(gradients(model, BATCH), before)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    meft.restore(model.eval())
    torch.testing.assert_close(outputs(plain, BATCH), outputs(model, BATCH), **SAME)
    merged = model.merge_and_unload()
    assert_equal(plain.state_dict(), merged.state_dict())
    assert not any(isinstance(module, ReversibleLayer) for module in plain.modules())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == tokenizer.vocab_size


def test_a_model_trained_in_full(base_folder: Path, tmp_path: Path) -> None:
    """From memory, reversible; and the folder of a run, which is copied."""
    model = meft.make_reversible(pretrained(base_folder))
    assert meft.export(model, tmp_path / "first").kind == "model"
    found = meft.export(tmp_path / "first", tmp_path / "second")
    assert found.kind == "model" and "AutoModelForCausalLM" in found.code
    for name in ("first", "second"):
        assert_equal(load_file(tmp_path / name / "model.safetensors"), load_file(base_folder / "model.safetensors"))


@pytest.mark.filterwarnings("ignore:Layer drop:meft.errors.MeftWarning")
def test_what_conversion_changed_is_not_written(tmp_path: Path) -> None:
    """Layer drop, which a reversible stack cannot have, is there again."""
    for name, prepare in (
        ("full", meft.make_reversible),
        ("meft", lambda base: get_peft_model(base, meft.MeftConfig(task_type=TASK))),
    ):
        base = models.build("opt", TASK, layers=2)
        base.config.layerdrop = 0.25
        model = prepare(base)
        assert base.config.layerdrop == 0
        written = meft.export(model, tmp_path / name)
        place = written.folder / ("base" if written.kind == "adapter" else ".")
        assert json.loads((place / "config.json").read_text())["layerdrop"] == 0.25


def test_a_head_for_classes(tmp_path: Path) -> None:
    """Trained in full beside LoRA, with another number of labels than the base model's."""
    folder = make_model(tmp_path / "base", head=True)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    model = get_peft_model(base, lora).eval()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1.0)
    model.save_pretrained(tmp_path / "adapter")
    assert "AutoModelForSequenceClassification" in meft.export(tmp_path / "adapter", tmp_path / "out").code
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    batch = {"input_ids": torch.tensor([[0, 5, 6, 2]])}
    found = outputs(plain, batch)
    assert found.shape == (5,)
    torch.testing.assert_close(found, outputs(model, batch), **SAME)


def test_a_task_that_peft_has_no_name_for(tmp_path: Path) -> None:
    """The adapter then says which class its base model has."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    base = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))
    base.save_pretrained(tmp_path / "base")
    base = ViTForImageClassification.from_pretrained(tmp_path / "base")
    for name, config in (
        ("lora", LoraConfig(target_modules=["query", "q_proj"], modules_to_save=["classifier"])),
        ("meft", meft.MeftConfig(coupling="meft3", modules_to_save=["classifier"])),
    ):
        torch.manual_seed(0)
        model = get_peft_model(ViTForImageClassification.from_pretrained(tmp_path / "base"), config).eval()
        model.save_pretrained(tmp_path / name)
        meft.export(tmp_path / name, tmp_path / f"{name}-out")
        loaded = meft.load(tmp_path / f"{name}-out")
        pixels = {"pixel_values": torch.randn(2, 3, 8, 8)}
        torch.testing.assert_close(outputs(loaded, pixels), outputs(model, pixels), **SAME)
    AutoModelForImageClassification.from_pretrained(tmp_path / "lora-out")


def test_it_loads_in_a_process_without_meft(base_folder: Path, tmp_path: Path) -> None:
    """The merged model, and the ordinary LoRA checkpoint of a backbone that was reversible in training."""
    model = meft.make_reversible(trained(base_folder, MERGEABLE["lora"]()))
    model.save_pretrained(tmp_path / "adapter")
    meft.export(model, tmp_path / "out")
    torch.save(BATCH, tmp_path / "batch.pt")
    code = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
batch = torch.load({str(tmp_path / "batch.pt")!r})
merged = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}).eval()
base = AutoModelForCausalLM.from_pretrained({str(base_folder)!r})
adapted = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
with torch.no_grad():
    found = [merged(**batch).logits, adapted(**batch).logits, adapted.merge_and_unload()(**batch).logits]
torch.save(found, {str(tmp_path / "found.pt")!r})
print("meft" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    expected = outputs(meft.restore(model), BATCH)
    for logits in torch.load(tmp_path / "found.pt"):
        torch.testing.assert_close(logits.flatten(), expected, **SAME)


# --- An adapter with its base model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["meft1", "meft2", "meft3", "momentum", "adapter"])
def test_adapters_of_meft_keep_their_base(coupling: str, base_folder: Path, tmp_path: Path) -> None:
    """From the adapter's folder and from memory; the folder may be moved, and its base model may go."""
    model = meft_adapter(base_folder, coupling)
    model.save_pretrained(tmp_path / "adapter")
    expected = outputs(model, BATCH)
    for name, source in (("saved", tmp_path / "adapter"), ("memory", model)):
        found = meft.export(source, tmp_path / name)
        assert found == Exported(tmp_path / name, "adapter", f"import meft\nmodel = meft.load('{tmp_path / name}')")
        assert no_pickles(tmp_path / name)
        assert "meft.load" in (tmp_path / name / "README.md").read_text()
        assert torch.equal(outputs(AutoPeftModelForCausalLM.from_pretrained(tmp_path / name), BATCH), expected)
    assert torch.equal(outputs(model, BATCH), expected)
    os.rename(base_folder, tmp_path / "elsewhere")
    for name in ("saved", "memory"):
        os.rename(tmp_path / name, tmp_path / f"{name}-moved")
        loaded = meft.load(tmp_path / f"{name}-moved")
        assert not loaded.training and torch.equal(outputs(loaded, BATCH), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved-moved")("the cat")["input_ids"]


def test_loaded_to_go_on_training(base_folder: Path, tmp_path: Path) -> None:
    model = meft_adapter(base_folder, "meft1")
    meft.export(model, tmp_path / "out")
    loaded = meft.load(tmp_path / "out", is_trainable=True, dtype=torch.float32)
    assert_equal(gradients(loaded.train(), BATCH), gradients(model.train(), BATCH))
    assert not any(parameter.requires_grad for parameter in meft.load(tmp_path / "out").parameters())


def test_an_adapter_of_another_name(base_folder: Path, tmp_path: Path) -> None:
    """The one that is active is exported."""
    model = meft_adapter(base_folder, "meft1")
    model.add_adapter("other", meft.MeftConfig(task_type=TASK, coupling="momentum", bottleneck_dim=3))
    enlarge(model, "other")
    model.set_adapter("other")
    meft.export(model, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base",
    ]
    assert torch.equal(outputs(meft.load(tmp_path / "out"), BATCH), outputs(model.eval(), BATCH))


def test_what_could_be_merged_may_be_kept_apart(base_folder: Path, tmp_path: Path) -> None:
    model = trained(base_folder, MERGEABLE["lora"]())
    model.save_pretrained(tmp_path / "adapter")
    assert meft.export(tmp_path / "adapter", tmp_path / "out", merge=False).kind == "adapter"
    assert torch.equal(outputs(meft.load(tmp_path / "out"), BATCH), outputs(model, BATCH))
    assert meft.export(meft.make_reversible(model), tmp_path / "memory", merge=False).kind == "adapter"
    assert torch.equal(outputs(meft.load(tmp_path / "memory"), BATCH), outputs(meft.restore(model), BATCH))


def test_prompts_are_kept_apart(base_folder: Path, tmp_path: Path) -> None:
    model = trained(base_folder, PromptTuningConfig(task_type=TASK, num_virtual_tokens=3))
    meft.export(model, tmp_path / "out")
    assert torch.equal(outputs(meft.load(tmp_path / "out"), BATCH), outputs(model, BATCH))
    with pytest.raises(ConfigError, match=r"an adapter of PROMPT_TUNING cannot be merged: it is not a change of"):
        meft.export(model, tmp_path / "merged", merge=True)


def test_in_another_dtype(base_folder: Path, tmp_path: Path) -> None:
    trained(base_folder, MERGEABLE["lora"]()).save_pretrained(tmp_path / "adapter")
    meft.export(tmp_path / "adapter", tmp_path / "out", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_load_takes_any_folder(base_folder: Path, tmp_path: Path) -> None:
    """A plain model, and an adapter that only names its base."""
    assert torch.equal(outputs(meft.load(base_folder), BATCH), outputs(pretrained(base_folder), BATCH))
    model = meft_adapter(base_folder, "meft3")
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(outputs(meft.load(tmp_path / "adapter"), BATCH), outputs(model, BATCH))


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["meft1", "momentum"])
def test_merging_a_coupling_is_refused(coupling: str, base_folder: Path, tmp_path: Path) -> None:
    model = meft_adapter(base_folder, coupling)
    model.save_pretrained(tmp_path / "adapter")
    for source in (model, tmp_path / "adapter"):
        with pytest.raises(ConfigError, match=rf"MEFT \(coupling='{coupling}'\) cannot be merged.*Leave merge out"):
            meft.export(source, tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists() and not hidden_files(tmp_path)


def test_a_folder_that_is_not_empty_stays_as_it_is(base_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputFolderError, match=r"not empty \(notes.txt\). Nothing was changed"):
        meft.export(base_folder, out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    with pytest.raises(OutputFolderError, match="which is a file"):
        meft.export(base_folder, out / "notes.txt")
    (out / "notes.txt").unlink()
    assert meft.export(base_folder, out).kind == "model"


def test_sources_that_are_missing_or_something_else(base_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoint-4").mkdir(parents=True)
    lora = trained(base_folder, MERGEABLE["lora"]())
    lora.add_adapter("other", MERGEABLE["lora"]())
    lora.base_model.set_adapter(["default", "other"])
    for source, error, text in (
        (tmp_path / "none", CheckpointError, "none, which should be exported, does not exist"),
        (base_folder / "config.json", CheckpointError, "config.json, which should be exported, is a file"),
        (run, CheckpointError, "holds neither an adapter .* give one of its checkpoints: checkpoint-4"),
        (tmp_path, CheckpointError, r"holds neither an adapter \(adapter_config.json\) nor a model"),
        (nn.Linear(2, 2), ConfigError, "export was given a Linear. Valid are a Transformers model"),
        (lora, ConfigError, r"adapters \['default', 'other'\] .* are active together"),
    ):
        with pytest.raises(error, match=text):
            meft.export(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_base_model_that_is_missing_or_another(base_folder: Path, tmp_path: Path) -> None:
    trained(base_folder, MERGEABLE["lora"]()).save_pretrained(tmp_path / "adapter")
    meft_adapter(base_folder, "meft1").save_pretrained(tmp_path / "meft")
    os.rename(base_folder, tmp_path / "moved")
    for name in ("adapter", "meft"):
        with pytest.raises(CheckpointError, match=r"base model .* is missing .*, where the model should be, does not"):
            meft.export(tmp_path / name, tmp_path / "out")
        assert meft.export(tmp_path / name, tmp_path / f"{name}-out", base_model_name_or_path=str(tmp_path / "moved"))
        other = tmp_path / "other"
        llama(hidden_size=16).save_pretrained(other)
        with pytest.raises(CheckpointError, match=r"does not fit the base model|made for another base model"):
            meft.export(tmp_path / name, tmp_path / "out", base_model_name_or_path=str(other))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="does not say which model it was trained on"):
        meft.export(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not hidden_files(tmp_path)


def test_options_that_do_not_go_with_the_source(base_folder: Path, tmp_path: Path) -> None:
    model = pretrained(base_folder)
    with pytest.raises(ConfigError, match="base_model_name_or_path was given, but the source is a LlamaForCausalLM in"):
        meft.export(model, tmp_path / "out", base_model_name_or_path="base")
    with pytest.raises(ConfigError, match="dtype was given, but the source"):
        meft.export(model, tmp_path / "out", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="holds a whole model, which has no base"):
        meft.export(base_folder, tmp_path / "out", base_model_name_or_path="base")


def test_damaged_weights(base_folder: Path, tmp_path: Path) -> None:
    trained(base_folder, MERGEABLE["lora"]()).save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="is truncated"):
        meft.export(tmp_path / "adapter", tmp_path / "out")
    weights.unlink()
    with pytest.raises(CheckpointError):
        meft.export(tmp_path / "adapter", tmp_path / "out")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config.json cannot be read.*Copy the adapter again"):
        meft.export(tmp_path / "adapter", tmp_path / "out")


def test_a_write_that_fails_leaves_nothing(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "_sync_tree", full)
    with pytest.raises(OSError, match="No space left"):
        meft.export(base_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not hidden_files(tmp_path)


# --- The command ------------------------------------------------------------------------------------------------------


def test_command(base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def code(*words: str) -> int:
        with pytest.raises(SystemExit) as end:
            cli.main(["export", *words])
        return int(end.value.code or 0)

    trained(base_folder, MERGEABLE["lora"]()).save_pretrained(tmp_path / "adapter")
    meft_adapter(base_folder, "meft1").save_pretrained(tmp_path / "meft")
    assert code(str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "plain")) == 0
    shown = capsys.readouterr().out
    assert f"Wrote a plain model to {tmp_path / 'plain'}" in shown and "AutoModelForCausalLM.from_pretrained(" in shown
    assert code(str(tmp_path / "meft"), "--output_dir", str(tmp_path / "served")) == 0
    assert "meft.load(" in capsys.readouterr().out
    words = ("--no-merge", "--dtype", "bfloat16", "--base_model_name_or_path", str(base_folder))
    assert code(str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "apart"), *words) == 0
    assert next(meft.load(tmp_path / "apart").get_base_model().parameters()).dtype == torch.bfloat16
    assert code(str(tmp_path / "meft"), "--output_dir", str(tmp_path / "merged"), "--merge") == 2
    assert "cannot be merged" in capsys.readouterr().err
    assert code(str(tmp_path / "meft"), "--output_dir", str(tmp_path / "served")) == 2
    assert code(str(tmp_path / "none"), "--output_dir", str(tmp_path / "x")) == 2
    assert code(str(tmp_path / "meft"), "--output_dir", str(tmp_path / "x"), "--dtype", "int3") == 2
    assert "dtype is 'int3'" in capsys.readouterr().err
