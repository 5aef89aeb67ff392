from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from meft.errors import ConfigError, DataError
from meft_lab.tasks import GLUE_TASKS, load_glue
from support.glue_layouts import HUB, LAYOUTS, write


def test_every_task_has_a_layout_here() -> None:
    assert set(LAYOUTS) == set(HUB) == set(GLUE_TASKS)


@pytest.mark.parametrize("task", LAYOUTS)
@pytest.mark.parametrize("parent", [False, True])
def test_official_layout(task: str, parent: bool, tmp_path: Path) -> None:
    content, expected = LAYOUTS[task]
    folder = write(tmp_path / "glue" / GLUE_TASKS[task].folder, task, content)
    data = load_glue(task, folder.parent if parent else folder)
    for rows in data.splits.values():
        assert list(rows) == expected
    splits = ["train", "validation"] if task != "mnli" else ["train", "validation_matched", "validation_mismatched"]
    assert list(data.splits) == splits
    assert data.spec.regression == (task == "stsb") and data.spec.outputs == {"stsb": 1, "mnli": 3}.get(task, 2)


def test_short_rows_of_qqp_are_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "QQP", "qqp", LAYOUTS["qqp"][0])
    notes = load_glue("qqp", folder).notes
    assert notes[0] == f"1 rows of {folder / 'train.tsv'} are cut short and were left out, as is usual for QQP."


def test_separators_inside_a_sentence_do_not_split_it(tmp_path: Path) -> None:
    folder = write(tmp_path, "sst2", "sentence\tlabel\na\u2028b\x0bc\x85d\t1\n")
    assert load_glue("sst2", folder).splits["train"][0]["text"] == "a\u2028b\x0bc\x85d"


def test_test_rows_have_no_labels(tmp_path: Path) -> None:
    folder = write(tmp_path, "rte", "index\tsentence1\tsentence2\n0\tA\tB\n", ("test",))
    rows = load_glue("rte", folder, ["test"]).splits["test"]
    assert rows.column_names == ["text", "text_pair"]
    folder = write(tmp_path, "cola", "index\tsentence\n0\tHe go.\n", ("test",))
    assert list(load_glue("cola", folder, ["test"]).splits["test"]) == [{"text": "He go."}]


def test_a_model_may_order_the_labels_otherwise(tmp_path: Path) -> None:
    folder = write(tmp_path, "mnli", LAYOUTS["mnli"][0])
    data = load_glue("mnli", folder, labels=("contradiction", "neutral", "entailment"))
    assert data.spec.labels == ("contradiction", "neutral", "entailment")
    assert data.splits["train"]["label"][:] == [1, 0]


def header(folder: Path) -> Path:
    return write(folder, "rte", "index\tsentence1\tsentence2\tlabel\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("index\tsentence1\tsentence_2\tlabel\n", r"{file} has no column 'sentence2'; its columns are index, "
         r"sentence1, sentence_2, label\. Did you mean 'sentence_2'\?"),
        ("a\tb\n", r"{file} has no column 'sentence1'; its columns are a, b\. Is this the folder of another task\?"),
        ("index\tsentence1\tsentence2\tlabel\n0\tA\tB\tmaybe\n", r"Line 2 of {file} has the label 'maybe'; the labels "
         r"of RTE are entailment, not_entailment\. Mend that line or get the file anew\."),
        ("index\tsentence1\tsentence2\tlabel\n0\tA\tB\tentailment\n1\tA\n", r"Line 3 of {file} has 2 tab-separated "
         r"columns, 4 are expected \(index, sentence1, sentence2, label\)\. Get the file anew or mend that line\."),
        ("index\tsentence1\tsentence2\tlabel\n", r"{file} has no rows below its header\. Give a file with at least "),
        ("", r"{file}, the train rows of RTE, is empty \(0 bytes\)\. Give a file with at least one row\."),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(content: str, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, "rte", content)
    with pytest.raises(DataError, match=message.format(file=folder / "train.tsv")):
        load_glue("rte", folder)


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_bytes("sentence\tlabel\ncaf\xe9\t1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"train.tsv is not UTF-8 text \(.*0xe9.*\). Save it as UTF-8."):
        load_glue("sst2", tmp_path)


def test_a_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "stsb", LAYOUTS["stsb"][0].replace("2.5", "two"))
    with pytest.raises(DataError, match=r"Line 3 of .*train.tsv has the score 'two', which is no number. Mend that"):
        load_glue("stsb", folder)


def test_a_missing_file_is_named_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "training.tsv").touch()
    message = rf"{tmp_path}/train.tsv, the train rows of RTE, does not exist; {tmp_path} contains training.tsv. Check"
    with pytest.raises(DataError, match=message):
        load_glue("rte", tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none', which does not exist. Give the folder that holds RTE."):
        load_glue("rte", tmp_path / "none")


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"task is 'squad'; it must be one of cola, sst2, mrpc, stsb, qqp, mnli, qnli"
    ):
        load_glue("squad", None)


def fake_hub(task: str, columns: dict[str, list[Any]]) -> Callable[..., datasets.Dataset]:
    def load_dataset(path: str, name: str, *, split: str, cache_dir: str | None) -> datasets.Dataset:
        assert (path, name) == ("nyu-mll/glue", task)
        rows = columns | {"idx": [0, 1]}
        return datasets.Dataset.from_dict(rows | {"label": [-1, -1]} if split.startswith("test") else rows)

    return load_dataset


@pytest.mark.parametrize("task", HUB)
def test_hub(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", fake_hub(task, HUB[task]))
    data = load_glue(task, None, ["train", "validation", "test"])
    single = task in ("cola", "sst2")
    texts = (
        [{"text": "A"}, {"text": "C"}] if single else [{"text": "A", "text_pair": "B"}, {"text": "C", "text_pair": "D"}]
    )
    labels = [5.0, 2.5] if task == "stsb" else [0, 1]
    for split, rows in data.splits.items():
        known = [{} if split.startswith("test") else {"label": label} for label in labels]
        assert list(rows) == [text | label for text, label in zip(texts, known, strict=True)]
    matched = [f"{split}_{kind}" for split in ("validation", "test") for kind in ("matched", "mismatched")]
    assert list(data.splits) == ["train", *(matched if task == "mnli" else ["validation", "test"])]


def test_hub_with_labels_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", fake_hub("mrpc", HUB["mrpc"]))
    data = load_glue("mrpc", None, ["train"], labels=("equivalent", "not_equivalent"))
    assert data.splits["train"]["label"][:] == [1, 0]


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> datasets.Dataset:
        raise ConnectionError("Couldn't reach the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = (
        r"nyu-mll/glue \(rte, train\) could not be had from the hub: Couldn't reach the Hub. Without a network give"
    )
    with pytest.raises(DataError, match=message):
        load_glue("rte", None)
