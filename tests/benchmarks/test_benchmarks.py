"""`benchmarks/run.py` on small shapes: what it writes is whole, and computed from what it measured."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PARTS = ("classifier", "decoders", "head", "times", "speed", "gpu")


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """The scripts import one another as neighbours."""
    sys.path.insert(0, str(BENCHMARKS))
    names = ("run", "parts", "tables", "figures", "measuring", "accelerator", "peers", "shapes", "speed")
    before = set(sys.modules)
    try:
        yield {name: __import__(name) for name in names}
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(names) - before:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(bench: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("results")
    words = ["--quick", "--threads", "1", "--rounds", "1", "--output", str(place), "--parts", *PARTS]
    return bench["run"].main(words)


@pytest.fixture
def measured(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "benchmarks.json").read_text())


def test_files_are_whole_and_nothing_else_is_left(folder: Path, bench: dict[str, ModuleType]) -> None:
    assert {path.name for path in folder.iterdir()} == {"benchmarks.json", "benchmarks.md", *bench["figures"].FIGURES}
    for name in bench["figures"].FIGURES:
        assert ElementTree.parse(folder / name).getroot().tag.endswith("svg")


def test_a_write_that_fails_leaves_the_files_as_they_were(
    folder: Path, bench: dict[str, ModuleType], measured: dict[str, Any]
) -> None:
    before = (folder / "benchmarks.json").read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        bench["run"].write_results({**measured, "times": float("nan")}, folder)
    assert (folder / "benchmarks.json").read_bytes() == before


def test_every_part_says_where_it_comes_from(measured: dict[str, Any]) -> None:
    for part in PARTS:
        found = measured[part]
        assert found["command"].startswith("python benchmarks/run.py --quick")
        assert found["hardware"]["threads"] == 1
        assert found["versions"]["torch"] == torch.__version__
        assert found["date"].startswith("20")


def test_tables_have_every_method(bench: dict[str, ModuleType], folder: Path, measured: dict[str, Any]) -> None:
    methods = set(bench["peers"].PEERS)
    assert {row["method"] for row in measured["decoders"]["rows"]} == methods
    assert {row["method"] for row in measured["classifier"]["rows"]} == methods
    assert {row["method"] for row in measured["head"]["rows"]} == set(bench["peers"].HEADS)
    for part in ("classifier", "decoders"):
        section = bench["tables"].section(part, measured)
        assert section in (folder / "benchmarks.md").read_text()
        assert all(f"| {method} |" in section for method in methods)


def test_a_profile_accounts_for_all_seconds_and_a_batch_fits(
    bench: dict[str, ModuleType], measured: dict[str, Any]
) -> None:
    labels = {*bench["speed"].WORK, bench["speed"].REST}
    for run in measured["speed"]["runs"]:
        assert set(run["work"]) == set(run["seconds"]) == set(bench["parts"].PROFILED)
        for method, work in run["work"].items():
            assert set(work) == labels and all(seconds >= 0 for seconds in work.values())
            assert (work["coupling and its inverse"] > 0) == (method != run["reference"])
    for run in measured["speed"]["equal"]:
        assert run["batches"][run["reference"]] == run["batch"]
        # In the memory of one method, a method that takes less of it has room for more.
        assert min(run["batches"].values()) >= 1
        assert run["ratios"][run["reference"]] == 1
    section = bench["tables"].section("speed", measured)
    assert all(f"| {label} |" in section for label in labels)


def test_causes_sum_to_the_peak_and_coupled_layers_save_nothing(
    bench: dict[str, ModuleType], measured: dict[str, Any]
) -> None:
    coupled = {"meft1", "meft2", "meft3", "momentum", *(m for m in bench["peers"].PEERS if "on momentum" in m)}
    for row in measured["decoders"]["rows"]:
        assert sum(row["activation_causes"].values()) == row["activation_peak_bytes"] > 0
        assert (row["activation_causes"]["saved by layers"] == 0) == (row["method"] in coupled)


def test_offloaded_bytes_are_set_apart(bench: dict[str, ModuleType], measured: dict[str, Any]) -> None:
    peers, deep = bench["peers"], measured["decoders"]["deep"]
    shape = {key: deep[key] for key in ("layers", "width", "sequence")}
    sizes = {
        row["method"]: row["activation_peak_bytes"]
        for row in measured["decoders"]["rows"]
        if all(row[key] == value for key, value in shape.items())
    }
    assert sizes[peers.OFFLOAD] < sizes[peers.CHECKPOINTING] < sizes[peers.LORA]


def test_a_further_layer_adds_its_residues(bench: dict[str, ModuleType], measured: dict[str, Any]) -> None:
    peers = bench["peers"]
    for _, bits in bench["tables"].added_bits(measured["decoders"]):
        assert bits[peers.LAYERS] == pytest.approx(2, abs=0.1)
        assert bits[peers.TILES] == pytest.approx(4, abs=0.1)
        assert bits[peers.CHECKPOINTING] > 16


def test_targets_follow_from_the_numbers(bench: dict[str, ModuleType], measured: dict[str, Any]) -> None:
    targets, tiles = bench["tables"].targets, bench["peers"].TILES
    worse, better = copy.deepcopy(measured), copy.deepcopy(measured)
    for run in worse["times"]["runs"]:
        run["ratios"][tiles] = 1.2  # a step of these small shapes takes what the machine's load makes of it
    assert {target.met for target in targets(worse) if "bits" not in target.text} == {"no"}  # these shapes are small
    for row in (*better["decoders"]["rows"], *better["classifier"]["rows"]):
        if row["method"] in (tiles, "meft1"):
            row["activation_peak_bytes"] = 1
    for run in better["times"]["runs"]:
        run["ratios"][tiles] = 1.1
    found = targets(better)
    assert len(found) == len(targets(measured)) == 10
    assert {target.met for target in found} == {"yes"}
    better["times"]["runs"][0]["ratios"][tiles] = 1.1004
    assert [target.met for target in targets(better)].count("no") == 1


def test_targets_that_were_not_measured_say_so(bench: dict[str, ModuleType], measured: dict[str, Any]) -> None:
    tables, peers = bench["tables"], bench["peers"]
    rows = [row for row in measured["decoders"]["rows"] if row["method"] != peers.FULL]
    found = tables.targets({"decoders": {**measured["decoders"], "rows": rows}})
    assert [target.met for target in found if target.text.endswith("of full")] == ["not measured"] * 2


def test_ratios_are_medians_of_the_ratios_within_rounds(bench: dict[str, ModuleType]) -> None:
    assert bench["measuring"].ratio([1.0, 8.0, 3.0], [1.0, 4.0, 1.0]) == 2.0


def test_without_an_accelerator_its_part_is_skipped_with_the_reason(folder: Path, measured: dict[str, Any]) -> None:
    if not torch.cuda.is_available():
        assert measured["gpu"]["skipped"] == "not run: there is no CUDA device here."
        assert measured["gpu"]["skipped"] in (folder / "benchmarks.md").read_text()


@pytest.mark.parametrize("most", [511, 512, 700, 5000, 60_001, 200_000])
def test_the_longest_sequence_is_found_to_a_sixteenth(bench: dict[str, ModuleType], most: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= most

    found = bench["accelerator"].longest(fits)
    limit = min(most, bench["accelerator"].LONGEST)
    assert found is None if most < 512 else limit - max(512, limit / 15) <= found <= limit
    assert len(tried) <= 14


@pytest.mark.parametrize("method", ["full", "LoRA + checkpointing + offload", "LoRA on momentum: blocks, tiles"])
def test_a_step_of_the_part_for_accelerators_trains(bench: dict[str, ModuleType], method: str) -> None:
    accelerator, peer = bench["accelerator"], bench["peers"].PEERS[method]
    device = torch.device("cpu")
    model, optimizer = accelerator.trained(accelerator.CONFIGS["small Llama"](), peer, device)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    accelerator.take_step(model, optimizer, peer, 32, device)
    assert any(not torch.equal(old, new) for old, new in zip(before, weights, strict=True))


def test_known_shapes_are_estimated_by_every_method(bench: dict[str, ModuleType]) -> None:
    parts = bench["parts"]
    told: list[str] = []
    found = parts.fake(parts.QUICK_SIZES, told.append)
    assert [row["method"] for row in found["rows"]] == [
        parts.OFFLOADED_FAKE if name == parts.OFFLOAD else name for name in parts.PEERS
    ]
    assert len(told) == parts.count("fake", parts.QUICK_SIZES)
    sizes = {row["method"]: row["activation_peak_bytes"] for row in found["rows"]}
    assert sizes["LoRA on momentum: blocks"] < sizes["LoRA on momentum: layers"] < sizes["full"]


@pytest.mark.parametrize("part", ["classifier", "decoders", "head", "times"])
def test_the_bar_counts_what_is_run(bench: dict[str, ModuleType], part: str, measured: dict[str, Any]) -> None:
    found, counted = measured[part], bench["parts"].count(part, bench["parts"].QUICK_SIZES)
    rounds = bench["parts"].QUICK_SIZES.rounds
    run = [times for run in found.get("runs", ()) for times in run["seconds"].values()]
    assert counted == (len(found["rows"]) if "rows" in found else rounds * sum(map(len, run)))


def test_the_page_takes_every_part(bench: dict[str, ModuleType], measured: dict[str, Any]) -> None:
    page = (BENCHMARKS.parent / "research" / "benchmarks.md").read_text()
    filled = bench["tables"].put_into_page(page, measured)
    for part in PARTS:
        assert bench["tables"].section(part, measured) in filled
    assert bench["tables"].put_into_page(filled, measured) == filled
    for name in bench["figures"].FIGURES:
        assert f"benchmarks/results/{name}" in page


def test_a_count_of_nothing_is_refused(bench: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench["run"].parse(["--rounds", "0"])
    assert "--rounds is 0; it must be at least 1." in capsys.readouterr().err
