"""`meft train` on own chats, completions, preferences and texts: what is learnt, what is saved, what is refused."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from meft.errors import ConfigError, DataError, MissingPackageError, UnsupportedModelError
from meft.methods.table import METHODS
from meft.training.checkpoints import newest_complete
from meft.training.data.chats import form_of, rows_of
from meft.training.data.sources import Source, read_split, renamed
from meft.training.data.tokens import encode_rows
from meft.training.kinds.language import held_out
from support.chats import chats, completions, make_chat_model, preferences, texts, write_lines
from support.tiny import evaluate, make_model, train

FORMS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "conversations": chats,
    "completions": completions,
    "preferences": preferences,
    "text": texts,
}
WORDS = ["--num_train_epochs=3", "--per_device_train_batch_size=4", "--learning_rate=0.02", "--seed=3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("chats") / "model")


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for form, rows in FORMS.items():
        file = write_lines(folder / f"{form}.jsonl", rows())
        run = folder / form
        found[form] = run, train(model, [f"--train_file={file}"], run, "--measure_steps=1", *WORDS)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_by_lora_on_momentum(form: str, runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    _, found = runs[form]
    assert (found["method"], found["task"]) == ("lora+momentum", form)
    assert found["learnt"] and found["deployed_metrics"]["loss"] < found["metrics_before"]["loss"] - 0.01
    assert found["rows"] == {"train": 18, "validation": 2}
    assert found["costs"]["reference"] == "lora"
    assert 0 < found["peak_activation_bytes"] < found["costs"]["reference_peak_activation_bytes"]
    assert found["start"]["kl"] < 0.01


@pytest.mark.parametrize("form", ["conversations", "completions", "text"])
def test_perplexity_is_that_of_the_saved_adapter_in_plain_peft(
    form: str, model: Path, runs: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    run, found = runs[form]
    plain = AutoPeftModelForCausalLM.from_pretrained(run).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)
    rows = rows_of(read_split(str(run.parent / f"{form}.jsonl"), "train"), form)
    held = rows.select(held_out(len(rows), None)[1])
    coded, _, _ = encode_rows(held, form, tokenizer, 64, answers_only=form != "text")
    total, count = 0.0, 0
    for row in coded:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            scores = plain(input_ids=ids).logits[0, :-1].log_softmax(-1)
        learnt = labels != -100
        total -= float(scores[learnt].gather(1, labels[learnt][:, None]).sum())
        count += int(learnt.sum())
    assert found["deployed_metrics"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_the_saved_adapter_and_card_are_ordinary(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    run, found = runs["conversations"]
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["auto_mapping"] is None
    assert not any("ref" in name for name in load_file(run / "adapter_model.safetensors"))
    card = (run / "README.md").read_text()
    for said in (
        config["base_model_name_or_path"],
        "lora+momentum",
        "18 train, 2 validation",
        "| columns | messages |",
        "before training",
        "| learning_rate | 0.02 |",
        "memory of a step (activations)",
        "transformers 5.",
        found["verdict"],
    ):
        assert said in card
    assert "gAAAA" not in card and not list(run.glob("*.bin"))


def test_preferences_leave_one_adapter(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    run, found = runs["preferences"]
    assert found["metrics_before"] == {"preferred": 0.0, "margin": 0.0, "loss": pytest.approx(math.log(2))}
    assert found["metrics"]["preferred"] == 1.0
    assert not (run / "ref").exists()
    AutoPeftModelForCausalLM.from_pretrained(run)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_losses_are_those_of_trl_on_the_plain_model(model: Path, tmp_path: Path) -> None:
    """`full` and the same rows in TRL's own trainer, from its own tokens."""
    rows = completions(12)
    file = write_lines(tmp_path / "rows.jsonl", rows)
    words = ["--method=full", "--validation_share=0", "--max_steps=3", "--learning_rate=0.01", "--warmup_steps=0"]
    train(model, [f"--train_file={file}"], tmp_path / "run", *words, "--logging_steps=1", "--save_strategy=steps")
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    theirs = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=Dataset.from_list(rows),
        args=SFTConfig(
            output_dir=str(tmp_path / "theirs"),
            max_steps=3,
            learning_rate=0.01,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            dataloader_pin_memory=False,
        ),
    )
    theirs.train()
    ours = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert ours == pytest.approx([entry["loss"] for entry in theirs.state.log_history if "loss" in entry], rel=1e-5)


