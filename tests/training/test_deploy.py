"""`verify(model, batch, deploy=True)` and `meft verify --deploy`: the loss as trained and as deployed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import meft
from meft import cli
from meft.errors import ConfigError
from support import models
from support.peft_helpers import TASK_OF, adapted, anatomy, assert_equal, batch_of, gradients, llama, snapshot
from support.tiny import make_model

FAMILIES = ("bert", "bart", "opt")
GAMMAS = ["1/2", "1/4", "1/8", "1/16", "1/32"]


def loss_of(model: nn.Module, batch: dict[str, Any]) -> float:
    """In evaluation; the model is left in it."""
    with torch.no_grad():
        return float(model.eval()(**batch).loss)


def lora_on(family: str, **options: Any) -> nn.Module:
    base = models.build(family, TASK_OF[family], layers=3, dropout=0.1)
    modules = ["query", "value"] if family == "bert" else ["q_proj", "v_proj"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = get_peft_model(base, LoraConfig(target_modules=modules, init_lora_weights=False))
    return meft.make_reversible(model, **options)


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_models_themselves(family: str, granularity: str) -> None:
    model, batch = lora_on(family, gamma=1 / 8, granularity=granularity), batch_of(family)
    deployment = meft.verify(model, batch, deploy=True).deployment
    assert deployment is not None
    assert deployment.trained == loss_of(model, batch)
    assert deployment.deployed == loss_of(meft.restore(model), batch) != deployment.trained
    assert list(deployment.by_gamma) == GAMMAS
    assert deployment.by_gamma["1/8"] == deployment.trained
    meft.make_reversible(model, gamma=1 / 2, granularity=granularity)
    assert deployment.by_gamma["1/2"] == loss_of(model, batch)


def test_smaller_gammas_come_nearer_to_the_plain_model() -> None:
    model = meft.make_reversible(llama())
    deployment = meft.verify(model, batch_of("opt", "CAUSAL_LM"), deploy=True).deployment
    assert deployment is not None
    distances = [abs(loss - deployment.deployed) for loss in deployment.by_gamma.values()]
    assert distances == sorted(distances, reverse=True) and distances[-1] < 0.2 * distances[0]


def test_random_signs_are_drawn_in_the_loss_as_trained() -> None:
    """In evaluation such a model is the deployed one already."""
    model, batch = lora_on("opt", sign="random", gamma=1 / 4), batch_of("opt")
    report = meft.verify(model, batch, deploy=True)
    assert report.deployment is not None and report.passed()
    assert report.deployment.deployed == loss_of(model, batch) == loss_of(meft.restore(model), batch)
    assert report.deployment.trained != report.deployment.deployed
    assert report.starting_point.hidden_state > 0.01
    # Of 1/4 the same draws as for the model's own gamma; the sign of a small one matters less.
    assert report.deployment.by_gamma["1/4"] == report.deployment.trained
    change = {name: abs(loss - report.deployment.deployed) for name, loss in report.deployment.by_gamma.items()}
    assert change["1/32"] < 0.2 * change["1/2"]


@pytest.mark.parametrize("coupling", ["meft1", "meft2", "meft3"])
def test_other_couplings_have_no_gamma(coupling: str) -> None:
    model, batch = lora_on("bert", coupling=coupling), batch_of("bert")
    deployment = meft.verify(model, batch, deploy=True).deployment
    assert deployment is not None and deployment.by_gamma == {}
    assert deployment.trained == loss_of(model, batch) != deployment.deployed == loss_of(meft.restore(model), batch)


def test_a_gamma_of_the_models_own_is_listed() -> None:
    for gamma, name in ((1 / 3, "1/3"), (0.123, "0.123")):
        model = lora_on("bert", gamma=gamma, arithmetic="float", drift_tolerance=1.0)
        deployment = meft.verify(model, batch_of("bert"), deploy=True).deployment
        assert deployment is not None and deployment.by_gamma[name] == deployment.trained
        assert len(deployment.by_gamma) == 6


def test_adapters_of_momentum_run_on_the_plain_layers() -> None:
    model, batch = adapted("bert", "momentum"), batch_of("bert")
    deployment = meft.verify(model, batch, deploy=True).deployment
    assert deployment is not None and deployment.trained == loss_of(model, batch)
    twin = adapted("bert", "momentum", sign="random")
    assert deployment.deployed == loss_of(twin, batch)  # whose evaluation is the deployed model
    with model.disable_adapter():
        assert deployment.deployed != loss_of(model, batch)


@pytest.mark.parametrize("coupling", ["meft1", "meft2", "meft3"])
def test_adapters_of_other_couplings_are_refused(coupling: str) -> None:
    model = adapted("bert", coupling)
    with pytest.raises(ConfigError, match=rf"no plain model that runs the adapters of coupling='{coupling}'.*LoRA"):
        meft.verify(model, batch_of("bert"), deploy=True)


def test_a_batch_without_labels_is_refused() -> None:
    batch = {name: value for name, value in batch_of("bert").items() if name != "labels"}
    with pytest.raises(ConfigError, match=r"BertForSequenceClassification returned none .*\(input_ids, attention_mask"):
        meft.verify(meft.make_reversible(models.build("bert", layers=2)), batch, deploy=True)


@pytest.mark.parametrize("options", [{}, {"sign": "random"}, {"coupling": "meft1"}, {"frozen_layers": 1}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_found(training: bool, options: dict[str, Any]) -> None:
    model, batch = lora_on("opt", **options).train(training), batch_of("opt")
    before, weights, state = anatomy(model), snapshot(model), torch.get_rng_state()
    plans = [id(layer._placement.reversible_stack.plan) for layer in model.base_model.model.model.decoder.layers]
    meft.verify(model, batch, deploy=True)
    assert anatomy(model) == before and torch.equal(torch.get_rng_state(), state)
    assert_equal(model.state_dict(), weights)
    assert [
        id(layer._placement.reversible_stack.plan) for layer in model.base_model.model.model.decoder.layers
    ] == plans
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert_equal(gradients(model.train(), batch), gradients(lora_on("opt", **options).train(), batch))


def test_nothing_is_compared_unless_asked_for() -> None:
    report = meft.verify(lora_on("bert"), batch_of("bert"))
    assert report.deployment is None and report.as_dict()["deployment"] is None
    assert "as deployed" not in str(report)


def test_the_report_shows_it() -> None:
    report = meft.verify(lora_on("bert"), batch_of("bert"), deploy=True)
    found, shown = report.deployment, str(report)
    assert found is not None
    assert re.search(rf"as trained\W+{found.trained:.4f}", shown)
    change = re.escape(f"{found.deployed - found.trained:+.4f}")
    assert re.search(rf"as trained.*plain model: {change}", shown)
    assert re.search(rf"as deployed\W+{found.deployed:.4f}", shown)
    assert re.search(rf"gamma 1/16\W+{found.by_gamma['1/16']:.4f}", shown)
    recorded = report.as_dict()["deployment"]
    assert recorded == {"trained": found.trained, "deployed": found.deployed, "by_gamma": dict(found.by_gamma)}


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("deploy") / "model")


def run(folder: Path, *words: str) -> int:
    from meft.cli.verify import verify_command

    return verify_command([f"--model_name_or_path={folder}", "--device=cpu", "--seq_length=8", *words])


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "found.json"
    words = ("--method=lora", "--task_type=SEQ_CLS", "--gamma=0.125", f"--json={record}")
    assert run(folder, "--deploy", *words) == 0
    assert "as deployed" in capsys.readouterr().out
    found = json.loads(record.read_text())["deployment"]
    assert found["by_gamma"]["1/8"] == found["trained"] != found["deployed"]
    assert run(folder, *words) == 0
    assert json.loads(record.read_text())["deployment"] is None


def test_command_with_other_options_of_the_coupling(folder: Path, tmp_path: Path) -> None:
    record = tmp_path / "found.json"
    words = ("--method=full", "--task_type=SEQ_CLS", "--deploy", f"--json={record}")
    assert run(folder, *words) == 0
    fixed = json.loads(record.read_text())["deployment"]
    assert run(folder, *words, "--sign=random") == 0
    random = json.loads(record.read_text())["deployment"]
    assert random["deployed"] == fixed["deployed"] and random["trained"] != fixed["trained"]
    assert run(folder, *words, "--granularity=block") == 0
    assert json.loads(record.read_text())["deployment"]["trained"] != fixed["trained"]


def test_command_on_a_trained_adapter(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(folder)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    record = tmp_path / "found.json"
    words = ("--deploy", "--batch_size=3", f"--json={record}")
    assert run(tmp_path / "adapter", *words) == 0
    assert run(tmp_path / "adapter", *words, "--sign=random") == 0


def test_command_refuses_what_cannot_be_deployed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", f"--model_name_or_path={folder}", "--seq_length=8", "--method=meft1", "--deploy"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("Error: deploy was asked for, but there is no plain model")
