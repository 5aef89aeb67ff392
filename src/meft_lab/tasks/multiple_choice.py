r"""Questions with choices: OpenBookQA, PIQA, ARC and SciQ, from their official files or from the hub.

A question becomes a prompt and the texts that may follow it. The prompts are those of lm-eval's tasks of the same
names, so that a model is trained on what it is scored on:

    >>> load_multiple_choice("arc_easy", "ARC-V1-Feb2018-2").splits["train"][0]
    {'prompt': 'Question: Which ...?\nAnswer:', 'choices': ['...', '...', '...', '...'], 'answer': 2}

OpenBookQA (Mihaylov et al. 2018), PIQA (Bisk et al. 2020), ARC (Clark et al. 2018), SciQ (Welbl et al. 2017).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from meft.errors import ConfigError, DataError
from meft.training.data.base import TaskData, TaskSpec, require_file
from meft.training.data.lines import Row, read_rows

from .question_rows import Question, lettered, piqa, sciq

METRICS = ("acc", "acc_norm")
PROMPT, CHOICES, ANSWER = "prompt", "choices", "answer"


@dataclass(frozen=True)
class QuestionTask:
    """Where the questions of one task are, and how they are read.

    Attributes:
        folders: The task's folder below `data_dir`, where that is a parent: of the official archive, and plain names.
        files: File names of each split, the official one first.
        hub: The dataset on the hub and its configuration.
        read: From a row, of a file or of the hub, to a question; `where` names the row in messages.
    """

    folders: tuple[str, ...]
    files: dict[str, tuple[str, ...]]
    hub: tuple[str, str | None]
    read: Callable[[Row, str], Question]


def _arc(difficulty: str) -> QuestionTask:
    return QuestionTask(
        folders=(f"ARC-{difficulty}", f"ARC-V1-Feb2018-2/ARC-{difficulty}", f"arc_{difficulty.lower()}"),
        files={
            "train": (f"ARC-{difficulty}-Train.jsonl", "train.jsonl"),
            "validation": (f"ARC-{difficulty}-Dev.jsonl", "val.jsonl", "dev.jsonl", "validation.jsonl"),
            "test": (f"ARC-{difficulty}-Test.jsonl", "test.jsonl"),
        },
        hub=("allenai/ai2_arc", f"ARC-{difficulty}"),
        read=lambda row, where: lettered(row, where, "Question: {}\nAnswer:"),
    )


QUESTION_TASKS: dict[str, QuestionTask] = {
    "openbookqa": QuestionTask(
        folders=("openbookqa", "Main", "Data/Main", "OpenBookQA-V1-Sep2018/Data/Main"),
        files={
            "train": ("train.jsonl",),
            "validation": ("dev.jsonl", "validation.jsonl"),
            "test": ("test.jsonl",),
        },
        hub=("allenai/openbookqa", "main"),
        read=lambda row, where: lettered(row, where, "{}"),
    ),
    "piqa": QuestionTask(
        folders=("piqa", "physicaliqa-train-dev"),
        files={
            "train": ("train.jsonl",),
            "validation": ("valid.jsonl", "dev.jsonl", "validation.jsonl"),
            "test": ("tests.jsonl", "test.jsonl"),
        },
        # The official ybisk/piqa is a script, which datasets 4 no longer runs; lm-eval reads these rows of it too.
        hub=("baber/piqa", None),
        read=piqa,
    ),
    "arc_easy": _arc("Easy"),
    "arc_challenge": _arc("Challenge"),
    "sciq": QuestionTask(
        folders=("sciq", "SciQ dataset-2 3"),
        files={
            "train": ("train.json", "sciq_train.jsonl", "train.jsonl"),
            "validation": ("valid.json", "validation.jsonl", "valid.jsonl"),
            "test": ("test.json", "sciq_test.jsonl", "test.jsonl"),
        },
        hub=("allenai/sciq", None),
        read=sciq,
    ),
}


class _Located(NamedTuple):
    question: Question
    where: str


def load_multiple_choice(
    name: str,
    data_dir: str | Path | None,
    splits: Sequence[str] = ("train", "validation"),
    *,
    cache_dir: str | None = None,
) -> TaskData:
    """Reads splits of a task of questions with choices.

    Args:
        name: A key of `QUESTION_TASKS`.
        data_dir: The task's official folder or a parent of it; `None` takes the task's dataset of the hub.
        splits: Any of `"train"`, `"validation"` and `"test"`.
        cache_dir: Where the hub's files are kept.

    Raises:
        ConfigError: There is no such task.
        DataError: A file, column or answer is missing or not what the task has.
    """
    if name not in QUESTION_TASKS:
        raise ConfigError(f"task is {name!r}; it must be one of {', '.join(QUESTION_TASKS)}.")
    task, spec = QUESTION_TASKS[name], TaskSpec(name, (), METRICS)
    if data_dir is None:
        located = {split: list(_from_hub(task, split, cache_dir)) for split in splits}
        notes: tuple[str, ...] = ()
    else:
        folder = _folder(Path(data_dir), task)
        located = {split: list(_from_file(task, folder, split)) for split in splits}
        notes = _drop_validation_rows(located) if name == "sciq" else ()
    return TaskData(spec, {split: _to_rows(rows, split) for split, rows in located.items()}, notes)


def _folder(data_dir: Path, task: QuestionTask) -> Path:
    if not data_dir.is_dir():
        what = "is a file" if data_dir.exists() else "does not exist"
        raise DataError(f"data_dir is {str(data_dir)!r}, which {what}. Give the folder that holds {task.folders[0]}.")
    inner = [data_dir / name for name in task.folders if (data_dir / name).is_dir()]
    own = any((data_dir / file).is_file() for names in task.files.values() for file in names)
    return data_dir if own or not inner else inner[0]


def _from_file(task: QuestionTask, folder: Path, split: str) -> Iterator[_Located]:
    there = [folder / name for name in task.files[split] if (folder / name).is_file()]
    path = require_file(there[0] if there else folder / task.files[split][0], f"the {split} questions")
    rows = list(_read_array(path) if path.suffix == ".json" else read_rows(path))
    if not rows:
        raise DataError(f"{path} has no rows. Give a file with at least one row.")
    if task.read is piqa:
        rows = _with_labels(rows, path, required=split != "test")
    for line, row in rows:
        where = f"Line {line} of {path}"
        yield _Located(task.read(row, where), where)


def _read_array(path: Path) -> Iterator[tuple[int, Row]]:
    """SciQ's own files are one JSON array each; where one has a line a row it is read as such."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        yield from read_rows(path)
        return
    rows = content if isinstance(content, list) else [content]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"Row {number} of {path} is a JSON {type(row).__name__}; every row must be an object.")
        yield number, row


