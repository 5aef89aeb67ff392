from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from meft.errors import ConfigError, DataError
from meft_lab.tasks import QUESTION_TASKS, load_multiple_choice

Rows = list[dict[str, Any]]

LETTERED = {
    "id": "7-980",
    "question": {
        "stem": "The sun is {{hot}} and",
        "choices": [{"text": "cold", "label": "A"}, {"text": "bright", "label": "B"}, {"text": "a cat", "label": "C"}],
    },
    "answerKey": "B",
}
NUMBERED = {
    "id": "M-1",
    "question": {"stem": "Why?", "choices": [{"text": "So", "label": "1"}, {"text": "Not so", "label": "2"}]},
    "answerKey": "1",
}
INDEXED = {"id": "M-2", "question": "Why?", "choices": ["So", "Not so"], "answer": 0}
PIQA = {"goal": "Boil eggs", "sol1": "In water.", "sol2": "In air."}
SCIQ = {
    "question": "What boils?",
    "distractor1": "ice",
    "distractor2": "air",
    "distractor3": "sand",
    "correct_answer": "water",
    "support": " Water boils.",
}
SCIQ_SHORT = {"question": "What boils?", "answer": "water"}


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(name: str, folder: Path, split: str = "train") -> Rows:
    return list(load_multiple_choice(name, folder, [split]).splits[split])


def test_openbookqa(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [LETTERED])
    expected = {"prompt": "The sun is {{hot}} and", "choices": ["cold", "bright", "a cat"], "answer": 1}
    assert read("openbookqa", tmp_path) == [expected]
    data = load_multiple_choice("openbookqa", tmp_path, ["train"])
    assert (data.spec.name, data.spec.metrics, data.spec.regression) == ("openbookqa", ("acc", "acc_norm"), False)


@pytest.mark.parametrize("folder", ["Data/Main", "OpenBookQA-V1-Sep2018/Data/Main", "openbookqa"])
def test_openbookqa_in_its_archive(folder: str, tmp_path: Path) -> None:
    write(tmp_path / folder / "dev.jsonl", [LETTERED])
    assert read("openbookqa", tmp_path, "validation")[0]["answer"] == 1


@pytest.mark.parametrize("row", [NUMBERED, INDEXED])
@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_arc(name: str, row: dict[str, Any], tmp_path: Path) -> None:
    expected = [{"prompt": "Question: Why?\nAnswer:", "choices": ["So", "Not so"], "answer": 0}]
    official = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}[name]
    files = {"train": ("Train", "train"), "validation": ("Dev", "val"), "test": ("Test", "test")}
    for split, (word, plain) in files.items():
        write(tmp_path / "ai2" / official / f"{official}-{word}.jsonl", [row])
        write(tmp_path / name / f"{plain}.jsonl", [row])
        assert read(name, tmp_path / "ai2", split) == read(name, tmp_path / name, split) == expected


def test_piqa(tmp_path: Path) -> None:
    for name, labels in (("train", "0\n1\n"), ("valid", "1\n0\n")):
        write(tmp_path / f"{name}.jsonl", [PIQA, PIQA])
        (tmp_path / f"{name}-labels.lst").write_text(labels)
    expected = {"prompt": "Question: Boil eggs\nAnswer:", "choices": ["In water.", "In air."], "answer": 0}
    assert read("piqa", tmp_path) == [expected, expected | {"answer": 1}]
    assert [row["answer"] for row in read("piqa", tmp_path, "validation")] == [1, 0]
    # The answers of the test questions are not public.
    write(tmp_path / "tests.jsonl", [PIQA])
    assert read("piqa", tmp_path, "test") == [{name: value for name, value in expected.items() if name != "answer"}]


def test_answers_to_piqa_must_be_as_many_as_its_questions(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [PIQA, PIQA])
    with pytest.raises(DataError, match=r"train-labels.lst, the answers to train.jsonl, does not exist; .* contains"):
        read("piqa", tmp_path)
    (tmp_path / "train-labels.lst").write_text("0\n")
    with pytest.raises(DataError, match=r"train-labels.lst has 1 answers to the 2 questions of train.jsonl. Get both"):
        read("piqa", tmp_path)
    (tmp_path / "train-labels.lst").write_text("0\n2\n")
    with pytest.raises(DataError, match=r"Line 2 of .*train.jsonl has the label '2'; it must be 0 or 1. Get its file"):
        read("piqa", tmp_path)


