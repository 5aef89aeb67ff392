"""`task.json`, which lies beside every saved model: the labels it was trained for, and what evaluating it alike takes.

Whoever made the folder wrote it, so only what stands in `ALIKE` is taken from it: how rows are read and cut, and the
precision. What may run code, where other models are, and what is written are said in the call alone.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meft.errors import CheckpointError, MeftWarning
from meft.loading.arguments import ModelArguments
from meft.methods.registry import Way
from meft.options import METHOD, options_of
from meft.storage.claims import read_object, require

from .arguments import DataArguments, TrainerArguments
from .data.chats import CLASSES, FORMS

TASK_FILE = "task.json"

_REVISION = re.compile(r"[\w][\w./-]{0,199}")
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True)
class _Claim:
    """What the value of a recorded argument may be."""

    valid: str
    holds: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 4096 and min(value) >= " "


def _is_revision(value: Any) -> bool:
    return _is_text(value) and _REVISION.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_TEXT = _Claim("a text", _is_text)
_COUNT = _Claim("an integer, at least 1", _is_count)
_FLAG = _Claim("true or false", lambda value: isinstance(value, bool))
_COLUMNS = _Claim("one or two names", lambda value: isinstance(value, list) and 0 < len(value) < 3
                  and all(_is_text(name) and not name.startswith("-") for name in value))  # fmt: skip
_SHARE = _Claim("a number from 0 to below 1", lambda value: isinstance(value, float) and 0 <= value < 1)
_RENAMED = _Claim("pairs of names such as prompt=question", lambda value: isinstance(value, list)
                  and all(_is_text(name) and "=" in name and not name.startswith("-") for name in value))  # fmt: skip
_FORMS = (*FORMS, CLASSES)
_DTYPES = ("float32", "bfloat16", "float16", "auto")

ALIKE: Mapping[type, Mapping[str, _Claim]] = {
    ModelArguments: {
        "revision": _Claim("a branch, a tag or a commit", _is_revision),
        "dtype": _Claim(f"one of {', '.join(_DTYPES)}", lambda value: value in _DTYPES),
        "attn_implementation": _Claim(f"one of {', '.join(_ATTENTION)}", lambda value: value in _ATTENTION),
    },
    DataArguments: {
        **dict.fromkeys(("task", "data_dir", "train_file", "validation_file", "test_file", "label_column"), _TEXT),
        "text_column": _COLUMNS,
        "regression": _FLAG,
        "max_seq_length": _COUNT,
        "validation_share": _SHARE,
        "form": _Claim(f"one of {', '.join(_FORMS)}", lambda value: value in _FORMS),
        "columns": _RENAMED,
        **dict.fromkeys(("packing", "completion_only_loss"), _FLAG),
        "dpo_beta": _Claim("a number above 0", lambda value: isinstance(value, float) and value > 0),
        "max_eval_samples": _COUNT,
    },
    TrainerArguments: {
        "per_device_eval_batch_size": _COUNT,
        **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32"), _FLAG),
    },
}
"""The arguments that are recorded and taken back, by the group that they belong to, and what they may be."""
_PATHS = {"data_dir", "train_file", "validation_file", "test_file"}
# Recorded for whoever reads the file, and never taken from it.
_SAID = ("config_name",)


@dataclass(frozen=True)
class TaskRecord:
    """What a folder says of the task that its model was trained on.

    Attributes:
        labels: In the order of the model's outputs; None where it does not say.
        arguments: Those of `ALIKE`, by name.
        method: The way to train on a reversible backbone; None without one.
        options: Of that way, as words.
    """

    labels: list[str] | None = None
    arguments: Mapping[str, Any] | None = None
    method: str | None = None
    options: Mapping[str, Any] | None = None


def read_task(folder: str) -> TaskRecord:
    """What `task.json` in a model's folder says; nothing when there is none.

    Raises:
        CheckpointError: It cannot be read, or says something of another kind than is written there.
    """
    path = Path(folder) / TASK_FILE
    if not (path.exists() or path.is_symlink()):
        return TaskRecord()
    found = read_object(path)
    labels = require(path, "labels", found.get("labels"), (list, type(None)))
    for label in labels or ():
        require(path, "labels", label, str)
    arguments = require(path, "arguments", found.get("arguments", {}), dict)
    trained = require(path, "trained", found.get("trained"), (dict, type(None))) or {}
    method = require(path, "method", trained.get("method"), (str, type(None)))
    options = require(path, "options", trained.get("options", {}), dict)
    return TaskRecord(labels, _taken(path, arguments), method, options)


def write_record(
    labels: list[str], model: ModelArguments, data: DataArguments, trainer: TrainerArguments, trained: Any
) -> dict[str, Any]:
    """The content of `task.json`."""
    arguments: dict[str, Any] = {}
    for given in (model, data, trainer):
        values = {name: getattr(given, name) for name in sorted(ALIKE[type(given)])}
        arguments |= {name: value for name, value in values.items() if value is not None}
    arguments |= {name: value for name in _SAID if (value := getattr(model, name)) is not None}
    for name in _PATHS & arguments.keys():
        path = Path(arguments[name])
        arguments[name] = str(path.resolve()) if path.exists() else arguments[name]
    return {"labels": labels, "arguments": arguments, "trained": trained}


def trained_record(way: Way, settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What `task.json` says of a reversible backbone, for `meft evaluate --method`; None without one."""
    if way.under is None:
        return None
    options = {name: value for name, value in way.options.items() if way.of_coupling(name)}
    words = {name: options_of(METHOD)[name].write(value) for name, value in {**options, **(settings or {})}.items()}
    return {"method": way.name, "options": words}


def _taken(path: Path, arguments: Mapping[str, Any]) -> dict[str, Any]:
    claims = {name: claim for group in ALIKE.values() for name, claim in group.items()}
    taken: dict[str, Any] = {}
    left = []
    for name, value in arguments.items():
        if value is None:
            continue
        if name not in claims:
            left += [name] if value else []
        elif not claims[name].holds(value):
            shown = repr(value)
            raise CheckpointError(
                f"{path} says that {name} is {shown if len(shown) <= 80 else shown[:77] + '...'}; valid is "
                f"{claims[name].valid}. Mend or remove that line, and give --{name} in the call."
            )
        else:
            taken[name] = value
    if left:
        warnings.warn(
            f"{path} says {', '.join(left)}, which only the call may say; nothing of it was taken. Give it in the call "
            "if it is meant.",
            MeftWarning,
            stacklevel=2,
        )
    return taken
