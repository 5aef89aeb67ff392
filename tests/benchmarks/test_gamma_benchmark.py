"""The measurement of gamma on a tiny model, and that its page says no more than its standard errors allow."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.tiny import WORDS, make_language_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("gamma_script", BENCHMARKS / "gamma.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def make_questions(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        rows = []
        for index in range(8):
            choices = [{"text": WORDS[label + index % 3], "label": "AB"[label]} for label in range(2)]
            stem = f"{WORDS[index]} {WORDS[3]}"
            rows.append({"question": {"stem": stem, "choices": choices}, "answerKey": "AB"[index % 2]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_every_way_is_measured_once(script: ModuleType, tmp_path: Path) -> None:
    model = make_language_model(tmp_path / "model")
    words = [f"--model={model}", f"--data_dir={make_questions(tmp_path / 'openbookqa')}", "--steps=2"]
    words += ["--batch_size=3", "--questions=5", f"--output={tmp_path / 'out'}"]
    ways = ["--ways", "zero-shot", "lora", "lora+momentum 1/4", "meft1"]
    script.main([*words, *ways[:3]])
    script.main([*words, "--resume", *ways])
    found = json.loads((tmp_path / "out" / "gamma.json").read_text())
    rows = {row["way"]: row for row in found["ways"]}
    assert list(rows) == ways[1:]
    for row in rows.values():
        assert len(row["by_question"]["loss"]) == 5 and row["commit"] and row["command"] and row["date"]
    assert rows["zero-shot"]["training_losses"] == []
    momentum = rows["lora+momentum 1/4"]
    assert momentum["bits"] == 2 and momentum["start_kl"] > 0 and momentum["deployed_loss"] != momentum["loss"]
    # The same first batch and the same initial LoRA, which is nothing yet: they differ by the coupling alone.
    assert momentum["training_losses"][0] == pytest.approx(rows["lora"]["training_losses"][0], abs=0.2)
    text = (tmp_path / "out" / "gamma.md").read_text()
    assert "Not run, for time: lora+momentum 1/32, lora+momentum 1/16." in text
    assert "![" in text and (tmp_path / "out" / "gamma.svg").is_file()
    script.main(["--page", f"--output={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "gamma.md").read_text() == text
    # The loss alone is the same loss, from the right answers alone.
    script.main([*words, "--loss_only", "--ways", "zero-shot", f"--output={tmp_path / 'loss'}"])
    (alone,) = json.loads((tmp_path / "loss" / "gamma.json").read_text())["ways"]
    assert alone["by_question"]["loss"] == pytest.approx(rows["zero-shot"]["by_question"]["loss"], rel=1e-4)
    assert "acc" not in alone and "acc" not in (tmp_path / "loss" / "gamma.md").read_text().splitlines()[0]
    with pytest.raises(SystemExit, match="has other settings"):
        script.main([*words, "--resume", "--seed=1"])


def row(way: str, losses: list[float], **more: Any) -> dict[str, Any]:
    return {"way": way, "by_question": {"loss": losses}, "deployed_by_question": {"loss": losses}, **more}


def test_what_is_said_is_no_stronger_than_its_error(script: ModuleType) -> None:
    lora = row("lora", [1.0, 2.0, 3.0, 4.0])
    # Large losses that differ alike from question to question: the pairs tell what the means alone would not.
    apart = script.verdict(row("a", [1.5, 2.5, 3.5, 4.6]), lora)
    assert apart.startswith("a: as trained its loss is above LoRA's by 0.525")
    unsure = script.verdict(row("b", [0.5, 3.0, 2.5, 5.0]), lora)
    assert "as trained no difference to LoRA beyond two standard errors" in unsure
    assert script.compared(row("a", [2.0, 2.0, 4.0, 4.0]), lora, "loss") == pytest.approx((0.5, 1 / 12**0.5))
