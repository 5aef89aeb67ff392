"""Whole runs of `meft train` and `meft evaluate` on questions with choices."""

from __future__ import annotations

import json
import random
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from meft.errors import CheckpointError, ConfigError, DataError, MissingPackageError, UnsupportedModelError
from meft.training import kinds
from meft_lab.kinds.questions import MultipleChoice
from support.tiny import WORDS, evaluate, make_language_model, make_model, make_rte, sentence, train

pytest.importorskip("lm_eval")

STEPS = ["--max_steps=3", "--learning_rate=0.01", "--per_device_train_batch_size=4"]


def make_arc(folder: Path, *, train: int = 12, validation: int = 7, test: int = 0, long: int = 0) -> Path:
    """ARC-Easy in its official layout; the first `long` questions of each file have 30 words."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    for name, count in (("Train", train), ("Dev", validation), ("Test", test)):
        rows = []
        for index in range(count):
            choices = [{"text": sentence(generator, 1 + label), "label": "ABCD"[label]} for label in range(3)]
            question = {"stem": sentence(generator, 30 if index < long else 5), "choices": choices}
            row = {"id": str(index), "question": question}
            rows.append(row if name == "Test" else row | {"answerKey": generator.choice("ABC")})
        if rows:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"ARC-Easy-{name}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("models") / "opt")


@pytest.fixture(scope="module")
def arc(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--task=arc_easy", f"--data_dir={make_arc(tmp_path_factory.mktemp('data') / 'ARC-Easy')}"]


def by_hand(folder: Path, data: Path) -> tuple[float, float]:
    """acc and acc_norm, one choice at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    auto_model = AutoPeftModelForCausalLM if (folder / "adapter_config.json").is_file() else AutoModelForCausalLM
    model = auto_model.from_pretrained(folder).eval()
    right, normalised = [], []
    for line in data.read_text().splitlines():
        row = json.loads(line)
        prompt = f"Question: {row['question']['stem']}\nAnswer:"
        texts = [choice["text"] for choice in row["question"]["choices"]]
        likely = []
        for text in texts:
            before, ids = (
                tokenizer(prompt)["input_ids"],
                tokenizer(f"{prompt} {text}", return_tensors="pt")["input_ids"],
            )
            with torch.no_grad():
                scores = model(ids).logits[0].log_softmax(-1)
            likely.append(sum(float(scores[place - 1, ids[0, place]]) for place in range(len(before), ids.shape[1])))
        answer = "ABC".index(row["answerKey"])
        right.append(max(range(3), key=lambda index: likely[index]) == answer)
        normalised.append(max(range(3), key=lambda index: likely[index] / len(texts[index])) == answer)
    return sum(right) / len(right), sum(normalised) / len(normalised)


