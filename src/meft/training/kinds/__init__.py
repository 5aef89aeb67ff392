"""The kinds of tasks that `meft train` knows, and which of them a task's name stands for.

The library knows the user's own texts. Further kinds come from packages that name them as entry points of the group
"meft.tasks", as the laboratory does.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from meft.errors import ConfigError, MissingPackageError

from .base import Encoded, TaskKind
from .classification import TextClassification

__all__ = ["Encoded", "TaskKind", "check_options", "kind_of", "kinds", "tasks"]


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
    """Every kind; the first is that of the user's own files, which have no task's name."""
    return TextClassification(), *_plugged_in()[0]


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


def check_options(arguments: Any) -> None:
    """Refuses data arguments that belong to tasks of another kind.

    Args:
        arguments: `meft.training.arguments.DataArguments`.

    Raises:
        ConfigError: One is set.
    """
    usual = type(arguments)()
    for name in dict.fromkeys(name for kind in kinds() for name in kind.options):
        owners = [task for kind in kinds() if name in kind.options for task in kind.tasks]
        if arguments.task not in owners and getattr(arguments, name) != getattr(usual, name):
            raise ConfigError(
                f"{name} is {getattr(arguments, name)}; it belongs to the tasks {', '.join(owners)}. Leave --{name} "
                "out."
            )
