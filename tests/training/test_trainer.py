"""The Trainer of Transformers, as users run it: saving, best model, resuming, accumulation, checkpointing, autocast."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import meft
from support import models
from support.peft_helpers import (
    COUPLINGS,
    METHODS,
    TASK_OF,
    adapted,
    assert_close,
    assert_equal,
    gradients,
    outputs,
    snapshot,
)

STEPS = 6

pytestmark = pytest.mark.usefixtures("quick_collection")


class Rows(Dataset):
    """The rows of one padded batch."""

    def __init__(self, family: str, size: int = 24, seed: int = 0) -> None:
        self.columns = models.batch(family, TASK_OF[family], size=size, seed=seed)

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def meft_model(family: str = "bert", coupling: str = "meft1", **options: Any) -> PeftModel:
    return adapted(family, coupling, dropout=0.1, **options)


def lora_model(family: str = "bert", coupling: str = "momentum", **options: Any) -> PeftModel:
    base = models.build(family, TASK_OF[family], layers=3, dropout=0.1)
    names = ["query", "value"] if "bert" in family else ["q_proj", "v_proj"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = LoraConfig(task_type=TASK_OF[family], target_modules=names, r=4, lora_dropout=0.1)
        model = get_peft_model(base, config)
    return meft.make_reversible(model, coupling, **options).train()


def full_model(family: str = "bert", coupling: str = "momentum", **options: Any) -> nn.Module:
    base = models.build(family, TASK_OF[family], layers=3, dropout=0.1)
    return meft.make_reversible(base, coupling, **options)


KINDS = [meft_model, lora_model, full_model]


def trainer(model: nn.Module, folder: Path, family: str = "bert", **options: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        "dataloader_pin_memory": False,
    }
    hooks = options.pop("callbacks", [])
    return Trainer(
        model=model,
        args=TrainingArguments(**{**arguments, **options}),
        train_dataset=Rows(family),
        eval_dataset=Rows(family, size=8, seed=1),
        callbacks=hooks,
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("kind", "family"),
    [*((meft_model, family) for family in models.FAMILIES), (lora_model, "bart"), (full_model, "opt")],
)
def test_training_is_that_of_stored_activations(kind: Any, family: str, tmp_path: Path) -> None:
    """Losses of every step, with dropout, gradient clipping and a changing learning rate."""
    found = []
    for backward in ("reversible", "cached"):
        run = trainer(kind(family, backward=backward), tmp_path, family)
        before = snapshot(run.model)
        run.train()
        found.append(losses(run))
        moved = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert moved >= {name for name in trainable(run.model) if "bias" not in name and "embed" not in name}
        if kind is not full_model:
            assert moved <= set(trainable(run.model))
    assert len(found[0]) == STEPS
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("coupling", METHODS)
def test_every_coupling_trains(coupling: str, tmp_path: Path) -> None:
    whole = {"per_device_train_batch_size": 24, "learning_rate": 2e-2, "max_steps": 12}
    run = trainer(meft_model("bert", coupling), tmp_path, **whole)
    run.train()
    found = losses(run)
    assert found[-1] < 0.9 * found[0]
    assert torch.isfinite(torch.tensor(run.evaluate()["eval_loss"]))


class _Killed(Exception):
    pass


class _Kill(TrainerCallback):
    """Ends training behind the back of the Trainer."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise _Killed


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_as_if_never_stopped(kind: Any, tmp_path: Path) -> None:
    """Bit for bit: weights, losses and the optimizer's state after the last step."""
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(kind(), tmp_path / "whole", **options)
    whole.train()
    stopped = trainer(kind(), tmp_path / "stopped", callbacks=[_Kill(5)], **options)
    with pytest.raises(_Killed):
        stopped.train()
    resumed = trainer(kind(), tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == STEPS
    assert_equal(resumed.model.state_dict(), whole.model.state_dict())
    for one, other in zip(resumed.optimizer.state.values(), whole.optimizer.state.values(), strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_is_loaded_at_the_end(kind: Any, tmp_path: Path) -> None:
    run = trainer(
        kind(),
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        learning_rate=5e-2,
        save_total_limit=2,
    )
    run.train()
    evaluations = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(evaluations, key=evaluations.__getitem__)
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    # Or the last would have been as good.
    assert run.evaluate()["eval_loss"] == evaluations[best]
    name = "model.safetensors" if kind is full_model else "adapter_model.safetensors"
    saved = load_file(tmp_path / f"checkpoint-{best}" / name)
    assert saved
    if kind is full_model:
        assert_equal({name: run.model.state_dict()[name] for name in saved}, saved)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_trainer_saves(kind: Any, tmp_path: Path) -> None:
    """Ordinary folders: an adapter, a LoRA adapter, or a model with its own plain keys."""
    run = trainer(kind(), tmp_path / "run")
    run.train()
    run.save_model(tmp_path / "saved")
    base = models.build("bert", layers=3, dropout=0.1)
    if kind is full_model:
        assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(base.state_dict())
        loaded = type(base).from_pretrained(tmp_path / "saved", attn_implementation="eager")
        assert_equal(loaded.state_dict(), run.model.state_dict())
        meft.restore(run.model)
    else:
        loaded = PeftModel.from_pretrained(base, tmp_path / "saved")
        if kind is lora_model:
            meft.restore(run.model)
    batch = models.batch("bert", size=4)
    assert torch.equal(outputs(loaded.eval(), batch), outputs(run.model.eval(), batch))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_accumulation(kind: Any, tmp_path: Path) -> None:
    """Two rows four times give the step of eight rows."""
    found = []
    for size, times in ((8, 1), (2, 4)):
        model = kind("bert", "momentum")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            setattr(model.config, name, 0.0)
        if kind is meft_model:
            for module in model.modules():
                if isinstance(module, meft.MeftLayer):
                    module.meft_places = {k: (*place[:3], 0.0) for k, place in module.meft_places.items()}
        run = trainer(
            model,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=times,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
        )
        run.train()
        found.append({name: tensor.clone() for name, tensor in trainable(model).items()})
    assert_close(*found, 1e-4)


# The name that Transformers 5.17 has.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_is_redundant(
    kind: Any, reentrant: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Switched off with a warning, and nothing else changes."""
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    found = []
    for checkpointing in (False, True):
        run = trainer(
            kind(),
            tmp_path,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        run.train()
        found.append((losses(run), snapshot(run.model)))
        assert ("Gradient checkpointing is redundant on reversible layers" in caplog.text) == checkpointing
    assert found[0][0] == found[1][0]
    assert_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast(kind: Any, tmp_path: Path) -> None:
    """The recomputation runs under the forward pass's autocast, which ends before the backward pass begins."""
    found = []
    for backward in ("reversible", "cached"):
        run = trainer(kind(backward=backward), tmp_path, bf16=True)
        run.train()
        found.append(losses(run))
    plain = trainer(kind(), tmp_path)
    plain.train()
    assert losses(plain) != found[0]
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_autocast_gradients(coupling: str) -> None:
    batch = models.batch("bert")
    found = []
    for backward in ("reversible", "cached"):
        model = meft_model("bert", coupling, backward=backward)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert_close(*found, 1e-2)


def test_a_clipped_norm(tmp_path: Path) -> None:
    """`max_grad_norm` bounds what the optimizer sees; the logged norm is that before clipping."""
    run = trainer(meft_model(), tmp_path, max_grad_norm=1e-3, optim="sgd", learning_rate=1.0, max_steps=1)
    before = {name: tensor.clone() for name, tensor in trainable(run.model).items()}
    run.train()
    step = torch.cat([(tensor - before[name]).flatten() for name, tensor in trainable(run.model).items()])
    assert step.norm() == pytest.approx(1e-3, rel=1e-2)
    assert next(entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry) > 1e-2


@pytest.mark.parametrize("family", ["opt", "bart"])
def test_prediction(family: str, tmp_path: Path) -> None:
    run = trainer(meft_model(family), tmp_path, family)
    found = run.predict(Rows(family, size=8, seed=1))
    assert found.metrics["test_loss"] == run.evaluate()["eval_loss"]
    assert gradients(run.model.train(), models.batch(family, TASK_OF[family]))
