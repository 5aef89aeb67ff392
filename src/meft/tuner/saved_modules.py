"""`modules_to_save`: modules that are trained in full beside an adapter, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from torch import nn

from meft.errors import ConfigError

HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What PEFT trains in full of its own accord, by task type, whether a model has it or not."""
# PEFT does not copy modules that only hold others.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def check_modules_to_save(model: nn.Module, names: Sequence[str] | None, task_type: str | None) -> None:
    """Refuses names that PEFT would pass over, or stumble on when it has changed the model.

    Raises:
        ConfigError: A name is the end of no module's name, or of one that only holds others.
    """
    modules = dict(model.named_modules())
    for name in names or ():
        if name in HEADS_OF_TASKS.get(str(task_type or "").removeprefix("TaskType."), ()):
            continue
        met = [known for known in modules if known.endswith(name) and known]
        if not met or not name:
            raise ConfigError(
                f"modules_to_save names {name!r}, but {type(model).__name__} has no such module. Its modules are "
                f"{', '.join(child for child, _ in model.named_children())} and what lies in them."
                + _close(name, modules)
            )
        held = next((known for known in met if isinstance(modules[known], _CONTAINERS)), None)
        if held is not None:
            raise ConfigError(
                f"modules_to_save names {name!r}, which is {held} of {type(model).__name__}, a "
                f"{type(modules[held]).__name__} (PEFT compares the ends of names). Valid are modules that run, not "
                "those that only hold others: name what lies in it, or give more of the name that you mean."
            )


def _close(name: str, modules: dict[str, nn.Module]) -> str:
    ends = {known.rpartition(".")[2] for known in modules} - {""}
    close = get_close_matches(name.rpartition(".")[2], [end for end in ends if not end.isdigit()], n=2)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
