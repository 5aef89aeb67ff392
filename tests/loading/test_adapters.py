"""One check of adapters, whoever loads them: `load`, `export` (merged or not), `evaluate` and `verify`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

import meft
from meft.cli.verify import verify_command
from meft.errors import CheckpointError
from meft.loading.models import read_model
from support.tiny import evaluate, make_model, make_rte, train

METHODS = ("lora", "ia3", "meft1", "momentum", "lora+momentum")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    model, data = make_model(folder / "bert"), ["--task=rte", f"--data_dir={make_rte(folder / 'RTE')}"]
    for method in METHODS:
        train(model, data, folder / method, f"--method={method}", "--max_steps=1")
    return {method: folder / method for method in METHODS}


def without(folder: Path, place: Path, part: str) -> str:
    """Copies an adapter without its weights of one layer or of the head; returns one of the names left out."""
    shutil.copytree(folder, place)
    weights = load_file(place / "adapter_model.safetensors")
    gone = sorted(name for name in weights if part in name)
    save_file({name: value for name, value in weights.items() if name not in gone}, place / "adapter_model.safetensors")
    return gone[0]


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "load": lambda adapter, out: meft.load(adapter),
    "export": lambda adapter, out: meft.export(adapter, out),
    "export apart": lambda adapter, out: meft.export(adapter, out, merge=False),
    "evaluate": lambda adapter, out: evaluate(adapter),
    "verify": lambda adapter, out: verify_command([f"--model_name_or_path={adapter}", "--device=cpu"]),
}


@pytest.mark.parametrize("part", ["layer.1.", "classifier"])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_lacks_weights_is_refused(
    method: str, reader: str, part: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    name = without(runs[method], tmp_path / "adapter", part)
    with pytest.raises(CheckpointError, match=r"does not fit the base model .*: .*its weights.* are missing") as caught:
        READERS[reader](tmp_path / "adapter", tmp_path / "out")
    assert part in str(caught.value) and name and not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", READERS)
def test_an_adapter_with_layers_that_the_base_lacks_is_refused(
    reader: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(runs["lora"], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    more = {
        name.replace("layer.1.", "layer.2."): value.clone() for name, value in weights.items() if "layer.1." in name
    }
    save_file(weights | more, path)
    with pytest.raises(CheckpointError, match=r"12 of its weights have no place there, .*layer\.2\..* for one"):
        READERS[reader](tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="SEQ_CLS", target_modules=["query"], use_dora=True),
        LoraConfig(task_type="SEQ_CLS", target_modules=["query"], bias="lora_only"),
        LoraConfig(task_type="SEQ_CLS", target_modules=["query", "word_embeddings"]),
        IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[]),
        PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
    ],
    ids=lambda config: f"{config.peft_type.value}-{getattr(config, 'use_dora', '')}-{getattr(config, 'bias', '')}",
)
def test_whole_adapters_of_every_kind_load(config: Any, tmp_path: Path) -> None:
    base = str(make_model(tmp_path / "bert", head=True))
    model = get_peft_model(read_model(base, None)[0], config)
    model.save_pretrained(tmp_path / "adapter")
    loaded = meft.load(tmp_path / "adapter", dtype=torch.float32)
    assert isinstance(loaded, PeftModel)
    batch = {"input_ids": torch.tensor([[4, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("reader", READERS)
def test_pickles_are_refused(reader: str, runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["lora"], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"its weights in adapter_model\.bin, a pickle, .* save it anew with"):
        READERS[reader](tmp_path / "adapter", tmp_path / "out")


def test_pickled_models_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "bert")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    data = ["--task=rte", f"--data_dir={make_rte(tmp_path / 'RTE')}"]
    for read in (
        lambda: meft.load(folder),
        lambda: train(folder, data, tmp_path / "run"),
        lambda: meft.export(folder, tmp_path / "out"),
        lambda: verify_command([f"--model_name_or_path={folder}", "--device=cpu", "--method=meft1"]),
    ):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle"):
            read()
