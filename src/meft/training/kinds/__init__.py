"""The kinds of tasks that `meft train` knows, and which of them a task's name stands for.

The library knows the user's own rows: texts with labels, and what language models are trained on. Further kinds
come from packages that name them as entry points of the group "meft.tasks", as the laboratory does.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from meft.errors import ConfigError, DataError, MissingPackageError
from meft.loading import models as loading
from meft.loading.arguments import ModelArguments

from ..data.chats import CLASSES, COMPLETIONS, CONVERSATIONS, FORMS_IN_WORDS, PLAIN, PREFERENCES, form_of
from ..data.sources import read_split, renamed
from .base import Encoded, TaskKind
from .classification import TextClassification
from .language import LanguageModel, Preferences

__all__ = ["Encoded", "TaskKind", "check_options", "kind_of", "kinds", "own_kind", "tasks"]


@cache
def _plugged_in() -> tuple[tuple[TaskKind, ...], tuple[str, ...]]:
    """The kinds of installed packages, and what is missing of those that do not load."""
    found: list[TaskKind] = []
    missing: list[str] = []
    for point in sorted(entry_points(group="meft.tasks"), key=lambda point: point.name):
        try:
            found += point.load()
        except ModuleNotFoundError as error:
            missing.append(str(error.name))
    return tuple(found), tuple(missing)


@cache
def kinds() -> tuple[TaskKind, ...]:
    """Every kind; first those of the user's own rows, which have no task's name."""
    return TextClassification(), *_languages().values(), *_plugged_in()[0]


@cache
def _languages() -> dict[str, LanguageModel]:
    forms = {form: LanguageModel(form) for form in (CONVERSATIONS, COMPLETIONS, PLAIN)}
    return {**forms, PREFERENCES: Preferences()}


def tasks() -> tuple[str, ...]:
    """The names of all tasks."""
    return tuple(name for kind in kinds() for name in kind.tasks)


def kind_of(task: str | None) -> TaskKind:
    """The kind of the task called `task`; `None` stands for the user's own files.

    Raises:
        ConfigError: There is no such task.
        MissingPackageError: There may be, but tasks by name need packages that are not installed.
    """
    if not task:
        return kinds()[0]
    for kind in kinds():
        if task in kind.tasks:
            return kind
    missing = _plugged_in()[1]
    if missing:
        raise MissingPackageError(
            f"task is {task!r}. Tasks known by name need {', '.join(missing)}, which is not installed. Install it "
            'with: pip install "meft[lab]"'
        )
    raise ConfigError(f"task is {task!r}; it must be one of {', '.join(tasks())}.")


def own_kind(arguments: Any, model: ModelArguments) -> TaskKind:
    """The kind of the task by its name, or of the user's own rows by their columns.

    Args:
        arguments: `meft.training.arguments.DataArguments`.
        model: What is to be trained: rows of a column `text` alone are for a language model if it is one.

    Raises:
        ConfigError, DataError, MissingPackageError: There is no such task, no such rows, or they are of no kind.
    """
    place = arguments.train_file or arguments.validation_file or arguments.test_file
    if arguments.task or not place:
        return kind_of(arguments.task)
    if arguments.form is not None:
        return kinds()[0] if arguments.form == CLASSES else _languages()[arguments.form]
    usual = type(arguments)()
    completion = (arguments.text_column, arguments.label_column) == (["prompt"], "completion")
    named = [
        name
        for name in ("text_column", "label_column", "labels", "num_labels", "regression")
        if getattr(arguments, name) != getattr(usual, name)
    ]
    if named and not completion:
        return kinds()[0]
    split = next(name for name in ("train", "validation", "test") if getattr(arguments, f"{name}_file"))
    source = renamed(read_split(place, split, model.cache_dir), arguments.columns)
    columns, form = source.columns, form_of(source.columns)
    if form == PLAIN and (arguments.label_column in columns or not _writes(model)):
        return kinds()[0]
    if form == COMPLETIONS and "label" in columns:
        raise DataError(
            f"{source.name} has the columns prompt, completion and label. To learn the completions leave label out, or "
            "give --form completions; to classify texts name --text_column and --label_column."
        )
    if form is not None:
        return _languages()[form]
    if arguments.label_column in columns or not _writes(model):
        return kinds()[0]
    if len(columns) == 1 and (other := next((mark for mark in ";\t|" if mark in columns[0]), None)):
        raise DataError(
            f"{source.name} has one column, {columns[0]!r}, which seems to be several separated by {other!r}. Save it "
            "with commas between the columns."
        )
    raise DataError(
        f"{source.name} has the columns {', '.join(columns)}, by which it is not known what to learn. A language model "
        f"learns {FORMS_IN_WORDS}: rename columns with --columns prompt=NAME completion=NAME. To classify texts give "
        "--text_column and --label_column."
    )


def _writes(model: ModelArguments) -> bool:
    """Whether the model writes texts; one whose configuration cannot be read fails later, with a reason."""
    name = loading.absolute(model.model_name_or_path)
    return loading.is_causal(loading.load_config(model, name))


def check_options(arguments: Any, kind: TaskKind | None = None) -> None:
    """Refuses data arguments that belong to tasks of another kind.

    Args:
        arguments: `meft.training.arguments.DataArguments`.
        kind: That of the task; None for what its name says.

    Raises:
        ConfigError: One is set.
    """
    usual = type(arguments)()
    kind = kind or kind_of(arguments.task)
    for name in dict.fromkeys(name for each in kinds() for name in each.options):
        if name in kind.options or getattr(arguments, name) == getattr(usual, name):
            continue
        owners = [each for each in kinds() if name in each.options]
        tasks_ = [task for each in owners for task in each.tasks]
        rows = [each.rows for each in owners if each.rows]
        places = [f"the tasks {', '.join(tasks_)}"] * bool(tasks_) + [f"own rows of {' or '.join(rows)}"] * bool(rows)
        raise ConfigError(
            f"{name} is {getattr(arguments, name)}; it belongs to {' and '.join(places)}. Leave --{name} out."
        )
