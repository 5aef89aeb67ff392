"""`meft estimate` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import meft
from meft.cli import main
from meft.errors import UnsupportedModelError
from meft.methods.registry import Way
from support.memory_families import small_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_config("opt").save_pretrained(tmp_path / "opt")
    return tmp_path / "opt"


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: Any, columns: int = 100
) -> tuple[int, str, str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as caught:
        main(["estimate", *map(str, words)])
    output = capsys.readouterr()
    return int(caught.value.code or 0), output.out, output.err


def test_a_wide_terminal_shows_every_cause(folder, capsys, monkeypatch) -> None:
    words = (folder, "--method", "full meft1", "--seq_len=64")
    _, narrow, _ = run(capsys, monkeypatch, *words)
    _, wide, _ = run(capsys, monkeypatch, *words, columns=160)

    assert "activations" in narrow and "residues" not in narrow
    assert "residues" in wide and "activations" not in wide


def test_one_method(folder, capsys, monkeypatch) -> None:
    code, out, _ = run(capsys, monkeypatch, folder, "--method", "momentum", "--seq_len=64", "--gamma", "0.125")

    assert code == 0
    assert "residues" in out
    assert 'meft.MeftConfig(task_type="CAUSAL_LM", coupling="momentum", gamma=0.125)' in out


def test_several_methods_side_by_side(folder, capsys, monkeypatch, tmp_path) -> None:
    file = tmp_path / "found.json"
    words = ("--method", "full lora+momentum,meft1", "--batch_size=3", "--seq_len=64", "--dtype=float32")

    code, out, _ = run(capsys, monkeypatch, folder, *words, "--device=cpu", "--json", file, "--lora_rank=4")

    assert code == 0
    assert "batch 3 x 64" in out
    assert out.index("full ") < out.index("lora+momentum ") < out.index("meft1 ")
    assert 'LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear")' in out
    found = json.loads(file.read_text())
    assert found["kind"] == "meft estimate"
    assert found["command"].startswith(f"meft estimate {folder} --method")
    assert [report["method"] for report in found["estimates"]] == ["full", "lora+momentum", "meft1"]
    sizes = {"batch_size": 3, "seq_len": 64, "dtype": "float32", "device": "cpu"}
    expected = meft.estimate(folder, method="lora+momentum", lora_rank=4, **sizes)
    assert found["estimates"][1] == expected.as_dict()


def test_a_budget(folder, capsys, monkeypatch) -> None:
    code, out, _ = run(
        *(capsys, monkeypatch, folder, "--method", "full momentum", "--budget", "6MiB", "--longest=sequence"),
        *("--dtype=float32", "--device=cpu", "--batch_size=4"),
    )

    full = meft.estimate(folder, method="full", dtype="float32", device="cpu", batch_size=4, seq_len=2)
    assert full.total_bytes > 0.9 * 6 * 2**20  # what little is left over goes into few tokens
    lengths = {name: row.split()[3] for row in out.splitlines() for name in ("full", "momentum") if f" {name} " in row}
    assert code == 0
    assert lengths["full"] == "none" or int(lengths["full"]) < int(lengths["momentum"])


def test_the_answer_to_a_budget_for_one_method(folder, capsys, monkeypatch) -> None:
    words = ("--method=lora", "--budget=8MiB", "--seq_len=32", "--device=cpu", "--dtype=float32")
    largest = meft.estimate(folder, method="lora", budget="8MiB", seq_len=32, device="cpu", dtype="float32").batch_size

    _, out, _ = run(capsys, monkeypatch, folder, *words)

    assert out.startswith(f"In 8MiB, lora fits batch {largest} x 32.\n")


def test_what_cannot_be_estimated_is_said_beside_the_rest(folder, capsys, monkeypatch) -> None:
    def apply(self: Way, *arguments: Any) -> Any:
        if self.name == "meft3":
            raise UnsupportedModelError("This model does not split.")
        return applied(self, *arguments)

    applied = Way.apply
    monkeypatch.setattr(Way, "apply", apply)

    code, out, _ = run(capsys, monkeypatch, folder, "--method", "meft1 meft3", "--seq_len=16")

    assert code == 0
    assert "meft1" in out
    assert out.endswith("meft3 is left out. This model does not split.\n")


def test_a_budget_that_fits_for_no_method(folder, capsys, monkeypatch) -> None:
    code, out, _ = run(capsys, monkeypatch, folder, "--method", "full momentum", "--budget=1kB", "--seq_len=16")

    assert code == 2
    assert out.count("in which nothing fits") == 2
    assert "full needs at least" in out and "momentum needs at least" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "magic"], "method is 'magic'; it must be one of full, lora,"),
        (["--method", ""], "method is ''; give all, or one or more of full,"),
        (["--method=lora", "--budget=lots"], "budget is 'lots', which is no size."),
        (["--method=lora", "--lora_rank"], "Argument --lora_rank: expected one argument. See meft estimate --help."),
        (["--method=lora", "stray"], "Unknown argument 'stray'. --help lists the arguments."),
        (["--method=lora", "--lora_ranks=3"], "Unknown argument '--lora_ranks=3'. Did you mean --lora_rank or"),
        (["--method=lora", "--json=/no/such/folder/x.json"], "The folder of '/no/such/folder/x.json' does not exist."),
        (["--method=full", "--seq_len=9999"], "seq_len is 9999, but"),
    ],
)
def test_refusals(words, message, folder, capsys, monkeypatch) -> None:
    code, _, err = run(capsys, monkeypatch, folder, *words)

    assert code == 2
    assert message in err


def test_a_folder_that_does_not_exist(capsys, monkeypatch) -> None:
    code, _, err = run(capsys, monkeypatch, "./nowhere")

    assert code == 2
    assert "./nowhere does not exist. Give a model's folder" in err
