"""Learning rate, warm-up and logging where they are left out: what suits the method and the kind of task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meft.methods.registry import Way

from .arguments import TrainerArguments
from .kinds.base import Say
from .runs import RESULTS_FILE, RUN_FILE, read_run

LINES = 20
"""How often the loss is printed in a run."""


def suit(arguments: TrainerArguments, way: Way, task_type: str | None, folder: Path, say: Say) -> None:
    """Sets the learning rate that was left out, with a warm-up that goes with it, and says which.

    A learning rate that was given means what it says: nothing is set beside it. A run that goes on keeps what it began
    with.

    Args:
        arguments: Changed in place; what was given is not touched.
        way: How the model is trained.
        task_type: PEFT's type of the task.
        folder: The output folder.
        say: Called with the sentence.
    """
    if "learning_rate" not in arguments.left_out:
        return
    began = _began(folder)
    rate, warmup = way.method.suited(task_type)
    arguments.learning_rate = began.get("learning_rate", rate)
    if "warmup_steps" in arguments.left_out:
        arguments.warmup_steps = began.get("warmup_steps", warmup)
    rise = _rise(arguments.warmup_steps or 0)
    say(f"Learning rate {arguments.learning_rate:g}{rise}, which suits {way.name}; --learning_rate sets another.")


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
    found: Mapping[str, Any] = read_run(folder)["arguments"]
    return found


def _rise(warmup: float) -> str:
    if not warmup:
        return ""
    return f", reached over the first {f'{warmup:.0%} of the' if warmup < 1 else f'{warmup:g}'} steps"
