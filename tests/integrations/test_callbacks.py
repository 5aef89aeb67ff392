"""`MeftCallback` in a Trainer: what is logged, to whom, and how much of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

import meft
from meft.integrations.callbacks import DRIFT, PEAK
from support import models
from support.peft_helpers import adapted

ROWS, LENGTH, HIDDEN = 4, 16, 32


class Integration(TrainerCallback):
    """Stands for the trackers that `report_to` names."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        REPORTED.append(self.seen)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append({"step": state.global_step, **logs})


REPORTED: list[list[dict[str, Any]]] = []


@pytest.fixture(autouse=True)
def tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    REPORTED.clear()
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tracker", Integration)


class Rows(Dataset):
    def __init__(self) -> None:
        self.columns = models.batch("opt", "CAUSAL_LM", size=8 * ROWS, length=LENGTH, padding=None)

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


def lora(layers: int = 3, rank: int = 1) -> nn.Module:
    base = models.build("opt", "CAUSAL_LM", layers=layers)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=rank))


def run(model: nn.Module, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": ROWS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": ["tracker"],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**{**arguments, **options}),
        train_dataset=Rows(),
        callbacks=[*(callbacks or [meft.MeftCallback()])],
    )
    trainer.train()
    return trainer


def training_logs(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in logs if "loss" in entry]


def peak(model: nn.Module, folder: Path) -> int:
    found = {entry[PEAK] for entry in training_logs(run(model, folder).state.log_history) if PEAK in entry}
    assert len(found) == 1
    return found.pop()


def test_figures_reach_what_report_to_names_and_the_history(tmp_path: Path) -> None:
    """The memory of the second step from then on; the drift of every step, 0 in exact arithmetic."""
    trainer = run(meft.make_reversible(lora()), tmp_path)
    history = training_logs(trainer.state.log_history)
    (reported,) = REPORTED
    for logs in (history, training_logs(reported)):
        assert [entry["step"] for entry in logs] == [1, 2, 3, 4]
        assert [entry[DRIFT] for entry in logs] == [0.0] * 4
        assert PEAK not in logs[0] and logs[1][PEAK] == logs[2][PEAK] == logs[3][PEAK] > 0
    others = [entry for entry in [*reported, *trainer.state.log_history] if "loss" not in entry]
    assert others and not any(PEAK in entry or DRIFT in entry for entry in others)


def test_the_figures_reach_a_tracker_that_is_added_behind(tmp_path: Path) -> None:
    behind = Integration()
    run(meft.make_reversible(lora()), tmp_path, meft.MeftCallback(), behind, report_to=[])
    assert all(DRIFT in entry for entry in training_logs(behind.seen))


def test_drift_is_the_largest_since_the_last_log(tmp_path: Path) -> None:
    """In float arithmetic: what the drift warning compares with the tolerance."""

    def drifts(logging_steps: int) -> list[float]:
        model = adapted("opt", "meft1", "CAUSAL_LM", arithmetic="float", lam=0.1, output="mean", drift_tolerance=9.0)
        trainer = run(model, tmp_path, logging_steps=logging_steps, seed=1)
        return [entry[DRIFT] for entry in training_logs(trainer.state.log_history)]

    each = drifts(1)
    assert all(0 < drift < 9 for drift in each) and each[0] > each[1] and each[3] != each[2]
    assert drifts(2) == [max(each[:2]), max(each[2:])]


def test_nothing_is_rebuilt(tmp_path: Path) -> None:
    """Stored activations do not drift; their memory is logged all the same."""
    logs = training_logs(run(meft.make_reversible(lora(), backward="cached"), tmp_path).state.log_history)
    assert not any(DRIFT in entry for entry in logs) and PEAK in logs[-1]


@pytest.mark.parametrize("rank", [1, 4])
def test_memory_of_one_more_layer(rank: int, tmp_path: Path) -> None:
    """Residues of two bits an element at the end of the forward pass, gradients of the adapters at its beginning.

    As the backward pass goes down, gradients take the place of residues, so the larger of the two makes the peak. A
    checksum (8 bytes) and a magnitude (4) of each layer are kept throughout, and one byte on the way down.
    """
    residues, gradients = ROWS * LENGTH * HIDDEN * 2 // 8, 2 * rank * HIDDEN * 4
    deep, shallow = (peak(meft.make_reversible(lora(layers, rank), gamma=1 / 4), tmp_path) for layers in (7, 6))
    assert deep - shallow == max(residues + 12, gradients + 13)
    deep, shallow = (peak(lora(layers, rank), tmp_path) for layers in (7, 6))
    assert deep - shallow > 32 * max(residues, gradients)


def test_the_only_step_is_measured(tmp_path: Path) -> None:
    logs = training_logs(run(meft.make_reversible(lora()), tmp_path, max_steps=1).state.log_history)
    assert [PEAK in entry for entry in logs] == [True]


def test_a_profiler_that_is_running_stays(tmp_path: Path) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        logs = training_logs(run(meft.make_reversible(lora()), tmp_path).state.log_history)
    assert not any(PEAK in entry for entry in logs) and len(profile.events()) > 0


class _Stop(TrainerCallback):
    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            raise KeyboardInterrupt


def test_a_run_after_one_that_was_interrupted(tmp_path: Path) -> None:
    """In the middle of the step that is measured: the meter stops when the next run begins."""
    callback = meft.MeftCallback()
    with pytest.raises(KeyboardInterrupt):
        run(meft.make_reversible(lora()), tmp_path, callback, _Stop(), gradient_accumulation_steps=2)
    assert torch.autograd._profiler_enabled()
    logs = training_logs(run(meft.make_reversible(lora()), tmp_path, callback).state.log_history)
    assert not torch.autograd._profiler_enabled()
    fresh = training_logs(run(meft.make_reversible(lora()), tmp_path).state.log_history)
    assert [entry.get(PEAK) for entry in logs] == [entry.get(PEAK) for entry in fresh]


def test_nothing_listens_after_the_run(tmp_path: Path) -> None:
    callback = meft.MeftCallback()
    model = meft.make_reversible(lora()).train()
    run(model, tmp_path, callback)
    callback._drift = None
    model(**models.batch("opt", "CAUSAL_LM")).loss.backward()
    assert callback._drift is None


def test_on_cuda_every_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was live before a step does not count; of the steps since the last log the largest does."""
    begun = iter([100, 130, 120])
    peaks = iter([150, 200, 125])
    device = torch.device("cuda", 0)
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda where: next(begun))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda where: next(peaks))
    callback, args, control = meft.MeftCallback(), SimpleNamespace(device=device), TrainerControl()
    state = TrainerState(max_steps=3)
    callback.on_train_begin(args, state, control)
    logged = []
    for step, log in ((1, False), (2, True), (3, True)):
        callback.on_step_begin(args, state, control)
        state.global_step = step
        callback.on_step_end(args, state, control)
        logs = {"loss": 1.0}
        if log:
            callback.on_log(args, state, control, logs=logs)
            logged.append(logs)
    callback.on_train_end(args, state, control)
    assert logged == [{"loss": 1.0, PEAK: 70}, {"loss": 1.0, PEAK: 5}]
    assert reset == [device] * 3