def test_sciq(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps([SCIQ]))
    (tmp_path / "valid.json").write_text(json.dumps([SCIQ | {"support": ""}], indent=2))
    expected = {
        "prompt": "Water boils.\nQuestion: What boils?\nAnswer:",
        "choices": ["ice", "air", "sand", "water"],
        "answer": 3,
    }
    assert read("sciq", tmp_path) == [expected]
    assert read("sciq", tmp_path, "validation") == [expected | {"prompt": "\nQuestion: What boils?\nAnswer:"}]


def test_validation_rows_of_sciq_are_left_out_of_training(tmp_path: Path) -> None:
    short = [{"question": f"{number}?", "answer": str(number)} for number in range(7)]
    write(tmp_path / "sciq_train.jsonl", short)
    write(tmp_path / "validation.jsonl", [SCIQ | {"question": f"{n}?", "correct_answer": str(n)} for n in (4, 5, 6)])
    data = load_multiple_choice("sciq", tmp_path)
    assert [row["choices"] for row in data.splits["train"]] == [["0"], ["1"], ["2"], ["3"]]
    assert len(data.splits["validation"]) == 3
    assert data.notes == ("The last 3 training rows are the validation rows and were left out of training.",)
    # Other rows at the end are training rows.
    write(tmp_path / "sciq_train.jsonl", short[:-1])
    data = load_multiple_choice("sciq", tmp_path)
    assert (len(data.splits["train"]), data.notes) == (6, ())
    write(tmp_path / "sciq_train.jsonl", short[4:])
    with pytest.raises(DataError, match=r"All 3 training rows are the validation rows .*Give one side other rows."):
        load_multiple_choice("sciq", tmp_path)


def test_questions_without_wrong_answers_cannot_be_scored(tmp_path: Path) -> None:
    write(tmp_path / "sciq_test.jsonl", [SCIQ_SHORT])
    with pytest.raises(DataError, match=r"Line 1 of .*sciq_test.jsonl has no wrong answers beside the right one, so"):
        read("sciq", tmp_path, "test")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("openbookqa", {"text": "a"}, r"Line 1 of {} has no column 'question'; its columns are text\. Is this a file"),
        (
            "openbookqa",
            LETTERED | {"answerKey": "E"},
            r"has the answerKey 'E'; the choices are A, B, C\. Mend that",
        ),
        ("openbookqa", LETTERED | {"question": {"stem": "a"}}, r"has no column 'choices'; its columns are stem\."),
        ("openbookqa", LETTERED | {"question": {"choices": []}}, r"has no column 'stem'; its columns are choices\."),
        ("arc_easy", INDEXED | {"answer": 2}, r"has the answer 2; it must be 0 to 1\. Mend that row\."),
        ("arc_easy", INDEXED | {"answer": "B"}, r"has the answer 'B'; it must be 0 to 1\. Mend that row\."),
        ("arc_easy", INDEXED | {"choices": [1, 2]}, r"has the choices \[1, 2\], where a list of texts is expected\."),
        ("arc_easy", INDEXED | {"question": " "}, r"has the question ' ', where a text is expected\. Mend or remove"),
        ("piqa", {"goal": "a", "sol1": "b", "label": 0}, r"has no column 'sol2'; its columns are goal, sol1, label\."),
        ("sciq", SCIQ | {"support": None}, r"has None in column 'support', where a text is expected\. Mend that row"),
        (
            "sciq",
            {"question": "a", "correct_answer": "b"},
            r"has no column 'distractor1'; its columns are question, ",
        ),
    ],
)
def test_a_damaged_row_is_refused(name: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [row])
    with pytest.raises(DataError, match=message.format(path)):
        read(name, tmp_path)


