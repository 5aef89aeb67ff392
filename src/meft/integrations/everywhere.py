"""Puts a `ReversibleCallback` into every Trainer of a process: what `meft run` does to the program that it starts.

Imported by `startup/sitecustomize.py` once `transformers.trainer` has been, in each process of the program.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from meft.backbone.report import found_in

from .environment import MADE, options_given
from .reversible import ReversibleCallback


class _Said(TrainerCallback):
    """Says what became reversible, on standard error and to `meft run`."""

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_local_process_zero:
            print(f"meft run: {found_in(kwargs['model'])}", file=sys.stderr)
        made = os.environ.get(MADE)
        if made:
            Path(made).touch()


def install() -> None:
    """Wraps the constructor of `Trainer`; Trainers with a `ReversibleCallback` of their own keep that."""
    original = Trainer.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Trainer, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        given = list(bound.arguments.get("callbacks") or [])
        own = [each for each in given if isinstance(each, ReversibleCallback) or each is ReversibleCallback]
        bound.arguments["callbacks"] = [*given, *([] if own else [ReversibleCallback(**options_given())]), _Said()]
        original(*bound.args, **bound.kwargs)

    Trainer.__init__ = init  # type: ignore[method-assign]


install()
