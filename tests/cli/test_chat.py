"""`meft chat`, the lines of docs/chats.md, and what is said to somebody who presses Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from meft import cli
from meft.cli.chat import ChatArguments, chat_command
from meft.errors import CheckpointError, ConfigError
from meft.training import what_is_kept
from support.chats import chats, completions, make_chat_model, write_lines
from support.tiny import make_model, train

WORDS = ["--num_train_epochs=8", "--per_device_train_batch_size=4", "--learning_rate=0.03", "--logging_steps=1000"]


def run(*words: str) -> int:
    try:
        cli.main(words)
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("main() did not exit")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    model = make_chat_model(folder / "model")
    for name, rows in (("conversations", chats(40)), ("completions", completions(40))):
        file = write_lines(folder / f"{name}.jsonl", rows)
        train(model, [f"--train_file={file}"], folder / name, *WORDS)
    return folder


def expected(folder: Path, ids: torch.Tensor) -> str:
    """What plain PEFT answers."""
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def test_one_prompt_is_answered_as_plain_peft_does(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained / "conversations"
    assert run("chat", str(folder), "--prompt", "the cat sat", "--max_new_tokens=12") == 0
    shown = capsys.readouterr()
    asked = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "the cat sat"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = expected(folder, asked["input_ids"])
    assert shown.out.strip() == answer.strip() != ""
    assert shown.err == ""


def test_completions_are_gone_on_with(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained / "completions"
    assert run("chat", str(folder), "--prompt=the dog ran", "--max_new_tokens=12") == 0
    ids = AutoTokenizer.from_pretrained(folder)("the dog ran", return_tensors="pt")["input_ids"]
    assert capsys.readouterr().out.strip() == expected(folder, ids).strip() != ""


def test_a_conversation_is_remembered_until_exit(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained / "conversations"
    said = iter(["the cat sat", "the bird flew", "exit", "never"])
    chat_command(ChatArguments(str(folder), max_new_tokens=12), ask=lambda _: next(said))
    assert next(said) == "never"
    first, second = capsys.readouterr().out.splitlines()[:2]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": first.strip()}]
    messages.append({"role": "user", "content": "the bird flew"})
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert second.strip() == expected(folder, asked["input_ids"]).strip()


def test_an_answer_ends_where_the_model_does(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    chat_command(ChatArguments(str(trained / "completions"), prompt="the cat", max_new_tokens=1000))
    assert caplog.text == ""
    with pytest.raises(ConfigError, match="is 70 tokens long, and the model takes 64"):
        chat_command(ChatArguments(str(trained / "completions"), prompt="cat " * 70))


def test_ctrl_c_says_what_is_kept(tmp_path: Path) -> None:
    """Before there is a folder, before there is a checkpoint, and with one."""
    folder = tmp_path / "run"
    assert what_is_kept(str(folder)).startswith("Nothing was trained yet, and nothing is kept")
    model = make_chat_model(tmp_path / "model")
    file = write_lines(tmp_path / "rows.jsonl", chats(40))
    # Processes of a shell's background jobs ignore Ctrl-C.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from meft.cli import main; main()"
    words = ["train", f"--model_name_or_path={model}", f"--train_file={file}", f"--output_dir={folder}", "--use_cpu"]
    words += ["--measure_steps=0", "--num_train_epochs=500", "--logging_steps=1", "--save_steps=5"]
    for told, kept in (("rows to train on", "Nothing was trained yet"), ("Step 2 of", "There is no checkpoint in")):
        assert kept in interrupted([sys.executable, "-c", code, *words], told)
    assert "The same command goes on from" in interrupted([sys.executable, "-c", code, *words], "Step 8 of")


def interrupted(command: list[str], told: str) -> str:
    """Runs a command, presses Ctrl-C once it has said something, and returns what it says then."""
    shown = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            shown += line
            if told in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130, shown + rest
    assert "Traceback" not in rest
    return rest


def test_what_cannot_be_talked_to_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        chat_command(ChatArguments(str(tmp_path / "nothing")))
    with pytest.raises(CheckpointError, match="is a bert that writes no texts"):
        chat_command(ChatArguments(str(make_model(tmp_path / "bert"))))
    with pytest.raises(ConfigError, match="goes on with texts and knows no messages"):
        chat_command(ChatArguments(str(trained / "completions"), prompt="a", system="b"))
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            chat_command(ChatArguments(str(trained / "completions"), **options))
