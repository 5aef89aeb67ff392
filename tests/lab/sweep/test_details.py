"""The lines of single runs: their standard errors, and what they say when they were cut short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meft_lab.checkout import commit
from meft_lab.cli.sweep import sweep_command
from meft_lab.sweep.details import standard_error
from support.tiny import make_model, make_rte


def test_only_shares_of_right_rows_have_a_standard_error() -> None:
    assert standard_error("acc", 0.5, 100) == pytest.approx(0.05)
    assert standard_error("acc_norm", 0.9, 90) == pytest.approx(0.0316, abs=1e-4)
    assert standard_error("loss", 0.5, 100) is None
    assert standard_error("acc", None, 100) is None
    assert standard_error("accuracy", 0.5, 0) is None


def test_a_run_that_was_cut_short_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "short.yaml"
    lines = [
        "arguments:",
        f"  model_name_or_path: {make_model(tmp_path / 'model')}",
        f"  data_dir: {make_rte(tmp_path / 'RTE')}",
        "  task: rte",
        "  max_steps: 9",
        "  num_train_epochs: 8",
        "  use_cpu: true",
        "  measure_steps: 0",
        "  disable_tqdm: true",
        "  report_to: none",
        "grid: {way: {on momentum: {method: lora+momentum, gamma: 0.25}, plain: {method: lora}}}",
    ]
    recipe.write_text("\n".join(lines))
    # Longer than the recipe says is not cut short.
    words = ["--max_steps", "2", "--max_eval_samples", "5", "--num_train_epochs", "9", "--way", "on momentum"]
    assert sweep_command(str(recipe), words, output_dir=str(tmp_path / "out"), command="meft sweep") == 0
    capsys.readouterr()
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    (run,) = found["runs"]
    assert run["shortened"] == {
        "max_steps": {"was": 9, "is": "2"},
        "max_eval_samples": {"was": None, "is": "5"},
    }
    assert run["validation_rows"] == 5 and run["deployed_metrics"] and run["start"]["kl"] >= 0
    assert found["commit"] == run["commit"] == commit()
    text = (tmp_path / "out" / "table.md").read_text()
    accuracy = run["metrics"]["accuracy"]
    error = (accuracy * (1 - accuracy) / 5) ** 0.5
    assert f"| on momentum seed 0 | {accuracy:.3f} ± {error:.3f} |" in text
    assert "accuracy, plain model" in text
    assert "2 (cut short: max_steps 2 instead of 9)" in text
    assert "5 (cut short: max_eval_samples 5 instead of none)" in text
    # The table alone, written anew: nothing is run.
    for name in ("table.md", "table.json"):
        (tmp_path / "out" / name).unlink()
    assert sweep_command(str(recipe), words[:6], output_dir=str(tmp_path / "out"), table_only=True) == 0
    assert "cut short: max_steps 2" in capsys.readouterr().out
    assert not (tmp_path / "out" / "plain").exists()


def test_outside_of_a_checkout_there_is_no_commit(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
