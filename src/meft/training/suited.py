"""Learning rate, warm-up and logging where they are left out: what suits the method and the kind of task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meft.methods.registry import Way
from meft.storage.files import read_json

from .arguments import TrainerArguments
from .kinds.base import Say
from .runs import RESULTS_FILE, RUN_FILE

LINES = 20
"""How often the loss is printed in a run."""


def suit(arguments: TrainerArguments, way: Way, task_type: str | None, folder: Path, say: Say) -> None:
    """Sets the learning rate and the warm-up that were left out, and says which.

    A run that goes on keeps those that it began with.

    Args:
        arguments: Changed in place; what was given is not touched.
        way: How the model is trained.
        task_type: PEFT's type of the task.
        folder: The output folder.
        say: Called with the sentence.
    """
    began = _began(folder)
    rate, warmup = way.method.suited(task_type)
    found = {"learning_rate": rate, "warmup_steps": warmup}
    chosen = {name: began.get(name, value) for name, value in found.items() if name in arguments.left_out}
    for name, value in chosen.items():
        setattr(arguments, name, value)
    if chosen:
        words = [f"{name} {value:g}" for name, value in chosen.items()]
        say(f"Not given, so chosen for {way.name}: {', '.join(words)}{_share(chosen.get('warmup_steps'))}.")


def suit_logging(arguments: TrainerArguments, rows: int) -> None:
    """Sets how often the loss is printed, if that was left out: some twenty times a run."""
    if "logging_steps" not in arguments.left_out:
        return
    batch = arguments.per_device_train_batch_size * max(1, arguments.n_gpu) * arguments.world_size
    epoch = max(1, math.ceil(math.ceil(rows / batch) / arguments.gradient_accumulation_steps))
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(epoch * arguments.num_train_epochs)
    arguments.logging_steps = max(1, steps // LINES)


def _began(folder: Path) -> Mapping[str, Any]:
    """The arguments of an unfinished run in a folder."""
    if not (folder / RUN_FILE).is_file() or (folder / RESULTS_FILE).is_file():
        return {}
    found: Mapping[str, Any] = read_json(folder / RUN_FILE).get("arguments", {})
    return found


def _share(warmup: float | None) -> str:
    return f" (the first {warmup:.0%} of the steps)" if warmup is not None and 0 < warmup < 1 else ""
