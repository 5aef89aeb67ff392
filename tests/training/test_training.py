"""Whole runs of `meft train` and `meft evaluate` on tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from meft.errors import CheckpointError, ConfigError, DataError, OutputFolderError, UnsupportedModelError
from meft.loading import models as loading
from meft.methods.registry import METHODS
from support.tiny import evaluate, make_model, make_rte, make_tokenizer, train

STEPS = ["--max_steps=3", "--learning_rate=0.01", "--per_device_train_batch_size=4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def rte(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--task=rte", f"--data_dir={make_rte(tmp_path_factory.mktemp('data') / 'RTE')}"]


def rows(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.mark.parametrize("method", METHODS)
def test_evaluating_a_run_gives_its_metrics_bit_for_bit(
    method: str, model: Path, rte: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    found = train(model, rte, run, f"--method={method}", *STEPS)
    assert found["metrics"].keys() == {"accuracy", "loss"}
    # Neither task, data nor batch size has to be named again: they stand beside the model.
    assert evaluate(run) == found["metrics"]
    assert evaluate(run, *rte, f"--results_file={tmp_path / 'again.json'}") == found["metrics"]
    assert json.loads((tmp_path / "again.json").read_text())["metrics"] == found["metrics"]


@pytest.mark.parametrize("family", ["roberta", "opt", "bart"])
@pytest.mark.parametrize("method", ["full", "lora", "meft1"])
def test_every_family(family: str, method: str, rte: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = train(make_model(tmp_path / family, family), rte, run, f"--method={method}", *STEPS)
    assert evaluate(run) == found["metrics"]


def test_a_head_that_starts_at_random_is_saved_whatever_it_is_called(rte: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    bart = make_model(tmp_path / "bart", "bart")
    train(bart, rte, tmp_path / "run", "--method=lora", *STEPS, say=said.append)
    assert "no weights for classification_head.dense, classification_head.out_proj; they start at random" in said[0]
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert sum("classification_head" in name for name in saved) == 4


def test_a_pooler_that_starts_at_random_is_saved(model: Path, rte: list[str], tmp_path: Path) -> None:
    """As in a checkpoint of a masked language model; drawn anew at loading, it would be another pooler."""
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    weights = {name: value for name, value in load_file(model / "model.safetensors").items() if "pooler" not in name}
    save_file(weights, bare / "model.safetensors", metadata={"format": "pt"})
    found = train(bare, rte, tmp_path / "run", "--method=lora", *STEPS)
    assert evaluate(tmp_path / "run") == found["metrics"]


def test_results_json(model: Path, rte: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = train(model, rte, run, "--method=lora", "--measure_steps=2", *STEPS)
    assert json.loads((run / "results.json").read_text()) == found
    assert (found["method"], found["task"], found["model"], found["steps"]) == ("lora", "rte", str(model), 3)
    # 2 layers; 4 projections of 16 to 16, and 16 to 32 and back, each of rank 8; a head of 16 to 2.
    assert found["trainable_parameters"] == 2 * (4 * 8 * 32 + 2 * 8 * 48) + 34
    assert found["total_parameters"] > found["trainable_parameters"]
    assert found["peak_activation_bytes"] == found["costs"]["peak_activation_bytes"] > 0
    assert found["step_time_ratio"] == found["costs"]["step_seconds"] / found["costs"]["reference_step_seconds"]
    assert found["step_time_ratio_to"] == "full"
    assert (found["costs"]["rows"], found["costs"]["steps"]) == (4, 2)
    assert found["versions"]["torch"] == torch.__version__
    assert {"python", "meft", "transformers", "peft"} <= found["versions"].keys()
    assert found["hardware"]["cores"] >= 1 and found["hardware"]["processor"]
    assert found["command"] == "meft train" and found["started"] <= found["finished"]
    assert (found["arguments"]["method"], found["arguments"]["max_steps"]) == ("lora", 3)
    assert found["rows"] == {"train": 20, "validation": 9} and found["resumed_from"] is None


def test_measuring_does_not_change_the_run(model: Path, rte: list[str], tmp_path: Path) -> None:
    for name, steps in (("with", 2), ("without", 0)):
        found = train(model, rte, tmp_path / name, "--method=meft1", f"--measure_steps={steps}", *STEPS)
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("with", "without"))
    assert first == second
    assert found["peak_activation_bytes"] is None and found["step_time_ratio"] is None


def test_a_reference_without_enough_memory_is_said(
    model: Path, rte: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_model(*arguments: Any) -> Any:
        if loaded:
            raise torch.OutOfMemoryError
        loaded.append(True)
        return load(*arguments)

    loaded: list[bool] = []
    load = loading.load_model
    monkeypatch.setattr(loading, "load_model", load_model)
    said: list[str] = []
    found = train(model, rte, tmp_path / "run", "--method=lora", "--measure_steps=1", *STEPS, say=said.append)
    assert "full fine-tuning does not fit into the memory of cpu: there is no time ratio." in said
    assert found["step_time_ratio"] is None and found["peak_activation_bytes"] > 0


def test_full_is_its_own_reference(model: Path, rte: list[str], tmp_path: Path) -> None:
    found = train(model, rte, tmp_path / "run", "--method=full", "--measure_steps=1", *STEPS)
    assert (found["step_time_ratio"], found["step_time_ratio_to"], found["costs"]["reference"]) == (1.0, "full", None)


def test_the_best_checkpoint_becomes_the_result(model: Path, rte: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--load_best_model_at_end", "--eval_strategy=steps", "--eval_steps=1", "--save_strategy=steps",
             "--save_steps=1", "--save_total_limit=1", "--metric_for_best_model=loss"]  # fmt: skip
    found = train(model, rte, run, "--method=lora", *STEPS, "--learning_rate=0.5", *words)
    states = [json.loads(path.read_text()) for path in run.glob("checkpoint-*/trainer_state.json")]
    best = Path(states[0]["best_model_checkpoint"])
    assert best.parent == run and best.is_dir()
    assert (best / "adapter_model.safetensors").read_bytes() == (run / "adapter_model.safetensors").read_bytes()
    history = [entry["eval_loss"] for entry in states[-1]["log_history"] if "eval_loss" in entry]
    assert found["metrics"]["loss"] == min(history)


def test_half_precision(model: Path, rte: list[str], tmp_path: Path) -> None:
    for words in (["--bf16"], ["--dtype=bfloat16"], ["--bf16", "--bf16_full_eval"]):
        run = tmp_path / words[-1]
        found = train(model, rte, run, "--method=meft1", "--measure_steps=1", *STEPS, *words)
        assert evaluate(run) == found["metrics"]


def test_activation_checkpointing(model: Path, rte: list[str], tmp_path: Path) -> None:
    plain = train(model, rte, tmp_path / "plain", "--method=full", "--measure_steps=1", *STEPS)
    # Transformers 5.23 renames the argument.
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    words = [f"--{name}_checkpointing", f'--{name}_checkpointing_kwargs={{"use_reentrant": false}}']
    less = train(model, rte, tmp_path / "less", "--method=full", "--measure_steps=1", *STEPS, *words)
    assert less["peak_activation_bytes"] < plain["peak_activation_bytes"]
    assert less["metrics"]["loss"] == pytest.approx(plain["metrics"]["loss"], rel=1e-5)


def test_own_files(model: Path, tmp_path: Path) -> None:
    labelled = [{"first": "a cat sat", "second": "the dog ran", "kind": kind} for kind in ("x", "z", "y") * 4]
    train_file, dev_file = rows(tmp_path / "train.jsonl", labelled), rows(tmp_path / "dev.jsonl", labelled[:2])
    data = [f"--train_file={train_file}", f"--validation_file={dev_file}", "--text_column", "first", "second",
            "--label_column=kind"]  # fmt: skip
    run = tmp_path / "run"
    found = train(model, data, run, "--method=meft1", *STEPS)
    assert found["metrics"].keys() == {"accuracy", "f1_macro", "loss"}
    assert json.loads((run / "task.json").read_text())["labels"] == ["x", "y", "z"]
    # The labels are those of the training, though the rows evaluated have two of them only.
    assert evaluate(run) == found["metrics"]
    unlabelled = rows(tmp_path / "test.jsonl", [{"first": "a", "second": "b"}] * 3)
    predicted = tmp_path / "predictions.tsv"
    assert evaluate(run, f"--test_file={unlabelled}", "--split=test", f"--predictions_file={predicted}") == {}
    lines = predicted.read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == ["0", "1", "2"]
    assert all(line.split("\t")[1] in "xyz" for line in lines[1:])
    with pytest.raises(DataError, match=r"The test rows have no labels, so they cannot be scored. Give rows that have"):
        evaluate(run, f"--test_file={unlabelled}", "--split=test")
    other = rows(tmp_path / "other.jsonl", [labelled[0] | {"kind": "w"}])
    with pytest.raises(DataError, match=r"Line 1 of .*other.jsonl has the label 'w'; the labels are x, y, z."):
        evaluate(run, f"--validation_file={other}")


def test_regression(model: Path, tmp_path: Path) -> None:
    numbers = [{"text": "a cat sat " + "on " * length, "label": length / 2} for length in range(8)]
    path = rows(tmp_path / "rows.jsonl", numbers)
    data = [f"--train_file={path}", f"--validation_file={path}", "--regression"]
    found = train(model, data, tmp_path / "run", "--method=lora", *STEPS)
    assert found["metrics"].keys() == {"pearson", "spearman", "loss"}
    assert evaluate(tmp_path / "run") == found["metrics"]


def test_undefined_metrics_are_null(model: Path, tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", [{"text": "a cat", "label": 1.5}] * 4)
    data = [f"--train_file={path}", f"--validation_file={path}", "--regression"]
    found = train(model, data, tmp_path / "run", "--method=lora", *STEPS)
    assert found["metrics"]["pearson"] is None
    assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["pearson"] is None


def test_mnli_has_two_validation_sets(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "MNLI"
    folder.mkdir()
    for name, labels in (("train", "nce"), ("dev_matched", "nc"), ("dev_mismatched", "ee")):
        names = {"n": "neutral", "c": "contradiction", "e": "entailment"}
        lines = ["sentence1\tsentence2\tgold_label", *(f"a cat\ta dog\t{names[label]}" for label in labels * 2)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    found = train(model, ["--task=mnli", f"--data_dir={folder}"], tmp_path / "run", "--method=full", *STEPS)
    assert set(found["metrics"]) == {
        f"{kind}_{name}" for kind in ("matched", "mismatched") for name in ("accuracy", "loss")
    }
    assert list(found["metrics"])[-1].endswith("loss")
    assert evaluate(tmp_path / "run") == found["metrics"]


def test_a_trained_model_keeps_the_order_of_its_labels(model: Path, rte: list[str], tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    train(model, rte, trained, "--method=full", *STEPS)
    config = json.loads((trained / "config.json").read_text())
    config["id2label"] = {"0": "NOT_ENTAILMENT", "1": "ENTAILMENT"}
    config["label2id"] = {name: int(index) for index, name in config["id2label"].items()}
    (trained / "config.json").write_text(json.dumps(config))
    before = evaluate(trained)["accuracy"]
    (trained / "task.json").unlink()
    assert evaluate(trained, *rte)["accuracy"] == pytest.approx(1 - before)


def test_long_rows_are_cut_and_counted(model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    texts = [{"text": "a " * length, "label": length % 2} for length in (5, 40, 50, 6)]
    path = rows(tmp_path / "rows.jsonl", texts)
    data = [f"--train_file={path}", f"--validation_file={path}"]
    found = train(model, data, tmp_path / "run", "--max_eval_samples=2", *STEPS, say=said.append)
    assert "2 of 4 train rows are longer than 24 tokens and were cut." in said
    assert "1 of 2 validation rows are longer than 24 tokens and were cut." in said
    assert found["truncated_rows"] == {"train": 2, "validation": 1}
    with pytest.raises(ConfigError, match=r"max_seq_length is 25; this model takes at most 24 tokens."):
        train(model, data, tmp_path / "other", "--max_seq_length=25")


def test_positions_of_roberta_begin_after_its_padding(rte: list[str], tmp_path: Path) -> None:
    roberta = make_model(tmp_path / "roberta", "roberta")
    config = json.loads((roberta / "tokenizer_config.json").read_text())
    (roberta / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 10**30}))
    with pytest.raises(ConfigError, match=r"max_seq_length is 25; this model takes at most 24 tokens."):
        train(roberta, rte, tmp_path / "run", "--max_seq_length=25")
    train(roberta, rte, tmp_path / "run", *STEPS)


def test_a_tokenizer_without_padding(rte: list[str], tmp_path: Path) -> None:
    found = train(make_model(tmp_path / "opt", "opt", pad=False), rte, tmp_path / "run", "--method=lora", *STEPS)
    assert evaluate(tmp_path / "run") == found["metrics"]


class TestBadInput:
    """Each a typed error, and no output folder left behind."""

    @pytest.fixture(autouse=True)
    def nothing_is_written(self, tmp_path: Path) -> Any:
        yield
        assert not (tmp_path / "run").exists()

    def test_column(self, model: Path, tmp_path: Path) -> None:
        path = rows(tmp_path / "rows.jsonl", [{"sentence": "a", "label": 0}])
        with pytest.raises(DataError, match=r"has no column 'text'; its columns are sentence, label"):
            train(model, [f"--train_file={path}", f"--validation_file={path}"], tmp_path / "run")

    def test_label(self, model: Path, tmp_path: Path) -> None:
        path = rows(tmp_path / "rows.jsonl", [{"text": "a", "label": 0}, {"text": "a", "label": 2}])
        data = [f"--train_file={path}", f"--validation_file={path}", "--num_labels=2"]
        with pytest.raises(DataError, match=r"has the label '2'; the labels are 0, 1"):
            train(model, data, tmp_path / "run")

    def test_method(self, model: Path, rte: list[str], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"method is 'meft9'; it must be one of full, lora"):
            train(model, rte, tmp_path / "run", "--method=meft9")
        with pytest.raises(ConfigError, match=r"frozen_layers"):
            train(model, rte, tmp_path / "run", "--method=meft1", "--frozen_layers=7")

    def test_negative_measuring(self, model: Path, rte: list[str], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"measure_steps is -1; it must be 0"):
            train(model, rte, tmp_path / "run", "--measure_steps=-1")

    def test_missing_model(self, rte: list[str], tmp_path: Path) -> None:
        with pytest.raises(
            CheckpointError, match=r"none, where the model should be, does not exist. Give a model's folder"
        ):
            train(tmp_path / "none", rte, tmp_path / "run")

    def test_empty_model_folder(self, rte: list[str], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises((CheckpointError, UnsupportedModelError), match=r"empty"):
            train(tmp_path / "empty", rte, tmp_path / "run")

    def test_damaged_configuration(self, model: Path, rte: list[str], tmp_path: Path) -> None:
        damaged = shutil.copytree(model, tmp_path / "damaged")
        (damaged / "config.json").write_text("{")
        with pytest.raises(
            CheckpointError, match=r"damaged could not be loaded: .*config.json.* is not a valid JSON file"
        ):
            train(damaged, rte, tmp_path / "run")

    def test_truncated_model(self, model: Path, rte: list[str], tmp_path: Path) -> None:
        damaged = shutil.copytree(model, tmp_path / "damaged")
        whole = (damaged / "model.safetensors").read_bytes()
        (damaged / "model.safetensors").write_bytes(whole[:-100])
        message = rf"model.safetensors is truncated: {len(whole) - 100} bytes, its header promises {len(whole)}"
        with pytest.raises(CheckpointError, match=message):
            train(damaged, rte, tmp_path / "run")

    def test_a_model_that_does_not_classify(self, model: Path, rte: list[str], tmp_path: Path) -> None:
        other = shutil.copytree(model, tmp_path / "other")
        (other / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
        with pytest.raises(
            UnsupportedModelError, match=r"other is no model for sequence classification that Transformers"
        ):
            train(other, rte, tmp_path / "run")

    def test_a_head_of_another_size(self, rte: list[str], tmp_path: Path) -> None:
        trained = make_model(tmp_path / "trained", head=True)
        path = rows(tmp_path / "rows.jsonl", [{"text": "a", "label": label} for label in range(3)])
        data = [f"--train_file={path}", f"--validation_file={path}"]
        with pytest.raises(
            CheckpointError, match=r"do not have the sizes of the model.*give --ignore_mismatched_sizes"
        ):
            train(trained, data, tmp_path / "run")
        train(trained, data, tmp_path / "allowed", "--ignore_mismatched_sizes", "--max_steps=1")

    def test_tokenizer_of_another_model(self, model: Path, rte: list[str], tmp_path: Path) -> None:
        other = tmp_path / "other"
        tokenizer = make_tokenizer(other)
        tokenizer.add_tokens(["more"])
        tokenizer.save_pretrained(other)
        with pytest.raises(
            ConfigError, match=r"The tokenizer knows 25 tokens and .*bert only 24, so they do not belong"
        ):
            train(model, rte, tmp_path / "run", f"--tokenizer_name={other}")

    def test_adapter_in_place_of_a_model(self, model: Path, rte: list[str], tmp_path: Path) -> None:
        train(model, rte, tmp_path / "adapter", "--method=lora", *STEPS)
        with pytest.raises(
            ConfigError, match=r"adapter is an adapter, not a model. Give the base model to train a new"
        ):
            train(tmp_path / "adapter", rte, tmp_path / "run")


@pytest.fixture(scope="module", params=["lora", "meft1"])
def adapter(
    request: pytest.FixtureRequest, model: Path, rte: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("adapter") / request.param
    train(model, rte, run, f"--method={request.param}", *STEPS)
    return run


class TestAdapters:
    @pytest.fixture
    def copied(self, adapter: Path, tmp_path: Path) -> Path:
        return shutil.copytree(adapter, tmp_path / "copied")

    def test_truncated(self, copied: Path) -> None:
        path = copied / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is truncated"):
            evaluate(copied)

    def test_weights_are_missing(self, copied: Path) -> None:
        path = copied / "adapter_model.safetensors"
        weights = load_file(path)
        weights.pop(next(name for name in weights if "layer.1" in name))
        save_file(weights, path)
        with pytest.raises(CheckpointError, match=r"The adapter in .*copied does not fit the base model"):
            evaluate(copied)

    def test_another_base_model(self, copied: Path, tmp_path: Path) -> None:
        other = make_model(tmp_path / "roberta", "roberta")
        with pytest.raises(CheckpointError, match=r"adapter in .*copied .*base model"):
            evaluate(copied, f"--base_model_name_or_path={other}")

    def test_base_model_moved(self, copied: Path, model: Path, tmp_path: Path) -> None:
        config = json.loads((copied / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(tmp_path / "gone")
        (copied / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"gone, where the model should be, does not exist"):
            evaluate(copied)
        assert evaluate(copied, f"--base_model_name_or_path={model}")["accuracy"] is not None

    def test_another_task_type(self, copied: Path) -> None:
        config = json.loads((copied / "adapter_config.json").read_text())
        (copied / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
        with pytest.raises(CheckpointError, match=r"was trained for CAUSAL_LM; this task takes adapters for SEQ_CLS"):
            evaluate(copied)

    def test_a_checkpoint_can_be_evaluated(self, model: Path, rte: list[str], tmp_path: Path) -> None:
        run = tmp_path / "run"
        found = train(model, rte, run, "--method=lora", *STEPS, "--save_strategy=steps", "--save_steps=3")
        assert evaluate(run / "checkpoint-3") == found["metrics"]


def test_a_model_that_was_never_trained_is_not_evaluated(model: Path, rte: list[str]) -> None:
    with pytest.raises(
        CheckpointError, match=r"bert has no weights for classifier, so its predictions would be random."
    ):
        evaluate(model, *rte)


class TestOutputFolder:
    def test_a_finished_run_is_kept(self, model: Path, rte: list[str], tmp_path: Path) -> None:
        run = tmp_path / "run"
        train(model, rte, run, "--method=lora", *STEPS)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises(OutputFolderError, match=r"holds a finished run"):
            train(model, rte, run, "--method=lora", *STEPS)
        with pytest.raises(OutputFolderError, match=r"holds a finished run"):
            train(model, rte, run, "--method=full", *STEPS)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        train(model, rte, run, "--method=full", "--overwrite_run", *STEPS)
        aside = next(tmp_path.glob("run.replaced-*"))
        assert {path.read_bytes() for path in aside.rglob("*") if path.is_file()} == set(before.values())

    def test_default(self, model: Path, rte: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from meft.training import TRAIN_TYPES
        from meft.training import train as run_training
        from meft.training.arguments import parse

        monkeypatch.chdir(tmp_path)
        words = [f"--model_name_or_path={model}", *rte, "--method=lora", "--use_cpu=true", "--disable_tqdm=true"]
        arguments = parse(TRAIN_TYPES, [*words, "--max_steps=1", "--measure_steps=0"], command="train")
        run_training(*arguments, say=lambda _: None)
        assert [path.name for path in tmp_path.iterdir()] == ["runs"]
        assert (tmp_path / "runs" / "rte-lora" / "results.json").is_file()
