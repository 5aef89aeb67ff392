"""The kinds of tasks that `meft train` knows, and which of them a task's name stands for."""

from __future__ import annotations

from meft.errors import ConfigError
from meft_lab.kinds.images import ImageClassification
from meft_lab.kinds.questions import MultipleChoice

from .base import Encoded, TaskKind
from .classification import TextClassification

__all__ = ["KINDS", "TASKS", "Encoded", "TaskKind", "kind_of"]

# The first one is also the kind of the user's own files, which have no task's name.
KINDS: tuple[TaskKind, ...] = (TextClassification(), MultipleChoice(), ImageClassification())
TASKS = tuple(name for kind in KINDS for name in kind.tasks)


def kind_of(task: str | None) -> TaskKind:
    """The kind of the task called `task`; `None` stands for the user's own files.

    Raises:
        ConfigError: There is no such task.
    """
    if not task:
        return KINDS[0]
    for kind in KINDS:
        if task in kind.tasks:
            return kind
    raise ConfigError(f"task is {task!r}; it must be one of {', '.join(TASKS)}.")
