"""A run goes on with the rows and the checkpoint that it had, and with what errors advise."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from meft.errors import CheckpointError, OutputFolderError, StreamOverflowError
from meft.loading.folders import load
from meft.training.checkpoints import check_checkpoint
from meft.training.runs import differences
from support.tiny import evaluate, make_model, sentence, train

NORM = "embeddings.LayerNorm.weight"
WORDS = ["--method=momentum", "--max_steps=4", "--per_device_train_batch_size=4", "--learning_rate=0.01"]
SAVING = ["--save_strategy=steps", "--save_steps=2"]


def rows(path: Path, seed: int = 0, count: int = 12) -> Path:
    generator = random.Random(seed)
    lines = [f"{sentence(generator)},{'yes' if index % 2 else 'no'}" for index in range(count)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return path


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Path, list[str], Path]:
    """A model, the words for its data, and a run that was killed at its end, with two checkpoints."""
    model = make_model(tmp_path / "model")
    data = [f"--train_file={rows(tmp_path / 'train.csv')}", f"--validation_file={rows(tmp_path / 'dev.csv', 1)}"]
    train(model, data, tmp_path / "run", *WORDS, *SAVING)
    return model, data, unfinish(tmp_path / "run")


def unfinish(run: Path) -> Path:
    for name in ("results.json", "adapter_config.json", "adapter_model.safetensors"):
        (run / name).unlink()
    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("split", "file"), [("train", "train.csv"), ("validation", "dev.csv")])
def test_other_rows_are_refused(split: str, file: str, begun: tuple[Path, list[str], Path]) -> None:
    model, data, run = begun
    path = run.parent / file
    text, before = path.read_text(), content(run)
    path.write_text(text.replace(",yes", ",no", 1))
    message = rf"holds an unfinished run on other data: the {split} rows \(.*{file}\) are not those that it began with"
    with pytest.raises(OutputFolderError, match=message) as caught:
        train(model, data, run, *WORDS, *SAVING)
    assert "Put the data back as it was, choose another --output_dir, or give --overwrite_run" in str(caught.value)
    assert content(run) == before
    path.write_text(text)
    assert train(model, data, run, *WORDS, *SAVING)["resumed_from"] == "checkpoint-4"


def test_another_order_of_rows_is_other_data_and_another_notation_is_not(begun: tuple[Path, list[str], Path]) -> None:
    model, data, run = begun
    path = run.parent / "train.csv"
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([head, *[f'"{line.split(",")[0]}",{line.split(",")[1]}' for line in lines]]))
    assert train(model, data, run, *WORDS, *SAVING)["resumed_from"] == "checkpoint-4"
    unfinish(run)
    path.write_text("\n".join([head, *reversed(lines)]))
    with pytest.raises(OutputFolderError, match="on other data: the train rows"):
        train(model, data, run, *WORDS, *SAVING)
    train(model, data, run, *WORDS, *SAVING, "--overwrite_run")
    assert len(list(run.parent.glob("run.replaced-*/checkpoint-4"))) == 1


FILES = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit_in_a_checkpoint_is_found(file: str, begun: tuple[Path, list[str], Path]) -> None:
    model, data, run = begun
    path = run / "checkpoint-4" / file
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes(flipped)
    message = rf"{file} is not what was written: its SHA-256 is another. Copy it again or resume from an earlier"
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(path.parent)
    with pytest.raises(CheckpointError, match=message):
        train(model, data, run.parent / "other", *WORDS, f"--resume_from_checkpoint={path.parent}")
    if file.endswith("safetensors"):
        for read in (load, evaluate):
            with pytest.raises(CheckpointError, match=message):
                read(path.parent)
    said: list[str] = []
    assert train(model, data, run, *WORDS, *SAVING, say=said.append)["resumed_from"] == "checkpoint-2"
    assert any(text.startswith("Passed over a checkpoint: ") and file in text for text in said)


def test_a_manifest_of_version_0_1_0_is_read(begun: tuple[Path, list[str], Path]) -> None:
    path = begun[2] / "checkpoint-4" / "checkpoint.json"
    written = json.loads(path.read_text())
    written["files"] = {name: said["bytes"] for name, said in written["files"].items()}
    path.write_text(json.dumps(written))
    check_checkpoint(path.parent)


@pytest.mark.parametrize(
    ("words", "said_to_change"),
    [
        (["--fraction_bits=12"], "fraction_bits was None and is 12"),
        (["--tile_size=4"], "tile_size was None and is 4"),
        (["--backward=cached"], "backward was None and is 'cached'"),
        (["--per_device_train_batch_size=2", "--gradient_accumulation_steps=2"],
         "per_device_train_batch_size was 4 and is 2; gradient_accumulation_steps was 1 and is 2"),
        (["--save_steps=3"], "save_steps was 2 and is 3"),
    ],
)  # fmt: skip
def test_what_changes_nothing_learnt_is_gone_on_with(
    words: list[str], said_to_change: str, begun: tuple[Path, list[str], Path]
) -> None:
    model, data, run = begun
    for path in (run / "checkpoint-4").iterdir():
        path.unlink()
    said: list[str] = []
    found = train(model, data, run, *WORDS, *SAVING, *words, say=said.append)
    assert found["resumed_from"] == "checkpoint-2" and found["steps"] == 4
    assert f"Going on from checkpoint-2 with: {said_to_change}." in said
    changed = json.loads((run / "run.json").read_text())["changed"]
    assert [entry["what"] for entry in changed] == [said_to_change.split("; ")]


def test_what_changes_the_run_is_refused_with_the_way_out(begun: tuple[Path, list[str], Path]) -> None:
    model, data, run = begun
    for word in ("--learning_rate=0.5", "--per_device_train_batch_size=2", "--gamma=1/64", "--seed=1", "--max_steps=9"):
        before = content(run)
        with pytest.raises(OutputFolderError, match=r"of other arguments \(\w+ was .* and is .*\).*--overwrite_run"):
            train(model, data, run, *WORDS, *SAVING, word)
        assert content(run) == before


def test_advice_after_an_overflow_is_followed(tmp_path: Path) -> None:
    """Streams of 24 fraction bits hold 128; what the error names trains on, in the same folder."""
    model = make_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file(weights | {NORM: weights[NORM] * 1000}, model / "model.safetensors", {"format": "pt"})
    data = [f"--train_file={rows(tmp_path / 'train.csv')}", f"--validation_file={rows(tmp_path / 'dev.csv', 1)}"]
    with pytest.raises(StreamOverflowError, match="fraction_bits"):
        train(model, data, tmp_path / "run", *WORDS, "--fraction_bits=24")
    said: list[str] = []
    found = train(model, data, tmp_path / "run", *WORDS, "--fraction_bits=14", say=said.append)
    assert found["resumed_from"] is None and found["arguments"]["fraction_bits"] == 14
    assert "Beginning anew with: fraction_bits was 24 and is 14." in said


def test_a_run_that_failed_before_its_first_checkpoint_begins_anew_in_any_way(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    data = [f"--train_file={rows(tmp_path / 'train.csv')}", f"--validation_file={rows(tmp_path / 'dev.csv', 1)}"]
    run = tmp_path / "run"

    def fail(_: str) -> None:
        raise ValueError("The optimizer\nis not installed.")

    with pytest.raises(ValueError, match="not installed"):
        train(model, data, run, *WORDS, say=lambda text: fail(text) if text.startswith("Start") else None)
    assert json.loads((run / "run.json").read_text())["failed"] == "The optimizer."
    rows(tmp_path / "train.csv", seed=5)
    said: list[str] = []
    found = train(model, data, run, *WORDS, "--method=lora", "--seed=5", say=said.append)
    assert found["method"] == "lora" and found["coupling"] is None
    assert "Beginning anew with: method was 'momentum' and is 'lora'; seed was 42 and is 5." in said
    assert "failed" not in json.loads((run / "run.json").read_text())


def test_only_what_changes_the_run_is_a_difference() -> None:
    arguments = {"tile_size": 1, "logging_steps": 1, "learning_rate": 1}
    others = {name: value + 1 for name, value in arguments.items()}
    assert differences(arguments, others) == ["learning_rate was 1 and is 2"]


def test_the_best_checkpoint_is_one_of_the_run(tmp_path: Path) -> None:
    """Where a state says that the best checkpoint is elsewhere, nothing is read there."""
    model = make_model(tmp_path / "model")
    data = [f"--train_file={rows(tmp_path / 'train.csv')}", f"--validation_file={rows(tmp_path / 'dev.csv', 1)}"]
    best = ["--load_best_model_at_end", "--eval_strategy=steps", "--eval_steps=2", *SAVING]
    train(model, data, tmp_path / "run", *WORDS, *best)
    moved = unfinish((tmp_path / "run").rename(tmp_path / "moved"))
    found = train(model, data, moved, *WORDS, *best)
    assert found["resumed_from"] == "checkpoint-4" and found["best_step"] in (2, 4)
    state = json.loads((moved / "checkpoint-4" / "trainer_state.json").read_text())
    assert str(tmp_path / "run") in state["best_model_checkpoint"]
