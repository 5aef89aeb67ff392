"""`meft families`: what it prints and writes, its errors, and its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from meft import cli
from meft_lab.cli.families import families_command
from meft_lab.families import matrix
from meft_lab.families.catalogue import CATALOGUE
from meft_lab.families.check import WAYS, Verdict


def run(*words: str) -> int:
    try:
        cli.main(["families", *words])
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("main() did not exit")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One check a cell is enough where it is not about them."""
    monkeypatch.setattr(matrix, "check", lambda subject, way: Verdict("works"))
    monkeypatch.setattr(matrix, "_heads", lambda family: {})


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_a_family_is_really_tried(wide: None, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.get_rng_state()
    assert run("--model_type", "gpt_neox") == 0
    shown = capsys.readouterr()
    assert torch.equal(torch.get_rng_state(), state)
    assert f"transformers {transformers.__version__}" in shown.out
    lines = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in shown.out.splitlines() if line[:1] == "│"}
    assert [cell.strip() for cell in lines["gpt_neox"]] == ["GPTNeoXLayer", "mlp", "yes", "yes", "no", "yes", "yes"]
    assert [cell.strip() for cell in lines["gpt_neox, sequential"]][2:] == ["yes"] * 5
    assert "gpt_neox: meft3: coupling=" in shown.out
    assert "its attention and its feed-forward read the same input" in shown.out.replace("\n", " ")
    assert shown.err.strip() == ""


def test_several_model_types(quick: None, wide: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model_type", "bert,llama", "--model_type", "t5 mistral") == 0
    shown = capsys.readouterr().out
    rows = [line.split("│")[1].strip() for line in shown.splitlines() if line[:1] == "│"]
    assert [row for row in rows if row] == ["bert", "llama", "t5", "t5, gated (1.1)", "mistral"]


def test_a_model_type_that_is_not_in_the_catalogue(wide: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert "doge" not in CATALOGUE
    assert run("--model_type", "doge") == 0
    shown = capsys.readouterr().out
    assert "DogeDecoderLayer" in shown
    assert "doge: sizes guessed, since the model type is not in the catalogue" in shown


def test_a_model_type_that_cannot_be_built(wide: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model_type", "autoformer") == 1
    shown = capsys.readouterr()
    assert "autoformer: not tried: ValueError: The `prediction_length` config needs to be specified." in shown.out
    assert "Not tried: autoformer: ValueError: The `prediction_length` config needs to be specified." in shown.err


def test_an_unknown_model_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model_type", "lama") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(
        f"Error: model_type is 'lama', which Transformers {transformers.__version__} does not have. Did you mean llama"
    )
    assert "in the catalogue are albert, " in shown.err
    assert shown.err.endswith(".\n")


def test_a_failure_is_exit_code_1(
    wide: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"meft1": Verdict("failed", "training step: KeyError: 'x'")}
    monkeypatch.setattr(matrix, "check", lambda subject, way: broken.get(way, Verdict("works")))
    monkeypatch.setattr(matrix, "_heads", lambda family: {})
    assert run("--model_type", "bert") == 1
    shown = capsys.readouterr()
    assert "FAILED" in shown.out
    assert shown.err.strip() == "Failed: bert, meft1: training step: KeyError: 'x'"


def test_page_in_a_file(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "families.md"
    path.write_text("older")
    assert run("--model_type", "bert", "--markdown", "--output", str(path)) == 0
    text = path.read_text()
    assert text.startswith("# Families of models\n\nWritten by `meft families --model_type bert --markdown --output")
    assert "| bert | `BertLayer` | `intermediate:output.dense` | yes |" in text
    assert [entry.name for entry in tmp_path.iterdir()] == ["families.md"]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.replace("\n", "").endswith(f"Saved {path}.")


def test_table_in_a_file_and_page_on_the_screen(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "families.txt"
    assert run("--model_type", "bert", "--output", str(path)) == 0
    assert "│ bert   │ BertLayer │" in path.read_text()
    capsys.readouterr()
    assert run("--model_type", "bert", "--markdown") == 0
    assert "| bert | `BertLayer` |" in capsys.readouterr().out


def test_an_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, wrong in ((tmp_path, "is a folder"), (tmp_path / "no" / "x.md", "lies in a folder that does not exist")):
        assert run("--model_type", "bert", "--output", str(place)) == 2
        expected = f"Error: output is {str(place)!r}, which {wrong}. Give --output the name of a file to write.\n"
        assert capsys.readouterr().err == expected


def test_without_model_types_it_is_the_whole_catalogue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        matrix, "row_of", lambda family: matrix.Row(family, cells=dict.fromkeys(WAYS, Verdict("works")))
    )
    assert families_command(as_markdown=True, command="meft families") == 0
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and not line.startswith("| ---")
    ]
    assert [line.split(" | ")[0][2:] for line in lines[1:]] == list(CATALOGUE)


def test_a_family_that_is_not_asked_for_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older Transformers lacks some of the catalogue, which is no failure of this library."""
    monkeypatch.setattr(matrix, "row_of", lambda family: matrix.Row(family, problem="ConfigError: no such model type"))
    assert families_command(as_markdown=True) == 0
    assert families_command(["bert"], as_markdown=True) == 1
