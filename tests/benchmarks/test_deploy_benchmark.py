"""`benchmarks/deploy.py` on a tiny model: what it writes is whole, and computed from what it measured."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from support.peft_helpers import llama
from support.tiny import make_tokenizer, sentence

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def deploy() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield __import__("deploy")
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop("deploy", None)


# PEFT asks Transformers 5.23 by the old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_results(deploy: ModuleType, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    generator = random.Random(0)
    rows = [f"{index}\t{sentence(generator, 12)}" for index in range(60)]
    (tmp_path / "text.tsv").write_text("\n".join(["index\tsentence", *rows]), encoding="utf-8")
    words = ["--model", str(tmp_path / "model"), "--text", f"{tmp_path / 'text.tsv'}#sentence"]
    words += ["--steps", "2", "--batch", "2", "--sequence", "12", "--seeds", "1", "--output", str(tmp_path / "out")]
    folder = deploy.main(words)
    assert sorted(path.name for path in folder.iterdir()) == ["deploy.json", "deploy.md", "deploy.svg"]
    found = json.loads((folder / "deploy.json").read_text())
    assert [(run["gamma"], run["sign"]) for run in found["runs"]] == [(way.gamma, way.sign) for way in deploy.WAYS]
    assert len({run["deployed"] for run in found["runs"]}) == len(deploy.WAYS)
    plain, *coupled = found["runs"]
    assert plain["trained"] == plain["deployed"] != found["before"]
    assert all(run["trained"] != run["deployed"] for run in coupled)
    assert {"command", "date", "hardware", "versions"} <= set(found)
    table = (folder / "deploy.md").read_text()
    last = coupled[-1]
    change = last["deployed"] - plain["deployed"]
    assert f"1/16 | random | {last['trained']:.3f} | {last['deployed']:.3f} | {change:+.3f} | 0.000 |" in table
    assert ElementTree.parse(folder / "deploy.svg").getroot().tag.endswith("svg")


def test_too_little_text_is_refused(deploy: ModuleType, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat\n")
    arguments = deploy.parse(["--model", str(tmp_path), "--text", str(tmp_path / "text.txt")])
    with pytest.raises(SystemExit, match="There are 0 rows of 128 tokens in a part of the text"):
        deploy.read_tokens(arguments)
