"""The tasks of GLUE (Wang et al. 2019, arXiv 1804.07461), from their official folders or from the hub.

The official files are tab-separated without any quoting: a quotation mark is part of a sentence. Their quirks are
facts of the table below: CoLA has no header, MRPC begins with a byte-order mark, MNLI has two development sets, and
a few rows of QQP are cut short, which every reader of it leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets

from meft.errors import ConfigError, DataError
from meft.training.data.base import TaskData, TaskSpec, require_file, to_rows

HUB_DATASET = "nyu-mll/glue"
_ONE_DEV = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
_TWO_DEVS = {
    "train": "train.tsv",
    "validation_matched": "dev_matched.tsv",
    "validation_mismatched": "dev_mismatched.tsv",
    "test_matched": "test_matched.tsv",
    "test_mismatched": "test_mismatched.tsv",
}


@dataclass(frozen=True)
class GlueTask:
    """Where the texts and labels of one task are.

    Attributes:
        folder: The task's folder in the official archive.
        text: The text columns of the official files.
        hub_text: The text columns of the hub's dataset.
        label: The label column of the official files.
        labels: Label names in the order of their indices, empty for regression.
        values: How the official files write those labels.
        metrics: Names of the task's metrics.
        files: File of each split.
        headerless: Column names of the files that have no header (train and dev).
        skip_short_rows: Whether rows with too few columns are known to occur and are left out.
    """

    folder: str
    text: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    values: tuple[str, ...] = ()
    hub_text: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    files: dict[str, str] = field(default_factory=lambda: _ONE_DEV)
    headerless: tuple[str, ...] = ()
    skip_short_rows: bool = False


_PAIR = ("sentence1", "sentence2")
GLUE_TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(
        folder="CoLA",
        text=("sentence",),
        label="label",
        labels=("unacceptable", "acceptable"),
        values=("0", "1"),
        metrics=("matthews_correlation",),
        headerless=("source", "label", "annotation", "sentence"),
    ),
    "sst2": GlueTask(
        folder="SST-2", text=("sentence",), label="label", labels=("negative", "positive"), values=("0", "1")
    ),
    "mrpc": GlueTask(
        folder="MRPC",
        text=("#1 String", "#2 String"),
        hub_text=_PAIR,
        label="Quality",
        labels=("not_equivalent", "equivalent"),
        values=("0", "1"),
        metrics=("accuracy", "f1"),
    ),
    "stsb": GlueTask(folder="STS-B", text=_PAIR, label="score", labels=(), metrics=("pearson", "spearman")),
    "qqp": GlueTask(
        folder="QQP",
        text=("question1", "question2"),
        label="is_duplicate",
        labels=("not_duplicate", "duplicate"),
        values=("0", "1"),
        metrics=("accuracy", "f1"),
        skip_short_rows=True,
    ),
    "mnli": GlueTask(
        folder="MNLI",
        text=_PAIR,
        hub_text=("premise", "hypothesis"),
        label="gold_label",
        labels=("entailment", "neutral", "contradiction"),
        files=_TWO_DEVS,
    ),
    "qnli": GlueTask(
        folder="QNLI", text=("question", "sentence"), label="label", labels=("entailment", "not_entailment")
    ),
    "rte": GlueTask(folder="RTE", text=_PAIR, label="label", labels=("entailment", "not_entailment")),
    "wnli": GlueTask(
        folder="WNLI", text=_PAIR, label="label", labels=("not_entailment", "entailment"), values=("0", "1")
    ),
}


def glue_spec(name: str, labels: Sequence[str] | None = None) -> TaskSpec:
    """The labels and metrics of a task; `labels` gives the same names in another order.

    Raises:
        ConfigError: There is no such task.
    """
    task = _task(name)
    return TaskSpec(name, tuple(labels) if labels else task.labels, task.metrics, regression=not task.labels)


def load_glue(
    name: str,
    data_dir: str | Path | None,
    splits: Sequence[str] = ("train", "validation"),
    *,
    labels: Sequence[str] | None = None,
    cache_dir: str | None = None,
) -> TaskData:
    """Reads splits of a GLUE task.

    Example:
        >>> data = load_glue("rte", "glue/RTE")
        >>> data.splits["train"][0]
        {'text': 'No Weapons of Mass Destruction ...', 'text_pair': '...', 'label': 1}

    Args:
        name: A key of `GLUE_TASKS`.
        data_dir: The task's official folder or its parent; `None` takes the dataset `nyu-mll/glue` of the hub.
        splits: Any of `"train"`, `"validation"` and `"test"`.
        labels: The task's label names in the order of the indices, when a model has learnt another order.
        cache_dir: Where the hub's files are kept.

    Raises:
        ConfigError: There is no such task.
        DataError: A file, column or label is missing or not what the task has.
    """
    task, spec = _task(name), glue_spec(name, labels)
    wanted = [split for split in task.files if split.split("_")[0] in splits]
    if data_dir is None:
        return TaskData(spec, {split: _from_hub(name, task, spec, split, cache_dir) for split in wanted})
    folder = _folder(Path(data_dir), task)
    read = {split: _read_split(task, spec, folder / task.files[split], split) for split in wanted}
    notes = tuple(note for _, note in read.values() if note)
    return TaskData(spec, {split: rows for split, (rows, _) in read.items()}, notes)


def _task(name: str) -> GlueTask:
    if name not in GLUE_TASKS:
        raise ConfigError(f"task is {name!r}; it must be one of {', '.join(GLUE_TASKS)}.")
    return GLUE_TASKS[name]


def _folder(data_dir: Path, task: GlueTask) -> Path:
    if not data_dir.is_dir():
        what = "is a file" if data_dir.exists() else "does not exist"
        raise DataError(f"data_dir is {str(data_dir)!r}, which {what}. Give the folder that holds {task.folder}.")
    inner = data_dir / task.folder
    return inner if inner.is_dir() and not (data_dir / task.files["train"]).is_file() else data_dir


def _read_split(task: GlueTask, spec: TaskSpec, path: Path, split: str) -> tuple[datasets.Dataset, str | None]:
    labelled = not split.startswith("test")
    wanted = (*task.text, task.label) if labelled else task.text
    texts: list[list[str]] = [[] for _ in task.text]
    labels: list[float] = []
    short = 0
    for line, row in _rows(require_file(path, f"the {split} rows of {task.folder}"), task, wanted, labelled):
        if row is None:
            short += 1
            continue
        for column, value in zip(texts, row, strict=False):
            column.append(value)
        if labelled:
            labels.append(_label(task, spec, row[-1], path, line))
    if not texts[0]:
        raise DataError(f"{path} has no rows below its header. Give a file with at least one row.")
    note = f"{short} rows of {path} are cut short and were left out, as is usual for {task.folder}." if short else None
    return to_rows(texts, labels if labelled else None, spec.regression), note


def _rows(
    path: Path, task: GlueTask, wanted: Sequence[str], labelled: bool
) -> Iterator[tuple[int, tuple[str, ...] | None]]:
    """Line numbers (from 1) and the wanted columns; `None` for a row that is cut short where that is known to occur."""
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        numbered = enumerate((line.rstrip("\r\n").split("\t") for line in _decoded(lines, path)), start=1)
        if task.headerless and labelled:
            header = list(task.headerless)
        else:
            _, header = next(numbered)
        places = [_place(path, header, name) for name in wanted]
        for line, cells in numbered:
            if cells == [""]:
                continue
            if len(cells) > max(places):
                yield line, tuple(cells[place] for place in places)
            elif task.skip_short_rows:
                yield line, None
            else:
                raise DataError(
                    f"Line {line} of {path} has {len(cells)} tab-separated columns, {len(header)} are expected "
                    f"({', '.join(header)}). Get the file anew or mend that line."
                )


def _decoded(lines: Iterator[str], path: Path) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error


def _place(path: Path, header: list[str], name: str) -> int:
    if name in header:
        return header.index(name)
    close = get_close_matches(name, header, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else " Is this the folder of another task?"
    raise DataError(f"{path} has no column {name!r}; its columns are {', '.join(header)}.{hint}")


def _label(task: GlueTask, spec: TaskSpec, value: str, path: Path, line: int) -> float:
    if spec.regression:
        try:
            return float(value)
        except ValueError:
            raise DataError(
                f"Line {line} of {path} has the {task.label} {value!r}, which is no number. Mend that line."
            ) from None
    values = task.values or task.labels
    if value not in values:
        raise DataError(
            f"Line {line} of {path} has the label {value!r}; the labels of {task.folder} are {', '.join(values)}. "
            "Mend that line or get the file anew."
        )
    return spec.labels.index(task.labels[values.index(value)])


def _from_hub(name: str, task: GlueTask, spec: TaskSpec, split: str, cache_dir: str | None) -> datasets.Dataset:
    try:
        rows: Any = datasets.load_dataset(HUB_DATASET, name, split=split, cache_dir=cache_dir)
    except (OSError, ConnectionError, ValueError) as error:
        raise DataError(
            f"{HUB_DATASET} ({name}, {split}) could not be had from the hub: {error} "
            f"Without a network give the official folder with --data_dir .../{task.folder}."
        ) from error
    texts = [list(rows[column]) for column in task.hub_text or task.text]
    if split.startswith("test"):
        return to_rows(texts, None)
    indices = rows["label"]
    labels = indices if spec.regression else [spec.labels.index(task.labels[index]) for index in indices]
    return to_rows(texts, list(labels), spec.regression)
