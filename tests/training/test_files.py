from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meft.errors import ConfigError, DataError
from meft.training.data.files import FileOptions, load_files

ONE = FileOptions(("text",), "label")


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_csv_is_quoted_and_tsv_is_not(tmp_path: Path) -> None:
    table = write(tmp_path / "a.csv", '\ufefftext,label\n"He said ""no"", twice\non two lines",bad\nYes,good\n')
    rows = load_files({"train": table}, ONE).splits["train"]
    assert list(rows) == [{"text": 'He said "no", twice\non two lines', "label": 0}, {"text": "Yes", "label": 1}]
    table = write(tmp_path / "a.tsv", 'text\tlabel\n"He said\tbad\nYes,\tgood\n')
    assert load_files({"train": table}, ONE).splits["train"]["text"][:] == ['"He said', "Yes,"]


def test_json_lines_with_two_texts_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"q": "A", "a": "B", "y": 2}\n\n{"q": "C", "a": "D", "y": 10, "x": null}\n')
    data = load_files({"train": path}, FileOptions(("q", "a"), "y"))
    assert data.spec.labels == ("2", "10")  # by size, not by alphabet
    assert list(data.splits["train"]) == [
        {"text": "A", "text_pair": "B", "label": 0},
        {"text": "C", "text_pair": "D", "label": 1},
    ]
    assert data.spec.metrics == ("accuracy", "f1_macro")


def test_labels_come_from_the_training_rows(tmp_path: Path) -> None:
    train = lines(tmp_path / "train.jsonl", [{"text": "A", "label": "yes"}, {"text": "B", "label": "no"}])
    dev = lines(tmp_path / "dev.jsonl", [{"text": "C", "label": "yes"}])
    data = load_files({"train": train, "validation": dev}, ONE)
    assert data.spec.labels == ("no", "yes") and data.splits["validation"]["label"][:] == [1]
    dev = lines(tmp_path / "dev.jsonl", [{"text": "C", "label": "yes"}, {"text": "C", "label": "Yes"}])
    with pytest.raises(
        DataError, match=r"Line 2 of .*dev.jsonl has the label 'Yes'; the labels are no, yes. Mend that"
    ):
        load_files({"train": train, "validation": dev}, ONE)


def test_a_label_outside_the_range_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "A", "label": 0}, {"text": "B", "label": 3}])
    with pytest.raises(
        DataError, match=r"Line 2 of .*a.jsonl has the label '3'; the labels are 0, 1, 2. Mend that line"
    ):
        load_files({"train": path}, FileOptions(("text",), "label", labels=("0", "1", "2")))


def test_regression(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "A", "label": 0.5}, {"text": "B", "label": 3}])
    data = load_files({"train": path}, FileOptions(("text",), "label", regression=True))
    assert data.splits["train"]["label"][:] == [0.5, 3.0]
    assert data.spec.outputs == 1 and data.spec.metrics == ("pearson", "spearman")
    with pytest.raises(
        DataError, match=r"The labels of .*a.jsonl are numbers such as 0.5. Give --regression to predict"
    ):
        load_files({"train": path}, ONE)
    path = lines(tmp_path / "a.jsonl", [{"text": "A", "label": "nan"}])
    with pytest.raises(DataError, match=r"Line 1 of .*a.jsonl has the label 'nan', which is no finite number, beside"):
        load_files({"train": path}, FileOptions(("text",), "label", regression=True))


def test_test_rows_may_lack_labels(tmp_path: Path) -> None:
    train = lines(tmp_path / "train.jsonl", [{"text": "A", "label": "yes"}, {"text": "B", "label": "no"}])
    test = lines(tmp_path / "test.jsonl", [{"text": "C"}])
    assert load_files({"train": train, "test": test}, ONE).splits["test"].column_names == ["text"]
    with pytest.raises(
        DataError, match=r"has no column 'label'; its columns are text. Give one of them as --label_col"
    ):
        load_files({"train": train, "validation": test}, ONE)
    with pytest.raises(
        DataError, match=r"test.jsonl has no labels to learn the label names from. Give them with --labels"
    ):
        load_files({"test": test}, ONE)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "sentence,label\nA,1\n", r"{file} has no column 'text'; its columns are sentence, label\. Give one "
         r"of them as --text_column\."),
        ("a.csv", "texts,label\nA,1\n", r"{file} has no column 'text'; its columns are texts, label\. Did you mean "
         r"'texts'\?"),
        ("a.csv", "text,label\nA,1\nB\n", r"Line 3 of {file} has 1 columns, the header has 2 \(text, label\)\. Mend t"),
        ("a.csv", 'text,label\nA,"1\n', r"Line 2 of {file} cannot be read: unexpected end of data\. Mend that line\."),
        ("a.csv", "text,label\n", r"{file} has no rows\. Give a file with at least one row\."),
        ("a.csv", "", r"{file}, the train file, is empty \(0 bytes\)\."),
        ("a.csv", "text,label\nA,x\nB,x\n", r"Every row of {file} has the label 'x'; there is nothing to learn\."),
        ("a.csv", "text,label\nA,x\nB,\n", r"Line 3 of {file} has no label: column 'label' holds ''\. Mend or remove "),
        ("a.jsonl", '{"text": "A", "label": 1}\n{"text" "B"}\n', r"Line 2 of {file} is not valid JSON \(Expecting "
         r"':' delimiter at column 9\): {{\"text\" \"B\"}}\. Every line must be one JSON object\."),
        ("a.jsonl", "[1]\n", r"Line 1 of {file} is a JSON list: \[1\]\. Every line must be one JSON object, such as"),
        ("a.jsonl", '{"text": 5, "label": 1}\n', r"Line 1 of {file} has 5 in column 'text', where a text is expected"),
        ("a.jsonl", '{"text": "A", "label": 1}\n{"label": 0}\n', r"Line 2 of {file} has None in column 'text', where"),
        ("a.jsonl", '{"text": "A", "label": null}\n', r"Line 1 of {file} has no label: column 'label' holds None\."),
        ("a.xlsx", "x", r"{file} ends in '.xlsx'; it must be one of .csv, .tsv, .jsonl, .json\."),
    ],
)  # fmt: skip
def test_bad_files_are_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message.format(file=path)):
        load_files({"train": path}, ONE)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.csv, the train file, does not exist; .*none does not exist. Check the"):
        load_files({"train": tmp_path / "none" / "train.csv"}, ONE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_columns": ("a", "b", "c")}, "text_column is a b c, 3 names; give one, or two for a pair of texts."),
        ({"text_columns": ()}, "text_column is empty, 0 names; give one"),
        ({"labels": ("a", "b"), "regression": True}, "labels is a, b beside --regression; leave one of them out."),
        ({"labels": ("a", "a")}, "labels is a, a; give at least two names, all different from one another."),
        ({"labels": ("a",)}, "labels is a; give at least two names"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FileOptions(**({"text_columns": ("text",), "label_column": "label"} | options))
