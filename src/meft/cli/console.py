"""What commands have in common: how they pass words on, and how they speak."""

from __future__ import annotations

import shlex

import typer
from rich.console import Console

# These commands hand their words on to the parser of Transformers, which knows the Trainer's arguments.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


class InterruptedCommandError(Exception):
    """Ctrl-C in a training; of its own kind because typer makes `Aborted!` of a KeyboardInterrupt."""


def command_line(context: typer.Context) -> str:
    return shlex.join(["meft", *context.obj])


def say(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
