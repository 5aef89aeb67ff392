from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from meft.errors import CheckpointError
from meft.training.checkpoints import check_checkpoint, newest_complete, write_manifest
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