def _with_labels(rows: list[tuple[int, Row]], path: Path, *, required: bool) -> list[tuple[int, Row]]:
    """PIQA keeps its answers in a file of their own, a line a question."""
    place = path.with_name(f"{path.stem}-labels.lst")
    if not place.is_file() and (not required or all("label" in row for _, row in rows)):
        return rows
    labels = require_file(place, f"the answers to {path.name}").read_text(encoding="utf-8").split()
    if len(labels) != len(rows):
        raise DataError(
            f"{place} has {len(labels)} answers to the {len(rows)} questions of {path.name}. Get both files anew."
        )
    return [(line, row | {"label": label}) for (line, row), label in zip(rows, labels, strict=True)]


def _from_hub(task: QuestionTask, split: str, cache_dir: str | None) -> Iterator[_Located]:
    path, config = task.hub
    try:
        rows: Any = datasets.load_dataset(path, config, split=split, cache_dir=cache_dir)
    except (OSError, ConnectionError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path} ({config or 'default'}, {split}) could not be had from the hub: {error} "
            f"Without a network give the official folder with --data_dir .../{task.folders[0]}."
        ) from error
    for number, row in enumerate(rows):
        where = f"Row {number} of {path}"
        yield _Located(task.read(row, where), where)


def _drop_validation_rows(located: dict[str, list[_Located]]) -> tuple[str, ...]:
    """Takes out of SciQ's training rows the validation rows, where they stand once more at their end."""
    if not {"train", "validation"} <= located.keys():
        return ()
    train, validation = located["train"], located["validation"]
    count = len(validation)
    if [_asked(row) for row in train[-count:]] != [_asked(row) for row in validation]:
        return ()
    if count == len(train):
        raise DataError(
            f"All {count} training rows are the validation rows ({train[0].where} onwards). Give one side other rows."
        )
    located["train"] = train[:-count]
    return (f"The last {count} training rows are the validation rows and were left out of training.",)


def _asked(located: _Located) -> tuple[str, str]:
    question = located.question
    # The prompt of one side may have a supporting text before the question that the other side lacks.
    return question.prompt.rsplit("\nQuestion: ", 1)[-1], question.right


def _to_rows(located: list[_Located], split: str) -> datasets.Dataset:
    questions = [row.question for row in located]
    if split != "train":
        for question, where in located:
            if len(question.choices) < 2:
                raise DataError(
                    f"{where} has no wrong answers beside the right one, so it cannot be scored as multiple choice. "
                    "Give a split whose questions have choices."
                )
    columns: dict[str, list[Any]] = {
        PROMPT: [question.prompt for question in questions],
        CHOICES: [list(question.choices) for question in questions],
    }
    answered = [question.answer is not None for question in questions]
    if all(answered):
        columns[ANSWER] = [question.answer for question in questions]
    elif any(answered):
        where = located[answered.index(False)].where
        raise DataError(f"{where} has no answer, though other rows of its file have one. Mend or remove that row.")
    return datasets.Dataset.from_dict(columns)
