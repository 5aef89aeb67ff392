"""Whole runs of `meft train` and `meft evaluate` on images."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meft.errors import CheckpointError, ConfigError, DataError
from meft.methods.registry import METHODS
from meft.methods.table import COUPLED_METHODS
from meft.training.arguments import DataArguments
from meft_lab.kinds.images import ImageClassification
from meft_lab.tasks import load_images
from support.pictures import make_batches, make_folder, make_vit, pixels, save
from support.tiny import evaluate, make_model, make_rte, train, train_and_die

STEPS = ["--max_steps=3", "--learning_rate=0.01", "--per_device_train_batch_size=4"]
SPLITS = {"train": {"cat": 6, "dog": 6}, "validation": {"cat": 3, "dog": 4}, "test": {"cat": 2, "dog": 3}}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vit(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--task=imagefolder", f"--data_dir={make_folder(tmp_path_factory.mktemp('data') / 'pets', SPLITS)}"]


def weights(folder: Path) -> bytes:
    return next(iter(folder.glob("*model.safetensors"))).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_evaluating_a_run_gives_its_metrics_bit_for_bit(
    method: str, vit: Path, pets: list[str], tmp_path: Path
) -> None:
    run, said = tmp_path / "run", []
    found = train(vit, pets, run, f"--method={method}", *STEPS, say=said.append)
    assert "The checkpoint has no weights for classifier; they start at random and are trained." in said
    starts = [line for line in said if line.startswith("Start, on the first batch: loss ")]
    assert len(starts) == (method in COUPLED_METHODS)
    assert found["metrics"].keys() == {"accuracy", "loss"} and found["rows"] == {"train": 12, "validation": 7}
    assert evaluate(run) == found["metrics"]
    assert evaluate(run, "--split=test") != found["metrics"]


def test_an_adapter_is_saved_with_its_head_and_without_a_task_type(vit: Path, pets: list[str], tmp_path: Path) -> None:
    train(vit, pets, tmp_path / "run", "--method=meft1", *STEPS)
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == (None, ["classifier"])
    assert sum("classifier" in name for name in load_file(tmp_path / "run" / "adapter_model.safetensors")) == 2
    assert (tmp_path / "run" / "preprocessor_config.json").is_file()


def test_costs_of_a_step_on_images(vit: Path, pets: list[str], tmp_path: Path) -> None:
    found = train(vit, pets, tmp_path / "run", "--method=momentum", "--measure_steps=1", *STEPS)
    assert found["peak_activation_bytes"] > 0 and found["step_time_ratio"] > 0
    assert (found["costs"]["rows"], found["costs"]["tokens"]) == (4, None)


def test_training_images_differ_from_epoch_to_epoch_and_from_seed_to_seed(
    vit: Path, pets: list[str], tmp_path: Path
) -> None:
    def trained(name: str, *words: str) -> bytes:
        """Full batches of all rows without dropout: but for the images every epoch would be the same."""
        fixed = ["--method=full", "--num_train_epochs=2", "--per_device_train_batch_size=12", "--data_seed=0"]
        train(vit, pets, tmp_path / name, *fixed, *words)
        return weights(tmp_path / name)

    assert trained("again") == trained("and again")
    found = {trained(kind, f"--augment={kind}") for kind in ("all", "move", "none")}
    assert len(found) == 3


def test_the_epoch_reaches_the_images(
    vit: Path, pets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from meft_lab.tasks.pixels import ImageCollator

    told: list[tuple[int, int]] = []
    monkeypatch.setattr(ImageCollator, "set_epoch", lambda _, seed, epoch: told.append((seed, epoch)))
    train(vit, pets, tmp_path / "run", "--method=lora", "--num_train_epochs=3", "--seed=4", "--save_strategy=no")
    assert told == [(4, 0), (4, 1), (4, 2)]


WORDS = ["--num_train_epochs=2", "--per_device_train_batch_size=2", "--gradient_accumulation_steps=2",
         "--learning_rate=0.01", "--save_strategy=steps", "--save_steps=2", "--seed=3"]  # fmt: skip
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["meft.training"])


@pytest.mark.parametrize("method", ["full", "momentum"])
def test_a_killed_run_ends_with_the_same_bits(method: str, vit: Path, pets: list[str], tmp_path: Path) -> None:
    """Killed in the second epoch: what was random about the images that follow must not depend on it."""
    words = [f"--method={method}", *WORDS]
    train(vit, pets, tmp_path / "whole", *words)
    process = PROCESSES.Process(target=train_and_die, args=("in a step", vit, pets, tmp_path / "killed", *words))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert train(vit, pets, tmp_path / "killed", *words)["resumed_from"] == "checkpoint-4"
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_the_best_checkpoint_of_a_whole_model_becomes_the_result(vit: Path, pets: list[str], tmp_path: Path) -> None:
    """ViT is saved under other names than its weights have, which the Trainer of Transformers does not undo."""
    words = ["--load_best_model_at_end", "--eval_strategy=steps", "--eval_steps=1", "--save_strategy=steps",
             "--save_steps=1", "--metric_for_best_model=loss", "--max_steps=4", "--learning_rate=0.3"]  # fmt: skip
    found = train(vit, pets, tmp_path / "run", "--method=full", *words)
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    history = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert found["metrics"]["loss"] == min(history) != history[-1]
    assert evaluate(tmp_path / "run") == found["metrics"]


def test_cifar10_with_some_classes_and_rows_held_out(tmp_path: Path) -> None:
    vit = make_vit(tmp_path / "vit", side=32)
    batches = make_batches(tmp_path / "cifar10", {0: 0, 1: 0, 2: 4, 50: 5}, rows=20)
    words = ["--task=cifar10", f"--data_dir={batches}", "--validation_share=0.2", "--labels", "truck", "dog", "frog"]
    said: list[str] = []
    found = train(vit, words, tmp_path / "run", "--method=lora", *STEPS, say=said.append)
    assert said[0] == "42 of 60 train rows are of other classes than truck, dog, frog and are left out."
    assert found["rows"] == {"train": 15, "validation": 3}
    assert json.loads((tmp_path / "run" / "task.json").read_text())["labels"] == ["truck", "dog", "frog"]
    # The classes, their order and what is held out are known from the run.
    assert evaluate(tmp_path / "run") == found["metrics"]
    predicted = tmp_path / "predicted.tsv"
    evaluate(tmp_path / "run", "--split=test", f"--predictions_file={predicted}", say=said.append)
    assert said[-1] == "14 of 20 test rows are of other classes than truck, dog, frog and are left out."
    lines = predicted.read_text().splitlines()
    assert len(lines) == 1 + 6 and {line.split("\t")[1] for line in lines[1:]} <= {"truck", "dog", "frog"}


def test_rows_without_labels_can_be_predicted(vit: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets", {split: SPLITS[split] for split in ("train", "validation")})
    for number in range(3):
        save(folder / "test" / f"{number}.png", pixels(number))
    train(vit, ["--task=imagefolder", f"--data_dir={folder}"], tmp_path / "run", "--method=meft2", *STEPS)
    with pytest.raises(DataError, match="The test rows have no labels, so they cannot be scored"):
        evaluate(tmp_path / "run", "--split=test")
    predicted = tmp_path / "predicted.tsv"
    assert evaluate(tmp_path / "run", "--split=test", f"--predictions_file={predicted}") == {}
    assert len(predicted.read_text().splitlines()) == 4


def test_a_limit_takes_rows_of_every_class(vit: Path, pets: list[str], tmp_path: Path) -> None:
    found = train(vit, pets, tmp_path / "run", "--method=lora", *STEPS, "--max_train_samples=6", "--max_eval_samples=5")
    assert found["rows"] == {"train": 6, "validation": 5}
    assert evaluate(tmp_path / "run") == found["metrics"]
    # The rows of a folder come class by class: the first six are all cats.
    arguments = DataArguments(task="imagefolder", max_train_samples=6)
    data = load_images("imagefolder", pets[1].removeprefix("--data_dir="))
    chosen = [ImageClassification().encode(data, None, None, arguments, print).splits["train"] for _ in range(2)]
    assert set(chosen[0]["label"]) == {0, 1} and list(chosen[0]["row"]) == list(chosen[1]["row"])
    with pytest.raises(ConfigError, match="max_train_samples is 0; it must be at least 1"):
        train(vit, pets, tmp_path / "none", *STEPS, "--max_train_samples=0")


def test_a_model_trained_on_the_same_classes_in_another_order_keeps_it(pets: list[str], tmp_path: Path) -> None:
    vit = make_vit(tmp_path / "vit", labels=("dog", "cat"))
    train(vit, pets, tmp_path / "run", "--method=full", "--learning_rate=0", "--max_steps=1")
    assert json.loads((tmp_path / "run" / "task.json").read_text())["labels"] == ["dog", "cat"]
    assert evaluate(vit, *pets) == evaluate(tmp_path / "run")


def test_a_processor_of_another_size(pets: list[str], tmp_path: Path) -> None:
    vit = make_vit(tmp_path / "vit", size={"height": 12, "width": 12})
    with pytest.raises(ConfigError) as caught:
        train(vit, pets, tmp_path / "run", *STEPS)
    assert str(caught.value).startswith(
        f"The image processor of {vit} makes images of 12 x 12 pixels, which the model does not take: "
    )
    assert str(caught.value).endswith("Mend the size in preprocessor_config.json, or give another model.")


def test_a_model_without_an_image_processor(vit: Path, pets: list[str], tmp_path: Path) -> None:
    shutil.copytree(vit, tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"could not be loaded: .*preprocessor_config\.json"):
        train(tmp_path / "vit", pets, tmp_path / "run", *STEPS)


def test_a_damaged_image_in_the_middle_of_training(vit: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pets", SPLITS)
    broken = folder / "train" / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError) as caught:
        train(vit, ["--task=imagefolder", f"--data_dir={folder}"], tmp_path / "run", "--num_train_epochs=1")
    assert str(caught.value).startswith(f"The image {broken} cannot be read: ")


@pytest.mark.parametrize("word", ["--validation_share=0.1", "--augment=none"])
def test_options_of_images_beside_texts(word: str, tmp_path: Path) -> None:
    rte = ["--task=rte", f"--data_dir={make_rte(tmp_path / 'RTE')}"]
    with pytest.raises(ConfigError) as caught:
        train(make_model(tmp_path / "bert"), rte, tmp_path / "run", word)
    name, value = word.removeprefix("--").split("=")
    others = "" if name == "augment" else " and own rows of conversations or completions or text or preferences"
    assert str(caught.value) == (
        f"{name} is {value}; it belongs to the tasks imagefolder, cifar10, cifar100, svhn{others}. Leave --{name} out."
    )


def test_a_model_of_texts(pets: list[str], tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, ConfigError)):
        train(make_model(tmp_path / "bert"), pets, tmp_path / "run", *STEPS)
    assert torch.is_grad_enabled()