def test_packing_changes_no_loss(model: Path, tmp_path: Path) -> None:
    """All rows in one step: packed or padded, the mean over tokens is the same."""
    file = write_lines(tmp_path / "rows.jsonl", texts(8))
    words = ["--validation_share=0", "--max_steps=1", "--per_device_train_batch_size=8", "--save_strategy=steps"]
    losses = []
    for name, more in (("padded", []), ("packed", ["--packing", "--max_seq_length=32"])):
        train(model, [f"--train_file={file}"], tmp_path / name, *words, *more)
        state = json.loads((tmp_path / name / "checkpoint-1" / "trainer_state.json").read_text())
        losses.append(next(entry["loss"] for entry in state["log_history"] if "loss" in entry))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# Places and columns ---------------------------------------------------------------------------------------------------


def write_as(kind: str, rows: list[dict[str, Any]], folder: Path) -> str:
    folder.mkdir()
    if kind == "jsonl":
        return str(write_lines(folder / "rows.jsonl", rows))
    if kind == "json":
        (folder / "rows.json").write_text(json.dumps(rows, indent=1))
        return str(folder / "rows.json")
    if kind == "csv":
        with (folder / "rows.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({name: v if isinstance(v, str) else json.dumps(v) for name, v in row.items()})
        return str(folder / "rows.csv")
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
        return str(folder / "rows.parquet")
    if kind == "folder":
        write_lines(folder / "data" / "train-00000-of-00002.jsonl", rows[:5])
        write_lines(folder / "data" / "train-00001-of-00002.jsonl", rows[5:])
        return str(folder)
    assert kind == "saved"
    Dataset.from_list(rows).save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder", "saved"])
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_the_same_from_everywhere(form: str, kind: str, tmp_path: Path) -> None:
    rows = FORMS[form]()
    source = read_split(write_as(kind, rows, tmp_path / "rows"), "train")
    assert form_of(source.columns) == form
    assert rows_of(source, form)["row"] == rows_of(Source("memory", list(enumerate(rows, 1))), form)["row"]


def test_a_folder_of_splits_brings_its_validation(model: Path, tmp_path: Path) -> None:
    parts = {"train": Dataset.from_list(chats(8)), "test": Dataset.from_list(chats(3))}
    DatasetDict(parts).save_to_disk(tmp_path / "rows")
    found = train(model, [f"--train_file={tmp_path / 'rows'}"], tmp_path / "run", "--max_steps=1")
    assert found["rows"] == {"train": 8, "validation": 3}


def test_share_gpt_and_json_in_texts_are_read() -> None:
    messages = [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "a red cat"}]
    plain = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a red cat"}]
    for row in (
        {"conversations": messages},
        {"messages": plain},
        {"messages": json.dumps(plain)},
        {"conversations": plain},
        {
            "messages": [
                {**plain[0], "tool_calls": None},
                {**plain[1], "content": [{"type": "text", "text": "a red cat"}]},
            ]
        },
    ):
        found = rows_of(Source("rows", [(1, row)]), "conversations")["row"][0]
        assert json.loads(found) == {"messages": plain}


def test_columns_are_renamed() -> None:
    source = Source("rows", [(1, {"question": "a", "answer": "b", "prompt": "old"})])
    named = renamed(source, ["prompt=question", "completion=answer"])
    assert named.rows == [(1, {"prompt": "a", "completion": "b"})]
    with pytest.raises(DataError, match="has no column 'reply'; its columns are question, answer, prompt"):
        renamed(source, ["completion=reply"])
    with pytest.raises(ConfigError, match="columns is 'prompt'; give pairs of names such as prompt=question"):
        renamed(source, ["prompt"])


