"""A run that is killed with SIGKILL and started again ends with the same bits as one that never stopped."""

from __future__ import annotations

import json
import multiprocessing
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from meft.training.checkpoints import check_checkpoint
from support.tiny import MOMENTS, hidden_files, make_model, make_rte, train, train_and_die

# Two epochs of five optimizer steps, each of two batches of two rows; checkpoints fall inside and between epochs.
WORDS = [
    "--num_train_epochs=2",
    "--per_device_train_batch_size=2",
    "--gradient_accumulation_steps=2",
    "--learning_rate=0.01",
    "--save_strategy=steps",
    "--save_steps=2",
    "--save_total_limit=2",
    "--seed=3",
]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["meft.training"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("inputs")
    return make_model(folder / "model"), ["--task=rte", f"--data_dir={make_rte(folder / 'RTE')}"]


@pytest.fixture(scope="module")
def uninterrupted(inputs: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for method in ("full", "lora", "meft1", "momentum", "lora+momentum", "full+momentum"):
        folders[method] = tmp_path_factory.mktemp("whole") / method
        train(*inputs, folders[method], f"--method={method}", *WORDS)
    return folders


def kill(moment: str, *arguments: object) -> None:
    process = PROCESSES.Process(target=train_and_die, args=(moment, *arguments))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def weights(folder: Path) -> bytes:
    return next(iter(folder.glob("*model.safetensors"))).read_bytes()


# How a checkpoint is written does not depend on the method, so the reversible ones are killed once each.
CASES = [(method, moment) for method in ("full", "lora") for moment in MOMENTS]
CASES += [("meft1", "in a step"), ("momentum", "writing a checkpoint")]
CASES += [("lora+momentum", "in a step"), ("full+momentum", "writing a checkpoint")]


@pytest.mark.parametrize(("method", "moment"), CASES)
def test_killed_and_resumed_is_bit_equal(
    method: str, moment: str, inputs: tuple[Path, list[str]], uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    kill(moment, *inputs, run, f"--method={method}", *WORDS)
    assert not (run / "results.json").exists()
    assert not (run / "config.json").exists() and not (run / "adapter_config.json").exists()

    if moment != "removing an old checkpoint":
        for path in run.glob("checkpoint-*"):
            check_checkpoint(path)

    found = train(*inputs, run, f"--method={method}", *WORDS)

    assert found["resumed_from"] is not None
    assert weights(run) == weights(uninterrupted[method])
    whole = json.loads((uninterrupted[method] / "results.json").read_text())
    assert found["deployed_metrics"] == whole["deployed_metrics"] and found["settings"] == whole["settings"]
    assert found["metrics"] == whole["metrics"] and found["steps"] == whole["steps"] == 10
    assert hidden_files(run) == []


def test_training_changed_the_weights(inputs: tuple[Path, list[str]], uninterrupted: dict[str, Path]) -> None:
    before, after = load_file(inputs[0] / "model.safetensors"), load_file(uninterrupted["full"] / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    assert not before[name].equal(after[f"bert.{name}"])
