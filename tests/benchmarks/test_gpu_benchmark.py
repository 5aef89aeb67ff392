"""`benchmarks/gpu.py` on small shapes, on whatever there is: every part runs, and what was cut off says so."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# PEFT asks Transformers 5.23 by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield __import__("gpu")
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop("gpu", None)


def test_every_part_runs_end_to_end(gpu: ModuleType, tmp_path: Path) -> None:
    assert gpu.main(["--small", "--output", str(tmp_path / "gpu.json")]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    parts = found["parts"]
    assert list(parts) == list(gpu.PARTS) and not any("failed" in rows or "cut off" in rows for rows in parts.values())
    methods = parts["PEFT's public shape"]
    assert list(methods) == list(gpu.METHODS) and all(len(row["seconds"]) == 2 for row in methods.values())
    assert methods[gpu.LORA]["published"]["tokens_a_second"] == 3597
    assert parts["step against LoRA + checkpointing"]["ratio"] > 0 and 0 < parts["coupling"]["share"] < 1
    assert parts["longest sequence"] == {gpu.CHECKPOINTING: 64, gpu.OURS: 64}
    assert parts["dropout and packing"] == {"steps without a wrong bit": 4}
    assert found["small"] is True and "torch" in json.dumps(found)


def test_a_run_that_is_cut_off_is_whole(gpu: ModuleType, tmp_path: Path) -> None:
    assert gpu.main(["--small", "--budget", "0", "--output", str(tmp_path / "gpu.json")]) == 0
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts == {part: {"cut off": "the time was up before it began"} for part in gpu.PARTS}