def test_the_answers_alone_are_learnt(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = rows_of(Source("rows", list(enumerate(chats(4), 1))), "conversations")
    coded, _, _ = encode_rows(rows, "conversations", tokenizer, 64, answers_only=True)
    for row, ids, labels in zip(chats(4), coded["input_ids"], coded["labels"], strict=True):
        learnt = tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label != -100])
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert learnt == " ".join(f"{answer} <|end|>" for answer in answers)
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(row["messages"], tokenize=False).strip()


def test_a_template_that_rewrites_answers_is_refused_or_learnt_whole(model: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + (m['content'] if loop.last else 'not') + ' ' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
    )
    rows = rows_of(Source("rows", list(enumerate(chats(4), 1))), "conversations")
    with pytest.raises(ConfigError, match="--no_completion_only_loss to learn whole conversations"):
        encode_rows(rows, "conversations", tokenizer, 64, answers_only=True)
    whole, _, _ = encode_rows(rows, "conversations", tokenizer, 64, answers_only=False)
    assert whole["labels"] == whole["input_ids"]


def test_rows_that_are_cut_are_counted(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = rows_of(Source("rows", list(enumerate(completions(6), 1))), "completions")
    coded, cut, empty = encode_rows(rows, "completions", tokenizer, 4, answers_only=True)
    assert (cut, empty) == (6, 0) and {len(ids) for ids in coded["input_ids"]} == {4}
    coded, cut, empty = encode_rows(rows, "completions", tokenizer, 3, answers_only=True)
    assert (len(coded), cut, empty) == (0, 0, 6)


@pytest.mark.parametrize(
    ("rows", "share", "held"), [(200, None, 20), (9, None, 0), (5000, None, 200), (9, 0.5, 4), (9, 0, 0), (2, 0.9, 1)]
)
def test_rows_are_held_out(rows: int, share: float | None, held: int) -> None:
    kept, out = held_out(rows, share)
    assert len(out) == held and sorted(kept + out) == list(range(rows))


# What is refused ------------------------------------------------------------------------------------------------------

REFUSED = [
    (
        {"messages": "hello"},
        "conversations",
        "Line 7 of rows has 'hello' in column 'messages', where a list",
    ),
    ({"messages": [{"role": "user", "content": "a"}]}, "conversations", "has no message of the assistant"),
    (
        {"messages": [{"role": "boss", "content": "a"}]},
        "conversations",
        "Message 1 of line 7 of rows has the role",
    ),
    ({"messages": [{"role": "user", "content": 3}]}, "conversations", "has 3 as content, where a text is expected"),
    ({"messages": ["a"]}, "conversations", "Message 1 of line 7 of rows is 'a'; it must have a role and a content"),
    ({"messages": []}, "conversations", "where a list of messages is expected"),
    ({"prompt": "a", "completion": ""}, "completions", "Line 7 of rows has '' in column 'completion'"),
    ({"prompt": None, "completion": "b"}, "completions", "Line 7 of rows has nothing in column 'prompt'"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "preferences", "prefers nothing"),
    ({"chosen": "b", "rejected": "c"}, "preferences", "has no prompt, and chosen and rejected begin differently"),
    ({"text": 4}, "text", "Line 7 of rows has 4 in column 'text', where a text is expected"),
    ({"other": 4}, "text", "rows has no column 'text', which text need; its columns are other"),
]


@pytest.mark.parametrize(("row", "form", "message"), REFUSED)
def test_rows_that_are_wrong_name_their_line(row: dict[str, Any], form: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        rows_of(Source("rows", [(7, row)]), form)
    assert message in str(error.value)


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    bare = make_chat_model(tmp_path / "bare", template=None)
    file = write_lines(tmp_path / "chats.jsonl", chats())
    with pytest.raises(ConfigError, match=r"has no chat template.*--chat_template FILE\.jinja"):
        train(bare, [f"--train_file={file}"], tmp_path / "run")
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <|end|> ' }}{% endfor %}"
    )
    words = [f"--chat_template={template}", "--no_completion_only_loss", "--max_steps=1"]
    train(bare, [f"--train_file={file}"], tmp_path / "run", *words)
    assert (tmp_path / "run" / "chat_template.jinja").read_text() == template.read_text()


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([{"question": "a", "answer": "b"}], [], "it is not known what to learn.*--columns prompt=NAME"),
        (completions(), ["--dpo_beta=0.2"], "dpo_beta is 0.2; it belongs to own rows of preferences"),
        (
            preferences(),
            ["--packing"],
            "packing is True; it belongs to own rows of conversations or completions",
        ),
        (texts(), ["--validation_share=1.5"], "validation_share is 1.5; it must be at least 0 and below 1"),
        (texts(), ["--validation_share=0", "--eval_strategy=epoch"], "there are no rows to evaluate on"),
        (texts(), ["--max_seq_length=65"], "max_seq_length is 65; this model takes at most 64"),
        ([{**row, "label": 1} for row in completions()], [], "prompt, completion and label"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    rows: list[dict[str, Any]], words: list[str], message: str, model: Path, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises((ConfigError, DataError), match=message):
        train(model, [f"--train_file={file}"], tmp_path / "run", *words)
    assert not (tmp_path / "run" / "results.json").exists()


def test_other_separators_are_recognised(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt;completion\nthe cat;a red cat\n")
    with pytest.raises(DataError, match="one column, 'prompt;completion', which seems to be several separated by ';'"):
        train(model, [f"--train_file={file}"], tmp_path / "run")


def test_a_name_that_is_nowhere_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="nobody/nothing is no file or folder here, and could not be read from the hub"):
        train(model, ["--train_file=nobody/nothing"], tmp_path / "run")
    with pytest.raises(DataError, match=r"missing\.jsonl, the train file, does not exist"):
        train(model, ["--train_file=missing.jsonl"], tmp_path / "run")


def test_encoders_write_no_texts(tmp_path: Path) -> None:
    encoder = make_model(tmp_path / "bert")
    file = write_lines(tmp_path / "rows.jsonl", completions())
    with pytest.raises(UnsupportedModelError, match="reads texts in both directions"):
        train(encoder, [f"--train_file={file}"], tmp_path / "run")


# Kinds ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--text_column=prompt", "--label_column=completion"]])
def test_completions_are_no_classes(words: list[str], model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", completions())
    found = train(model, [f"--train_file={file}"], tmp_path / "run", "--max_steps=1", *words)
    assert found["task"] == "completions"


@pytest.mark.parametrize("words", [[], ["--form=classes"]])
def test_texts_with_labels_are_classified_as_before(words: list[str], model: Path, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": row["text"].split()[-1]} for row in texts()]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    data = [f"--train_file={file}", f"--validation_file={file}", *words]
    found = train(model, data, tmp_path / "run", "--max_steps=1")
    assert (found["task"], found["method"]) == ("files", "meft1") and "accuracy" in found["metrics"]


# Resuming and evaluating ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["conversations", "preferences", "packed"])
def test_a_resumed_run_is_bit_equal(form: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = preferences() if form == "preferences" else chats()
    data = [f"--train_file={write_lines(tmp_path / 'rows.jsonl', rows)}"]
    words = [*WORDS, "--save_strategy=steps", "--save_steps=2", "--lora_dropout=0.1"]
    words += ["--packing", "--max_seq_length=32"] if form == "packed" else []
    whole = train(model, data, tmp_path / "whole", *words)

    from meft.training.checkpoints import CheckpointingTrainer

    step = CheckpointingTrainer.training_step

    def stopped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointingTrainer, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(model, data, tmp_path / "run", *words)
    newest, _ = newest_complete(tmp_path / "run")
    assert newest is not None and newest.name == "checkpoint-4"
    found = train(model, data, tmp_path / "run", *words)
    names = ("metrics", "deployed_metrics", "metrics_before", "start", "steps", "learnt")
    assert found["resumed_from"] == "checkpoint-4" and [found[n] for n in names] == [whole[n] for n in names]
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("run", "whole")]
    assert files[0] == files[1]


@pytest.mark.parametrize("form", FORMS)
def test_evaluate_gives_what_the_run_gave(form: str, runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    run, found = runs[form]
    assert evaluate(run) == found["deployed_metrics"]
    assert evaluate(run, "--method=lora+momentum") == found["metrics"]


def test_evaluate_takes_another_file(runs: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path) -> None:
    run, _ = runs["completions"]
    file = write_lines(tmp_path / "more.jsonl", completions(30)[20:])
    found = evaluate(run, f"--validation_file={file}")
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"] or 0)) and "token_accuracy" in found


# Defaults and precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--bf16"], ["--dtype=bfloat16"], ["--bf16", "--packing", "--max_seq_length=32"]])
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_works_on_a_processor(form: str, words: list[str], model: Path, tmp_path: Path) -> None:
    if form == "preferences" and "--packing" in words:
        words = ["--bf16", "--method=lora"]
    file = write_lines(tmp_path / "rows.jsonl", FORMS[form]())
    found = whole_train(model, [f"--train_file={file}", f"--output_dir={tmp_path / 'run'}", "--max_steps=2", *words])
    assert math.isfinite(found["metrics"]["loss"]) and math.isfinite(found["deployed_metrics"]["loss"]
                                                                     if found["deployed_metrics"] else 0)  # fmt: skip


def test_bfloat16_works_for_classes_too(tmp_path: Path) -> None:
    encoder = make_model(tmp_path / "bert")
    rows = [{"text": row["text"], "label": row["text"].split()[-1]} for row in texts()]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    words = [f"--train_file={file}", f"--validation_file={file}", f"--output_dir={tmp_path / 'run'}", "--max_steps=2"]
    assert math.isfinite(whole_train(encoder, [*words, "--bf16"])["metrics"]["loss"])


def whole_train(model: Path, words: list[str]) -> dict[str, Any]:
    """As `support.tiny.train`, without --use_cpu."""
    from meft.training import TRAIN_TYPES
    from meft.training import train as run
    from meft.training.arguments import parse

    fixed = [f"--model_name_or_path={model}", "--measure_steps=1", "--disable_tqdm=true", "--save_strategy=no"]
    return run(*parse(TRAIN_TYPES, [*fixed, *words], command="train"), command="meft train")


def test_the_learning_rate_suits_the_method_unless_it_is_given(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", texts())
    said: list[str] = []
    for name, words in (("out", []), ("given", ["--learning_rate=3e-4"]), ("lora", ["--method=meft1"])):
        train(model, [f"--train_file={file}"], tmp_path / name, "--max_steps=1", *words, say=said.append)
    arguments = [json.loads((tmp_path / n / "results.json").read_text())["arguments"] for n in ("out", "given", "lora")]
    rates = [METHODS[name].suited("CAUSAL_LM")[0] for name in ("lora", "meft1")]
    assert [a["learning_rate"] for a in arguments] == [rates[0], 3e-4, rates[1]]
    assert [a["warmup_steps"] for a in arguments] == [0.1, 0, 0.1]
    told = [line for line in said if line.startswith("Learning rate ")]
    assert len(told) == 2 and told[0].startswith(f"Learning rate {rates[0]:g}, reached over the first 10% of the steps")


def test_an_unfinished_run_keeps_the_rate_it_began_with(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_lines(tmp_path / "rows.jsonl", texts())
    with monkeypatch.context() as patched:
        patched.setattr("meft.training._save_final", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(model, [f"--train_file={file}"], tmp_path / "run", "--max_steps=2", "--save_strategy=steps")
    monkeypatch.setattr("meft.methods.table.Method.suited", lambda *_: (0.5, 0.2))
    train(model, [f"--train_file={file}"], tmp_path / "run", "--max_steps=2", "--save_strategy=steps")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["arguments"]["learning_rate"] == METHODS["lora"].rates["CAUSAL_LM"]


def test_the_loss_is_printed_some_twenty_times(model: Path, tmp_path: Path) -> None:
    file, said = write_lines(tmp_path / "rows.jsonl", texts()), []
    words = ["--max_steps=45", "--learning_rate=0.01"]
    train(model, [f"--train_file={file}"], tmp_path / "run", *words, say=said.append)
    lines = [line for line in said if line.startswith("Step ")]
    assert len(lines) == 22 and lines[1].startswith("Step 4 of 45: loss ")
    assert "memory of a step" in lines[1] and "KiB" in lines[1] and "{" not in "".join(lines)


def test_a_run_that_has_not_learnt_says_so(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", texts())
    found = train(model, [f"--train_file={file}"], tmp_path / "run", "--max_steps=1", "--learning_rate=1e-6")
    assert found["learnt"] is False
    assert found["verdict"].startswith("Nothing was learnt: the validation loss was ")
    assert "a larger --learning_rate (3e-06 instead of 1e-06), --max_steps 2, or more rows." in found["verdict"]
    rows = [{"text": row["text"], "label": str(index % 2)} for index, row in enumerate(texts(19))]
    labelled = write_lines(tmp_path / "labelled.jsonl", rows)
    data = [f"--train_file={labelled}", f"--validation_file={labelled}"]
    found = train(model, data, tmp_path / "classes", "--max_steps=1", "--learning_rate=1e-6", "--method=lora")
    assert found["learnt"] is False
    assert "and the most frequent label, 0, alone gives 0.526. Give a larger --learning_rate" in found["verdict"]


# What is missing ------------------------------------------------------------------------------------------------------


def test_trl_is_named_where_it_is_missing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meft.training.kinds.language.find_spec", lambda name: None)
    file = write_lines(tmp_path / "rows.jsonl", texts())
    with pytest.raises(MissingPackageError, match=r'need trl, which is not installed.*pip install "meft\[train\]"'):
        train(model, [f"--train_file={file}"], tmp_path / "run")


def test_a_name_on_the_hub_is_read_with_its_splits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(name: str, *, cache_dir: str | None) -> DatasetDict:
        asked.append((name, cache_dir))
        return DatasetDict({"train": Dataset.from_list(chats(8)), "validation": Dataset.from_list(chats(3))})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    words = ["--train_file=somebody/chats", f"--cache_dir={tmp_path / 'cache'}", "--max_steps=1"]
    found = train(model, words, tmp_path / "run")
    assert found["rows"] == {"train": 8, "validation": 3}
    assert set(asked) == {("somebody/chats", str(tmp_path / "cache"))}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_\\w+` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["full", "meft1", "full+momentum", "lora+checkpointing"])
@pytest.mark.parametrize("form", ["conversations", "preferences"])
def test_other_ways_train_own_rows_too(form: str, method: str, model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", FORMS[form]())
    words = [f"--method={method}", "--num_train_epochs=3", "--per_device_train_batch_size=4", "--learning_rate=0.01"]
    found = train(model, [f"--train_file={file}"], tmp_path / "run", *words)
    base = [f"--base_model_name_or_path={model}"]
    assert found["learnt"] and evaluate(tmp_path / "run", *base) == (found["deployed_metrics"] or found["metrics"])
    if form == "preferences" and method.startswith("full"):
        with pytest.raises(ConfigError, match="measured against what it was trained from"):
            evaluate(tmp_path / "run")
