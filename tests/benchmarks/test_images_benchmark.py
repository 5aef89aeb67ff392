"""`benchmarks/images.py` on a few tiny images: what it writes is whole, and computed from what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from types import ModuleType
from xml.etree import ElementTree

import pytest

from support.pictures import make_batches

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def images() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield __import__("images")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("images", "images_tables"):
            sys.modules.pop(name, None)


@pytest.mark.slow
def test_results(images: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"--data_dir={make_batches(tmp_path / 'cifar10', {0: 0, 1: 0, 50: 0}, rows=30)}"
    model, runs, results = (tmp_path / name for name in ("vit", "runs", "results"))
    sizes = ["--layers=1", "--width=16", "--patch=16", "--epochs=2", "--batch=4"]
    images.main(["pretrain", data, f"--output_dir={model}", *sizes])
    assert "of 15 test images right; chance is 20%." in capsys.readouterr().out
    before = json.loads((model / "pretraining.json").read_text())
    assert before["classes"] == ["airplane", "automobile", "bird", "cat", "deer"]
    assert before["images"] == {"train": 30, "test": 15} and len(before["loss_by_epoch"]) == 2
    config = json.loads((model / "config.json").read_text())
    assert config["architectures"] == ["ViTModel"]  # without a head, which knew other classes

    words = ["--method", "adapter", "full", "--learning_rate", "1e-3", "1e-2", "--num_train_epochs=1", "--seeds=0,1"]
    images.main(["finetune", data, f"--model_dir={model}", f"--output_dir={runs}", f"--results_dir={results}", *words])
    found = json.loads((results / "images.json").read_text())
    after = found["finetuning"]
    assert found["pretraining"] == before and after["images"] == {"train": 25, "validation": 5, "test": 15}
    assert [row["name"] for row in after["rows"]] == ["adapter", "full"] and len(after["runs"]) == 2 * 3
    for row in after["rows"]:
        assert row["learning_rate"] in ("1e-3", "1e-2") and row["test"]["scores"].keys() == {"0", "1"}
        assert row["test"]["mean"] == fmean(row["test"]["scores"].values())
        run = runs / row["name"] / f"learning_rate={row['learning_rate']}" / "seed-1"
        assert json.loads((run / "test.json").read_text())["metrics"]["accuracy"] == row["test"]["scores"]["1"]
        assert json.loads((run / "results.json").read_text())["metrics"]["accuracy"] == row["validation"]["scores"]["1"]
    page = (results / "images.md").read_text()
    assert page.count("\n| ") == 3 and "dog, frog, horse, ship and truck" in page and "chance is 20%" in page
    assert ElementTree.parse(results / "images.svg").getroot().tag.endswith("svg")


def test_an_argument_that_pretraining_lacks(images: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        images.main(["pretrain", "--data_dir=x", "--output_dir=y", "--epoch=3"])
    assert "--epoch" in capsys.readouterr().err