@pytest.mark.parametrize("method", ["full", "lora", "adapter", "meft1", "momentum"])
def test_evaluating_a_run_gives_its_metrics_bit_for_bit(
    method: str, model: Path, arc: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    found = train(model, arc, run, f"--method={method}", *STEPS)
    assert list(found["metrics"]) == ["acc", "acc_norm", "loss"]
    assert (found["task"], found["rows"]) == ("arc_easy", {"train": 12, "validation": 7})
    assert evaluate(run) == found["metrics"]
    if method not in ("full", "bitfit"):
        config = json.loads((run / "adapter_config.json").read_text())
        assert config["task_type"] == "CAUSAL_LM" and not config["modules_to_save"]


@pytest.mark.parametrize("method", ["full", "meft1"])
def test_scores_are_those_computed_by_hand(method: str, model: Path, tmp_path: Path) -> None:
    data = make_arc(tmp_path / "ARC-Easy", validation=40)
    run = tmp_path / "run"
    words = ["--task=arc_easy", f"--data_dir={data}", f"--method={method}", "--learning_rate=0.1", *STEPS[:1]]
    found = train(model, words, run)["metrics"]
    acc, acc_norm = by_hand(run, data / "ARC-Easy-Dev.jsonl")
    assert (found["acc"], found["acc_norm"]) == pytest.approx((acc, acc_norm), abs=1e-9)
    assert acc != acc_norm


def test_a_language_model_that_was_never_trained_here_can_be_scored(model: Path, arc: list[str]) -> None:
    metrics = evaluate(model, *arc)
    assert list(metrics) == ["acc", "acc_norm", "loss"]


def test_the_answer_is_learnt(tmp_path: Path) -> None:
    """The right answer follows from the question's last word: it is the one three further in the vocabulary."""
    generator = random.Random(1)
    rows = []
    for _ in range(64):
        asked = sentence(generator, 3)
        right = WORDS[(WORDS.index(asked.split()[-1]) + 3) % len(WORDS)]
        wrong = generator.choice([word for word in WORDS if word != right])
        choices = [{"text": wrong, "label": "A"}, {"text": right, "label": "B"}]
        rows.append({"question": {"stem": asked, "choices": choices}, "answerKey": "B"})
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--task=openbookqa", f"--data_dir={tmp_path}", "--max_steps=80", "--learning_rate=0.02"]
    model = make_language_model(tmp_path / "opt")
    found = train(model, words, tmp_path / "run", "--method=full", "--per_device_train_batch_size=32")
    assert evaluate(model, *words[:2])["acc"] < 0.75 < 0.95 < found["metrics"]["acc"]


def test_batches_are_padded_on_the_right_without_a_loss(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [{"input_ids": [0, 5, 6], "attention_mask": [1] * 3, "labels": [-100, -100, 6]},
            {"input_ids": [0, 7], "attention_mask": [1] * 2, "labels": [-100, 7]}]  # fmt: skip
    batch = MultipleChoice().collator(tokenizer)(rows)
    assert batch["input_ids"].tolist() == [[0, 5, 6], [0, 7, tokenizer.pad_token_id]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 6], [-100, 7, -100]]


@pytest.mark.parametrize("method", ["lora", "momentum"])
def test_accumulated_batches_train_like_one(method: str, arc: list[str], tmp_path: Path) -> None:
    """Answers have different lengths, and the loss is a mean over their tokens, not over batches."""
    model = make_language_model(tmp_path / "opt")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dropout": 0.0}))
    for name, words in (("one", []), ("two", ["--per_device_train_batch_size=2", "--gradient_accumulation_steps=2"])):
        train(model, arc, tmp_path / name, f"--method={method}", *STEPS, "--optim=sgd", "--max_grad_norm=0", *words)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-7)


def test_scores_choose_the_best_checkpoint(model: Path, arc: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--load_best_model_at_end", "--eval_strategy=steps", "--eval_steps=1", "--save_strategy=steps",
             "--save_steps=1", "--metric_for_best_model=acc_norm"]  # fmt: skip
    found = train(model, arc, run, "--method=lora", *STEPS, "--learning_rate=0.5", *words)
    last = json.loads((run / "checkpoint-3" / "trainer_state.json").read_text())
    history = [entry["eval_acc_norm"] for entry in last["log_history"] if "eval_acc_norm" in entry]
    assert len(history) == 3 and found["metrics"]["acc_norm"] == max(history)
    assert evaluate(run / "checkpoint-1")["acc_norm"] == history[0]


def test_scoring_during_training_does_not_change_it(
    model: Path, arc: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--method=meft1", *STEPS, "--eval_strategy=steps", "--eval_steps=1"]
    train(model, arc, tmp_path / "with", *words)
    monkeypatch.setattr(kinds.TaskKind, "scorer", lambda *_, **__: None)
    monkeypatch.delattr(MultipleChoice, "scorer")
    found = train(model, arc, tmp_path / "without", *words)
    assert found["metrics"].keys() == {"loss"}
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("with", "without"))
    assert first == second


def test_mixed_precision(model: Path, arc: list[str], tmp_path: Path) -> None:
    for words in (["--bf16"], ["--dtype=bfloat16"]):
        run = tmp_path / words[-1]
        found = train(model, arc, run, "--method=momentum", "--measure_steps=1", *STEPS, *words)
        assert evaluate(run) == found["metrics"]
        assert found["peak_activation_bytes"] > 0


def left_out(said: list[str]) -> list[str]:
    return [line for line in said if line.endswith("were left out.")]


def test_questions_longer_than_the_context_are_left_out_and_counted(model: Path, tmp_path: Path) -> None:
    data = make_arc(tmp_path / "ARC-Easy", train=6, validation=5, test=4, long=2)
    words, said, run = ["--task=arc_easy", f"--data_dir={data}"], [], tmp_path / "run"
    found = train(model, words, run, "--method=lora", *STEPS, say=said.append)
    message = "2 of {} {} questions need more than 24 tokens with an answer and were left out."
    assert left_out(said) == [message.format(6, "train"), message.format(5, "validation")]
    assert found["skipped_rows"] == {"train": 2, "validation": 2} and found["truncated_rows"] == {}
    assert found["rows"] == {"train": 4, "validation": 3}
    said.clear()
    predicted = tmp_path / "predictions.tsv"
    assert evaluate(run, "--split=test", f"--predictions_file={predicted}", say=said.append) == {}
    assert left_out(said) == [message.format(4, "test")]
    lines = [line.split("\t") for line in predicted.read_text().splitlines()]
    assert lines[:3] == [["index", "prediction"], ["0", "-1"], ["1", "-1"]]
    assert [line[0] for line in lines[3:]] == ["2", "3"] and all(line[1] in "012" for line in lines[3:])
    with pytest.raises(DataError, match=r"The test rows have no labels, so they cannot be scored. Give rows that have"):
        evaluate(run, "--split=test")


