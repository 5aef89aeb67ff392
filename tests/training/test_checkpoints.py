from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState, TrainingArguments

from meft.errors import CheckpointError
from meft.training.checkpoints import CheckpointingTrainer, check_checkpoint, newest_complete, write_manifest
from support.tiny import make_model, make_rte, train


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "inner").mkdir(parents=True)
        (folder / "weights").write_bytes(b"w" * step)
        (folder / "inner" / "state").write_bytes(b"s")
        write_manifest(folder, resumable=True)
    (tmp_path / "checkpoint-new").mkdir()
    return tmp_path


def test_the_newest_by_its_step_not_by_alphabet(run: Path) -> None:
    assert newest_complete(run) == (run / "checkpoint-10", [])


def test_a_damaged_one_is_passed_over_with_the_reason(run: Path) -> None:
    (run / "checkpoint-10" / "weights").write_bytes(b"w" * 7)
    found, reasons = newest_complete(run)
    assert found == run / "checkpoint-2"
    assert reasons == [
        f"{run}/checkpoint-10/weights has 7 bytes, 10 were written. Copy it again or resume from an earlier checkpoint."
    ]


def test_a_half_removed_one_is_passed_over(run: Path) -> None:
    (run / "checkpoint-10" / "inner" / "state").unlink()
    found, reasons = newest_complete(run)
    assert found == run / "checkpoint-2" and "checkpoint-10/inner/state is missing from its checkpoint." in reasons[0]


def test_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    found, reasons = newest_complete(tmp_path)
    assert (
        found is None and "checkpoint-1 has no checkpoint.json, so it is no complete checkpoint of meft" in reasons[0]
    )
    with pytest.raises(CheckpointError, match=r"checkpoint-9 does not exist. Give a folder named checkpoint-<step> of"):
        check_checkpoint(tmp_path / "checkpoint-9")


def test_weights_alone_are_not_resumed_from(run: Path) -> None:
    write_manifest(run / "checkpoint-10", resumable=False)
    with pytest.raises(
        CheckpointError, match=r"holds the weights only \(--save_only_model\), so training cannot go on"
    ):
        check_checkpoint(run / "checkpoint-10")


WORDS = ["--method=lora", "--max_steps=4", "--per_device_train_batch_size=4", "--learning_rate=0.01"]
SAVING = ["--save_strategy=steps", "--save_steps=1"]


def unfinished(run: Path) -> Path:
    """As a kill after the last step would leave it."""
    for name in ("results.json", "adapter_config.json", "adapter_model.safetensors"):
        (run / name).unlink()
    return run


def test_resume_from_the_last_step_and_from_a_damaged_one(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    data = ["--task=rte", f"--data_dir={make_rte(tmp_path / 'RTE')}"]
    run = tmp_path / "run"
    train(model, data, run, *WORDS, *SAVING)
    weights = (run / "adapter_model.safetensors").read_bytes()

    # The Trainer, resumed at the last of its steps in mid-epoch, would train one more.
    found = train(model, data, unfinished(run), *WORDS, *SAVING)
    assert (found["resumed_from"], found["steps"]) == ("checkpoint-4", 4)
    assert (run / "adapter_model.safetensors").read_bytes() == weights

    unfinished(run)
    said: list[str] = []
    path = run / "checkpoint-4" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:100])
    found = train(model, data, run, *WORDS, *SAVING, say=said.append)
    assert (found["resumed_from"], found["steps"]) == ("checkpoint-3", 4)
    assert any(text.startswith("Passed over a checkpoint: ") and "optimizer.pt has 100 bytes" in text for text in said)
    assert f"Going on from {run / 'checkpoint-3'}." in said
    assert (run / "adapter_model.safetensors").read_bytes() == weights
    check_checkpoint(run / "checkpoint-4")  # written anew over the damaged one

    other = tmp_path / "other"
    found = train(model, data, other, *WORDS, *SAVING, f"--resume_from_checkpoint={run / 'checkpoint-2'}")
    assert found["resumed_from"] == "checkpoint-2"
    assert (other / "adapter_model.safetensors").read_bytes() == weights
    shutil.rmtree(run / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"checkpoint-2 does not exist"):
        train(model, data, tmp_path / "third", *WORDS, f"--resume_from_checkpoint={run / 'checkpoint-2'}")


def test_checkpoints_are_limited_in_number(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    data = ["--task=rte", f"--data_dir={make_rte(tmp_path / 'RTE')}"]
    train(model, data, tmp_path / "run", *WORDS, *SAVING, "--save_total_limit=2")
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


@pytest.fixture
def small() -> Callable[[Path, int], CheckpointingTrainer]:
    """Four steps, each saved and scored; the score of the first step is the best."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.weight - x).square().mean()}

    def make(folder: Path, limit: int) -> CheckpointingTrainer:
        scores = iter([3.0, 1.0, 2.0, 1.0])
        rows = [{"x": torch.ones(3)}] * 4
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            per_device_train_batch_size=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=limit,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
            remove_unused_columns=False,
        )
        return CheckpointingTrainer(
            Model(), arguments, train_dataset=rows, eval_dataset=rows, scorer=lambda _: {"score": next(scores)}
        )

    return make


def test_the_best_checkpoint_is_not_rotated_away_and_is_what_the_model_ends_as(small, tmp_path: Path) -> None:
    trainer = small(tmp_path, 2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    best = load_file(tmp_path / "checkpoint-1" / "model.safetensors")["weight"]
    assert torch.equal(trainer.model.weight.data, best)
    assert not torch.equal(best, load_file(tmp_path / "checkpoint-4" / "model.safetensors")["weight"])


def test_no_checkpoint_goes_before_the_new_one_is_whole(small, tmp_path: Path, monkeypatch) -> None:
    trainer, before = small(tmp_path, 2), []
    rmtree = shutil.rmtree

    def removed(path: Path, *rest: object, **more: object) -> None:
        if Path(path).parent == tmp_path and Path(path).name.startswith("checkpoint-"):
            newest, damaged = newest_complete(tmp_path)
            before.append((Path(path).name, newest.name, damaged))  # type: ignore[union-attr]
        rmtree(path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "rmtree", removed)
    trainer.train()
    # The first one is the best, and stays.
    assert before == [("checkpoint-2", "checkpoint-3", []), ("checkpoint-3", "checkpoint-4", [])]


def test_the_state_in_a_checkpoint_names_the_best_where_it_stands(small, tmp_path: Path) -> None:
    small(tmp_path, 4).train()
    for step in (1, 2, 3, 4):
        state = TrainerState.load_from_json(str(tmp_path / f"checkpoint-{step}" / "trainer_state.json"))
        assert state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
