"""`meft train --method lora+momentum` and its kin: what is saved is plain, and both scores are told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import meft
from meft.backbone.layers import ReversibleLayer
from meft.errors import ConfigError
from meft.storage.results import summary_table
from support.tiny import evaluate, make_model, make_rte, train

STEPS = ["--max_steps=3", "--learning_rate=0.05", "--per_device_train_batch_size=4", "--gamma=0.25"]
WAYS = ("lora+momentum", "ia3+momentum", "full+momentum", "bitfit+momentum")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def rte(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--task=rte", f"--data_dir={make_rte(tmp_path_factory.mktemp('data') / 'RTE')}"]


@pytest.mark.parametrize("method", WAYS)
def test_both_scores_are_told_and_evaluating_again_gives_each_bit_for_bit(
    method: str, model: Path, rte: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    found = train(model, rte, run, f"--method={method}", *STEPS)
    assert (found["method"], found["coupling"], found["settings"]["gamma"]) == (method, "momentum", 0.25)
    assert found["deployed_metrics"].keys() == found["metrics"].keys()
    assert found["deployed_metrics"]["loss"] != found["metrics"]["loss"]
    assert evaluate(run) == found["deployed_metrics"]
    assert evaluate(run, f"--method={method}") == found["metrics"]
    labels = [column.header for column in summary_table(found).columns] + list(summary_table(found).columns[0].cells)
    assert {"accuracy", "accuracy on the plain model"} <= set(labels)


def test_what_is_not_on_a_backbone_has_one_score(model: Path, rte: list[str], tmp_path: Path) -> None:
    found = train(model, rte, tmp_path / "run", "--method=lora", *STEPS[:-1])
    assert (found["deployed_metrics"], found["coupling"], found["settings"]) == (None, None, None)
    assert json.loads((tmp_path / "run" / "task.json").read_text())["trained"] is None


def test_meft1_under_lora(model: Path, rte: list[str], tmp_path: Path) -> None:
    found = train(model, rte, tmp_path / "run", "--method=lora+meft1", "--lam=0.125", *STEPS[:-1])
    assert found["settings"] == {"lam": 0.125, "beta": 1.0, "output": "mean"} and found["deployed_metrics"]
    assert evaluate(tmp_path / "run", "--method=lora+meft1") == found["metrics"]


_PLAIN = """
import sys
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer
import torch
model = AutoPeftModelForSequenceClassification.from_pretrained(sys.argv[1])
assert model.peft_config["default"].peft_type.value == "LORA"
assert not any("Reversible" in type(module).__name__ for module in model.modules())
batch = AutoTokenizer.from_pretrained(sys.argv[1])(["w1 w2 w3"], return_tensors="pt")
assert "meft" not in sys.modules
print(model.eval()(**batch).logits.tolist())
"""


def test_plain_peft_loads_the_adapter_in_a_process_without_meft(model: Path, rte: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(model, rte, run, "--method=lora+momentum", *STEPS)
    script = tmp_path / "plain.py"
    script.write_text(_PLAIN)
    done = subprocess.run([sys.executable, str(script), str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "missing adapter keys" not in done.stderr
    ours = meft.load(run)
    assert not any(isinstance(module, ReversibleLayer) for module in ours.modules())
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(run)(["w1 w2 w3"], return_tensors="pt")
    assert ours.eval()(**batch).logits.tolist() == json.loads(done.stdout)


def test_checkpoints_hold_the_same_and_the_best_becomes_the_result(model: Path, rte: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--save_strategy=steps", "--eval_strategy=steps", "--save_steps=1", "--eval_steps=1"]
    words += ["--load_best_model_at_end=true", "--metric_for_best_model=loss", "--greater_is_better=true"]
    found = train(model, rte, run, "--method=lora+momentum", *STEPS, *words)
    best = run / f"checkpoint-{found['best_step']}"
    assert found["best_step"] < 3
    result, checkpoint = (load_file(folder / "adapter_model.safetensors") for folder in (run, best))
    assert result.keys() == checkpoint.keys()
    assert all(torch.equal(value, checkpoint[name]) for name, value in result.items())
    assert evaluate(best, "--method=lora+momentum") == found["metrics"]


def test_export_merges_into_a_plain_model(model: Path, rte: list[str], tmp_path: Path) -> None:
    found = train(model, rte, tmp_path / "run", "--method=lora+momentum", *STEPS)
    assert meft.export(tmp_path / "run", tmp_path / "served").kind == "model"
    scores = evaluate(tmp_path / "served", *rte)
    assert scores["accuracy"] == found["deployed_metrics"]["accuracy"]
    assert scores["loss"] == pytest.approx(found["deployed_metrics"]["loss"], abs=1e-5)


@pytest.mark.parametrize("method", ["lora+checkpointing", "full+checkpointing", "lora+offload"])
def test_what_is_put_around_changes_no_bit(method: str, model: Path, rte: list[str], tmp_path: Path) -> None:
    for name in (method, method.split("+")[0]):
        train(model, rte, tmp_path / name, f"--method={name}", *STEPS[:-1])
    files = [next((tmp_path / name).glob("*model.safetensors")) for name in (method, method.split("+")[0])]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_offloading_surrounds_the_forward_pass(
    model: Path, rte: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []
    around = torch.autograd.graph.save_on_cpu
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", lambda **how: entered.append(how) or around(**how))
    train(model, rte, tmp_path / "run", "--method=lora+offload", *STEPS[:-1])
    assert len(entered) >= 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method=lora+meft1"], "method is 'lora+meft1', but .* was trained by lora+momentum"),
        (["--method=lora"], "method is 'lora', under which there is no reversible backbone"),
        (["--method=lora+nothing"], "method is 'lora+nothing'; it must be one of"),
    ],
)
def test_a_method_that_it_was_not_trained_by_is_refused(
    words: list[str], message: str, model: Path, rte: list[str], tmp_path: Path
) -> None:
    train(model, rte, tmp_path / "run", "--method=lora+momentum", *STEPS)
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        evaluate(tmp_path / "run", *words)


def test_a_folder_that_does_not_say_how_it_was_trained(model: Path, rte: list[str], tmp_path: Path) -> None:
    train(model, rte, tmp_path / "run", "--method=lora", *STEPS[:-1])
    with pytest.raises(ConfigError, match=r"does not say how it was trained"):
        evaluate(tmp_path / "run", "--method=lora+momentum")


def test_options_of_the_record_are_checked(model: Path, rte: list[str], tmp_path: Path) -> None:
    train(model, rte, tmp_path / "run", "--method=lora+momentum", *STEPS)
    path = tmp_path / "run" / "task.json"
    record: dict[str, Any] = json.loads(path.read_text())
    record["trained"]["options"]["gamma"] = "many"
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="gamma"):
        evaluate(tmp_path / "run", "--method=lora+momentum")