def test_the_length_of_training_does_not_limit_scoring(model: Path, arc: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    found = train(model, arc, tmp_path / "run", "--max_seq_length=10", "--method=full", *STEPS, say=said.append)
    assert found["skipped_rows"]["train"] > 0 == found["skipped_rows"]["validation"]
    skipped = found["skipped_rows"]["train"]
    message = f"{skipped} of 12 train questions need more than 10 tokens with an answer and were left out."
    assert left_out(said) == [message]
    with pytest.raises(DataError, match=r"None of the 12 train questions fits into 3 tokens with its answer. Take a"):
        train(model, arc, tmp_path / "other", "--max_seq_length=3", *STEPS)


def test_samples(model: Path, arc: list[str], tmp_path: Path) -> None:
    found = train(
        model, arc, tmp_path / "run", "--max_train_samples=5", "--max_eval_samples=2", "--method=full", *STEPS
    )
    assert found["rows"] == {"train": 5, "validation": 2}
    assert found["metrics"]["acc"] in (0, 0.5, 1)


def test_nothing_but_one_bar_is_shown(
    model: Path, arc: list[str], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    evaluate(model, *arc)
    shown = capfd.readouterr()
    assert "loglikelihood" not in shown.err and "it/s" not in shown.err
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]
    evaluate(model, *arc, "--disable_tqdm=false")
    assert "Running loglikelihood requests: 100%" in capfd.readouterr().err


class TestBadInput:
    def test_unlabelled_training_rows(self, model: Path, tmp_path: Path) -> None:
        data = make_arc(tmp_path / "ARC-Easy", test=4)
        (data / "ARC-Easy-Test.jsonl").replace(data / "ARC-Easy-Dev.jsonl")
        with pytest.raises(DataError, match=r"The validation rows have no labels, so they cannot be scored. Give rows"):
            train(model, ["--task=arc_easy", f"--data_dir={data}"], tmp_path / "run")

    def test_unknown_task(self, model: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            train(model, ["--task=arc"], tmp_path / "run")
        assert str(caught.value) == f"task is 'arc'; it must be one of {', '.join(kinds.tasks())}."
        assert {"cola", "rte", "openbookqa", "piqa", "arc_easy", "arc_challenge", "sciq"} < set(kinds.tasks())

    def test_a_model_that_reads_both_ways(self, arc: list[str], tmp_path: Path) -> None:
        message = r"bert is a bert, which reads texts in both directions and so is no language model that answers"
        with pytest.raises(UnsupportedModelError, match=message):
            train(make_model(tmp_path / "bert"), arc, tmp_path / "run")

    def test_adapter_of_another_kind(self, model: Path, arc: list[str], tmp_path: Path) -> None:
        train(model, arc, tmp_path / "run", "--method=lora", *STEPS)
        rte = make_rte(tmp_path / "RTE")
        with pytest.raises(CheckpointError, match=r"trained for CAUSAL_LM; this task takes adapters for SEQ_CLS. Give"):
            evaluate(tmp_path / "run", "--task=rte", f"--data_dir={rte}")

    def test_lm_eval_is_missing(
        self, model: Path, arc: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = util.find_spec
        monkeypatch.setattr(
            sys.modules["meft_lab.tasks.harness"], "find_spec", lambda name: None if name == "lm_eval" else found(name)
        )
        with pytest.raises(MissingPackageError, match=r'lm-eval, which is not installed. .* pip install "meft\[lab\]"'):
            train(model, arc, tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_head_trained_in_full_is_scored_as_it_was_trained(arc: list[str], tmp_path: Path) -> None:
    model = make_language_model(tmp_path / "opt")
    run = tmp_path / "run"
    found: dict[str, Any] = train(model, arc, run, "--method=lora", "--modules_to_save", "lm_head", *STEPS)
    assert evaluate(run) == found["metrics"]
