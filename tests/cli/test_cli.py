from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from meft import cli
from meft.errors import MeftError, ReconstructionError
from support.tiny import make_model, make_rte

QUIET = ["--use_cpu=true", "--disable_tqdm=true", "--measure_steps=1", "--max_steps=2", "--save_strategy=no"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    model, data = make_model(folder / "model"), make_rte(folder / "RTE")
    return [f"--model_name_or_path={model}", "--task=rte", f"--data_dir={data}", *QUIET]


def run(*words: str) -> int:
    try:
        cli.main(words)
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("main() did not exit")


def test_train_then_evaluate(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert run("train", *words, "--method=meft1", f"--output_dir={output}") == 0
    shown = capsys.readouterr()
    found = json.loads((output / "results.json").read_text())
    for expected in (
        "meft1 on rte",
        f"{found['metrics']['accuracy']:.4f}",
        f"{found['trainable_parameters']:,} ({found['trainable_parameters'] / found['total_parameters']:.2%})",
        f"{found['peak_activation_bytes'] / 1024:.1f} KiB",
        f"{found['step_time_ratio']:.2f}",
    ):
        assert expected in shown.out
    assert f"Saved to {output}" in shown.err
    assert "The checkpoint has no weights for classifier; they start at random and are trained." in shown.err
    assert "Warning" not in shown.err
    assert found["command"].startswith("meft train --model_name_or_path=")

    assert run("evaluate", f"--model_name_or_path={output}", "--use_cpu=true", "--disable_tqdm=true") == 0
    assert f"{found['metrics']['loss']:.4f}" in capsys.readouterr().out


def test_yaml(words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{word[2:].replace('=', ': ')}\n" for word in words))
    assert run("train", str(path), "--method", "lora", f"--output_dir={tmp_path / 'run'}", "--measure_steps=0") == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["method"] == "lora"


def test_bad_input_is_one_sentence_and_exit_code_2(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", *words, "--method=meft9", f"--output_dir={tmp_path / 'run'}") == 2
    shown = capsys.readouterr()
    assert shown.err == (
        "Error: method is 'meft9'; it must be one of full, lora, ia3, bitfit, adapter, meft1, meft2, meft3, momentum; "
        "full, lora, ia3, bitfit may stand on a reversible backbone (+meft1, +meft2, +meft3, +momentum: lora+momentum)"
        ", and "
        "full, lora, ia3, bitfit, adapter may be followed by +checkpointing or +offload.\n"
    )
    assert shown.out == ""
    assert run("train", "--taks=rte") == 2
    assert capsys.readouterr().err.startswith("Error: The following arguments are required: --model_name_or_path.")
    assert run("trian") == 2
    assert "No such command 'trian'" in capsys.readouterr().err


def test_traceback_on_request(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeftError, match=r"meft9"):
        cli.main(["train", *words, "--method=meft9", "--traceback"])
    monkeypatch.setenv("MEFT_TRACEBACK", "1")
    with pytest.raises(MeftError, match=r"meft9"):
        cli.main(["train", *words, "--method=meft9"])


@pytest.mark.parametrize(
    ("problem", "code", "message"),
    [
        (ReconstructionError("streams differ"), 1, "Error: streams differ\n"),
        (OSError(28, "No space left on device"), 1, "Error: No space left on device.\n"),
        (
            KeyboardInterrupt(),
            130,
            "Error: Interrupted. Nothing was trained yet, and nothing is kept; the same command begins anew.\n",
        ),
    ],
)
def test_failures_while_training(
    problem: BaseException,
    code: int,
    message: str,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr("meft.training.train", fail)
    assert run("train", *words) == code
    assert capsys.readouterr().err == message


def test_demo_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr("meft_lab.demo.run", lambda *args, **kwargs: called.append((args, kwargs)))
    assert run("demo") == 0
    assert run("demo", "--output_dir", "here", "--methods", "full meft1", "--steps", "7", "--seed=3") == 0
    assert called == [
        (("demo",), {"seed": 0, "command": "meft demo"}),
        (
            ("here",),
            {
                "seed": 3,
                "command": "meft demo --output_dir here --methods 'full meft1' --steps 7 --seed=3",
                "methods": ["full", "meft1"],
                "steps": 7,
            },
        ),
    ]


def test_warnings_are_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    warnings.simplefilter("default")
    assert run("--help") == 0
    capsys.readouterr()
    warnings.warn("drift of 0.3", UserWarning, stacklevel=1)
    warnings.warn("use the new name", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "Warning: drift of 0.3\n"


def test_help_lists_the_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from meft.cli import main; main()", "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert done.returncode == 0
    assert all(f" {command} " in done.stdout for command in ("train", "evaluate", "demo"))
