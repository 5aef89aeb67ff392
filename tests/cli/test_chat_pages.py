"""The commands of docs/chats.md and of the README's first minutes are run as they stand there, with a tiny model."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest

from meft import cli
from support.chats import chats, make_chat_model, preferences, write_lines

ROOT = Path(__file__).parents[2]
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(page: str, kind: str) -> list[str]:
    """The text of the blocks that begin with three backticks and `kind`."""
    found: list[str] = []
    inside: str | None = None
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if inside is None and line[3:] == kind:
                found.append("")
            inside = line[3:] if inside is None else None
        elif inside == kind:
            found[-1] += f"{line}\n"
    return found


def commands(page: str) -> list[list[str]]:
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def run_page(page: str, model: Path, more: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs every command of `meft` on a page with another model in the place of its own; returns what was printed."""
    shown = ""
    for words in commands(page):
        ours = words[:2] == ["meft", "chat"] or NAME in words
        if words[:2] == ["pip", "install"] or (page == "README.md" and not ours):
            continue
        assert words[0] == "meft", words
        words = [str(model) if word == NAME else word for word in words[1:]]
        if words[0] == "train":
            words += more
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        printed = capsys.readouterr()
        assert not end.value.code, (words, printed.err)
        shown += printed.out + printed.err
    return shown


def own_rows() -> None:
    write_lines(Path("chats.jsonl"), chats(24))
    write_lines(Path("more.jsonl"), chats(30)[24:])
    write_lines(Path("pairs.jsonl"), preferences(24))


@pytest.mark.parametrize("page", ["docs/chats.md", "README.md"])
def test_the_commands_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own_rows()
    model = make_chat_model(tmp_path / "model")
    more = ["--use_cpu", "--max_seq_length=64", "--disable_tqdm=true", "--learning_rate=0.02"]
    shown = run_page(page, model, more, capsys)
    for said in ("rows are held out", "Step 1 of", "memory of a step", "The validation loss fell from", "my-lora"):
        assert said in shown
    assert "Warning" not in shown and "{'loss'" not in shown
    assert json.loads(Path("my-lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    for block in blocks("docs/chats.md", "python"):
        exec(block)


def test_the_row_on_the_page_is_one(tmp_path: Path) -> None:
    (line,) = blocks("docs/chats.md", "json")
    from meft.training.data.chats import rows_of
    from meft.training.data.sources import Source

    assert len(rows_of(Source("the page", [(1, json.loads(line))]), "conversations")) == 1


@pytest.mark.slow
def test_the_first_minutes_with_the_real_model(tmp_path: Path) -> None:
    """SmolLM2, from the hub or from the folder that MEFT_SMOLLM2 names, as a user sees it: in a process of its own."""
    model = os.environ.get("MEFT_SMOLLM2", NAME)
    colours = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Colour of {thing}, {index}?"},
                {"role": "assistant", "content": said},
            ]
        }
        for index in range(10)
        for thing, said in colours.items()
    ]
    write_lines(tmp_path / "chats.jsonl", rows)
    words = ["train", "--model_name_or_path", model, "--train_file", "chats.jsonl", "--output_dir", "my-lora"]
    words += ["--num_train_epochs", "1", "--bf16"]
    shown = meft(words, tmp_path)
    found = json.loads((tmp_path / "my-lora" / "results.json").read_text())
    assert found["learnt"] and found["start"]["kl"] < 0.1
    assert found["peak_activation_bytes"] < found["costs"]["reference_peak_activation_bytes"]
    assert "Warning" not in shown and "[W" not in shown and "memory of a step" in shown
    answer = meft(["chat", "my-lora", "--prompt", "Colour of grass, 3?", "--max_new_tokens", "8"], tmp_path)
    assert "green" in answer.lower()


def meft(words: list[str], folder: Path) -> str:
    """Runs the command line, and returns all that it shows."""
    command = [sys.executable, "-c", "from meft.cli import main; main()", *words]
    return subprocess.run(command, cwd=folder, check=True, text=True, stdout=PIPE, stderr=STDOUT).stdout