def test_some_answers_missing(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [LETTERED, {"question": LETTERED["question"]}])
    with pytest.raises(DataError, match=r"Line 2 of .*train.jsonl has no answer, though other rows of its file have"):
        read("openbookqa", tmp_path)
    write(tmp_path / "train.jsonl", [{"question": LETTERED["question"]}])
    assert "answer" not in read("openbookqa", tmp_path)[0]


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "sciq").mkdir()
    with pytest.raises(DataError, match=r"sciq/train.json, the train questions, does not exist; .*contains nothing"):
        read("sciq", tmp_path)
    with pytest.raises(DataError, match=r"none', which does not exist. Give the folder that holds ARC-Easy."):
        read("arc_easy", tmp_path / "none")
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(DataError, match=r"train.json has no rows. Give a file with at least one row."):
        read("sciq", tmp_path)
    (tmp_path / "train.json").write_text("[1]")
    with pytest.raises(DataError, match=r"Row 1 of .*train.json is a JSON int; every row must be an object."):
        read("sciq", tmp_path)
    with pytest.raises(ConfigError, match=r"task is 'squad'; it must be one of openbookqa, piqa, arc_easy, arc_chal"):
        read("squad", tmp_path)


# A row of each task as the hub has it.
HUB: dict[str, tuple[tuple[str, str | None], dict[str, Any]]] = {
    "openbookqa": (
        ("allenai/openbookqa", "main"),
        {
            "id": "7",
            "question_stem": "The sun is",
            "choices": {"text": ["cold", "bright"], "label": ["A", "B"]},
            "answerKey": "B",
        },
    ),
    "piqa": (("baber/piqa", None), PIQA | {"label": 1}),
    "arc_easy": (
        ("allenai/ai2_arc", "ARC-Easy"),
        {
            "id": "M",
            "question": "Why?",
            "choices": {"text": ["So", "Not so", "No"], "label": ["1", "2", "3"]},
            "answerKey": "3",
        },
    ),
    "arc_challenge": (
        ("allenai/ai2_arc", "ARC-Challenge"),
        {"id": "M", "question": "Why?", "choices": {"text": ["So", "No"], "label": ["A", "B"]}, "answerKey": "A"},
    ),
    "sciq": (("allenai/sciq", None), SCIQ),
}


def fake_hub(rows: Rows) -> Callable[..., datasets.Dataset]:
    def load_dataset(path: str, name: str | None, *, split: str, cache_dir: str | None) -> datasets.Dataset:
        assert ((path, name), split) == (HUB[task][0], "validation")
        return datasets.Dataset.from_list(rows)

    task = next(name for name, (_, row) in HUB.items() if row is rows[0])
    return load_dataset


@pytest.mark.parametrize("name", QUESTION_TASKS)
def test_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = HUB[name][1]
    monkeypatch.setattr(datasets, "load_dataset", fake_hub([row]))
    found = load_multiple_choice(name, None, ["validation"]).splits["validation"][0]
    right = {"openbookqa": "bright", "piqa": "In air.", "arc_easy": "No", "arc_challenge": "So", "sciq": "water"}
    assert found["choices"][found["answer"]] == right[name]


@pytest.mark.parametrize("name", QUESTION_TASKS)
def test_questions_are_those_of_lm_eval(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt, choices and answer equal what lm-eval's own task makes of the same row of the hub."""
    tasks = pytest.importorskip("lm_eval.tasks")
    from lm_eval.utils import apply_template

    row = HUB[name][1]
    file = next(Path(tasks.__file__).parent.glob(f"*/{'arc_easy' if name.startswith('arc') else name}.yaml"))
    import yaml

    config = yaml.safe_load(file.read_text())
    path = config["dataset_path"]
    assert path == HUB[name][0][0]

    def field(template: Any) -> Any:
        return row[template] if template in row else apply_template(template, row)

    target = config["doc_to_target"]
    monkeypatch.setattr(datasets, "load_dataset", fake_hub([row]))
    found = load_multiple_choice(name, None, ["validation"]).splits["validation"][0]
    assert found["prompt"] == field(config["doc_to_text"])
    assert str(found["choices"]) == field(config["doc_to_choice"])
    assert found["answer"] == (target if isinstance(target, int) else int(field(target)))


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> datasets.Dataset:
        raise ConnectionError("Couldn't reach the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = r"allenai/ai2_arc \(ARC-Easy, train\) could not be had from the hub: Couldn't .* --data_dir .../ARC-Easy"
    with pytest.raises(DataError, match=message):
        load_multiple_choice("arc_easy", None)
