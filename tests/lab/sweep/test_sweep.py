from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from meft import cli
from meft.errors import ConfigError, OutputFolderError, StreamOverflowError
from meft.storage.files import read_json, write_json
from meft.training.runs import claimed
from meft_lab.sweep import Sweep, load_recipe, markdown, runs, score_of, table_of
from support.tiny import make_model, make_rte

RATES = ("1e-3", "3e-2")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    content = {
        "arguments": {
            "model_name_or_path": str(make_model(folder / "model")),
            "data_dir": str(make_rte(folder / "RTE")),
            "task": "rte",
            "max_steps": 3,
            "use_cpu": True,
            "measure_steps": 0,
            "disable_tqdm": True,
            "report_to": "none",
            "save_strategy": "no",
        },
        "grid": {"method": ["full", "meft1"]},
        "choose": {"among": {"learning_rate": list(RATES)}},
        "seeds": [0, 1],
        "metric": "accuracy",
        "references": ["full"],
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def make_sweep(recipe_file: Path, folder: Path, **typed: list[str]) -> tuple[Sweep, list[str]]:
    said: list[str] = []
    return Sweep(load_recipe(str(recipe_file), typed), folder, said.append), said


def nothing() -> None:
    pass


@pytest.fixture(scope="module")
def done(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sweep")
    sweep, said = make_sweep(recipe_file, folder)
    calls: list[int] = []
    outcome = sweep.run(lambda: calls.append(1), command="meft sweep small.yaml")
    assert outcome.complete() and not outcome.failed
    # Two methods at two rates on the first seed, and each method's better one on the second.
    assert sweep.planned() == len(outcome.finished) == 6
    assert sum(" (" in line for line in said) == 6
    return folder, table_of(sweep.recipe, outcome)


def test_the_better_rate_on_the_first_seed_is_chosen(done: tuple[Path, dict[str, Any]]) -> None:
    _, table = done
    scores = {
        (run["point"]["method"], run["point"]["learning_rate"], run["seed"]): run["score"] for run in table["runs"]
    }
    for entry in table["chosen"]:
        by_rate = {rate: scores[entry["for"], rate, 0] for rate in RATES}
        assert entry["learning_rate"] == max(RATES, key=by_rate.__getitem__)
        other = next(rate for rate in RATES if rate != entry["learning_rate"])
        assert (entry["for"], other, 1) not in scores


def test_the_table_is_what_the_runs_say(done: tuple[Path, dict[str, Any]]) -> None:
    folder, table = done
    for row, entry in zip(table["rows"], table["chosen"], strict=True):
        places = [folder / row["name"] / f"learning_rate={entry['learning_rate']}" / f"seed-{seed}" for seed in (0, 1)]
        found = [read_json(place / "results.json")["metrics"]["accuracy"] for place in places]
        cell = row["cells"]["score"]
        assert list(cell["scores"].values()) == found
        assert cell["mean"] == pytest.approx(sum(found) / 2)
        assert cell["std"] == pytest.approx(abs(found[0] - found[1]) / 2**0.5)
        assert f"| {row['name']} | {50 * sum(found):.1f} ± {100 * cell['std']:.1f} |" in markdown(table)
    full, meft1 = (row["mean"] for row in table["rows"])
    difference = meft1["mean"] - full["mean"]
    assert table["rows"][1]["compared"] == {"full": {"difference": pytest.approx(difference), "std": full["std"]}}
    assert table["rows"][0]["compared"] == {}
    assert f"| {100 * difference:+.1f} |" in markdown(table)
    assert "Chosen on seed 0 for meft1: learning_rate" in markdown(table)


def test_nothing_finished_is_run_again(
    recipe_file: Path, done: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, table = done
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    trained: list[str] = []
    real = runs.train

    def train(*arguments: Any, **options: Any) -> Any:
        trained.append(arguments[-1].output_dir)
        return real(*arguments, **options)

    monkeypatch.setattr(runs, "train", train)
    make_sweep(recipe_file, copy)[0].run(nothing)
    assert trained == []
    missing = copy / "meft1" / f"learning_rate={table['chosen'][1]['learning_rate']}" / "seed-1"
    shutil.rmtree(missing)
    sweep, _ = make_sweep(recipe_file, copy)
    unfinished = table_of(sweep.recipe, sweep.outcome())
    assert unfinished["rows"][1]["cells"]["score"]["missing"] == [1]
    assert "(1 of 2)" in markdown(unfinished)
    outcome = sweep.run(nothing)
    assert trained == [str(missing)]
    again = table_of(sweep.recipe, outcome)
    assert again["rows"] == table["rows"]


def test_a_run_of_other_arguments_is_neither_taken_nor_touched(
    recipe_file: Path, done: tuple[Path, dict[str, Any]]
) -> None:
    sweep, _ = make_sweep(recipe_file, done[0], max_steps=["4"])
    with pytest.raises(OutputFolderError, match=r"finished run of other arguments \(max_steps was 3 and is 4\)"):
        sweep.run(nothing)


def test_a_run_that_cannot_be_is_found_before_any_is_started(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"The run full 1e-3 seed 0 of recipe small cannot be run: .*gamma"):
        make_sweep(recipe_file, tmp_path, gamma=["0.5"])
    with pytest.raises(ConfigError, match=r"unknown key 'lerning_rate'.*Did you mean --learning_rate"):
        make_sweep(recipe_file, tmp_path, lerning_rate=["1"])
    assert not list(tmp_path.iterdir())


def test_a_failed_run_is_named_and_tried_again(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, said = make_sweep(recipe_file, tmp_path, method=["meft1"], learning_rate=["1e-3"], seeds=["0"])

    def overflow(*_: Any, **__: Any) -> None:
        raise StreamOverflowError("A hidden state is too large.")

    with monkeypatch.context() as patched:
        patched.setattr(runs, "train", overflow)
        outcome = sweep.run(nothing)
    assert outcome.failed == {"meft1 1e-3 seed 0": "StreamOverflowError: A hidden state is too large."}
    assert said == ["Failed: meft1 1e-3 seed 0: A hidden state is too large."]
    assert "Failed: meft1 1e-3 seed 0: StreamOverflow" in markdown(table_of(sweep.recipe, outcome))
    outcome = sweep.run(nothing)
    assert outcome.complete() and not outcome.failed


def test_a_run_that_another_process_is_at_is_waited_for(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: tuple[Path, dict[str, Any]]
) -> None:
    sweep, _ = make_sweep(recipe_file, tmp_path, method=["full"], learning_rate=["1e-3"], seeds=["0"])
    place = tmp_path / "full" / "learning_rate=1e-3" / "seed-0"
    finished = read_json(done[0] / "full" / "learning_rate=1e-3" / "seed-0" / "results.json")
    waited: list[float] = []
    claim = claimed(place, "new", finished["arguments"], "elsewhere")
    claim.__enter__()

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        write_json(place / "results.json", finished)
        claim.__exit__(None, None, None)

    monkeypatch.setattr(runs.time, "sleep", sleep)
    assert sweep.run(nothing).complete()
    assert len(waited) == 1


def test_the_command(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", str(recipe_file), "--output_dir", str(tmp_path / "out"), "--method", "lora", "--seeds", "0"]
    words += ["--learning_rate", "1e-3"]
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--dry_run"])
    assert end.value.code == 0 and not (tmp_path / "out").exists()
    assert "lora 1e-3 seed 0: to do: meft train" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 0
    shown = capsys.readouterr()
    assert (tmp_path / "out" / "table.md").read_text() == shown.out
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["command"].startswith("meft sweep ") and table["versions"] and table["hardware"]
    with (tmp_path / "out" / "table.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert line["method"] == "lora" and float(line["score"]) == table["runs"][0]["score"]
    assert (tmp_path / "out" / "table.svg").read_text().count("lora") >= 1
    assert list((tmp_path / "out").rglob("*.safetensors"))


def test_models_are_removed_where_the_recipe_says_so(recipe_file: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe_file.read_text()) | {"keep_models": False, "choose": None, "seeds": [0]}
    content = {name: value for name, value in content.items() if value is not None}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    sweep, _ = make_sweep(path, tmp_path / "out", method=["meft1"])
    assert sweep.run(nothing).complete()
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert list((tmp_path / "out").rglob("results.json"))


def test_scores() -> None:
    both = {"task": "mnli", "metrics": {"matched_accuracy": 0.5, "mismatched_accuracy": 0.7, "matched_loss": 1.0}}
    assert score_of(both) == pytest.approx(0.6)
    pair = {"task": "mrpc", "metrics": {"accuracy": 0.5, "f1": 0.7, "loss": 1.0}}
    assert score_of(pair) == 0.5 and score_of(pair, "f1") == 0.7
    assert score_of({"task": "cola", "metrics": {"matthews_correlation": None, "loss": 1.0}}) is None
    with pytest.raises(ConfigError, match="metric is 'f2'; the runs on mrpc have accuracy, f1"):
        score_of(pair, "f2")
