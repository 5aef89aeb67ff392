"""The commands: their list, and what each does with the words after its name.

A command is a function of the words and of the whole command line, for records. It returns an exit code, or None for
0. Packages add theirs through the entry points of the group "meft.commands": each is called with the `Commands`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any

from rich.console import Console
from rich.table import Table

from meft.errors import ConfigError, InterruptedRunError

from .console import say

Command = Callable[[Sequence[str], str], int | None]


class Commands:
    """Commands by name."""

    def __init__(self, commands: Sequence[Command] = ()) -> None:
        self.known: dict[str, Command] = {}
        for command in commands:
            self.add(command)

    def add(self, command: Command) -> None:
        """Adds a command, called as its function is, with hyphens; its first line stands in `meft --help`."""
        self.known[command.__name__.replace("_", "-")] = command

    def run(self, words: Sequence[str], line: str) -> int:
        """Runs a command line without the program's name, and returns the exit code.

        Raises:
            ConfigError: There is no such command.
        """
        if not words or words[0] in ("-h", "--help"):
            self.show()
            return 0 if words else 2
        command = self.known.get(words[0])
        if command is None:
            close = get_close_matches(words[0], self.known, n=1)
            advice = f"Did you mean {close[0]!r}?" if close else f"The commands are {', '.join(self.known)}."
            raise ConfigError(f"No such command {words[0]!r}. {advice} meft --help says what each does.")
        return command(words[1:], line) or 0

    def show(self) -> None:
        """Prints what there is."""
        console = Console(highlight=False)
        console.print("Usage: meft COMMAND [--name value ...]\n", markup=False)
        console.print("Memory-efficient fine-tuning of pretrained transformers.\n")
        table = Table(box=None, show_header=False, padding=(0, 2))
        for name, command in self.known.items():
            table.add_row(f"[bold]{name}[/bold]", (inspect.getdoc(command) or "").split("\n")[0])
        console.print(table)
        console.print("\nmeft COMMAND --help lists its arguments. --traceback shows where an error came from.")


def train(words: Sequence[str], line: str) -> None:
    """Fine-tune a model on your own chats, texts or labels, or on a task known by name."""
    arguments: Any = None
    try:
        from meft.parsing import parse
        from meft.storage.results import summary_table
        from meft.training import TRAIN_TYPES
        from meft.training import train as run

        arguments = parse(TRAIN_TYPES, words, command="train", description=train.__doc__)
        found = run(*arguments, command=line, say=say)
    except KeyboardInterrupt:
        raise InterruptedRunError(_kept(arguments)) from None
    folder = arguments[-1].output_dir
    if arguments[-1].process_index == 0:
        Console().print(summary_table(found))
        if found["verdict"]:
            say(found["verdict"])
        say(f"Saved to {folder}{_next(found, folder)}")


def _kept(arguments: Any) -> str:
    """What an interrupted run has left, which may have been interrupted before its arguments were read."""
    if arguments is None:
        return "Nothing was trained yet; the same command begins where this one did."
    from meft.training import what_is_kept

    return what_is_kept(arguments[-1].output_dir)


def _next(found: Mapping[str, Any], folder: str) -> str:
    return f"; to try it: meft chat {folder}" if found["task"] in ("conversations", "completions", "text") else ""


def evaluate(words: Sequence[str], line: str) -> None:
    """Score a trained model or adapter: meft evaluate FOLDER."""
    from meft.storage.results import metrics_table
    from meft.training.evaluation import evaluate as run
    from meft.training.evaluation import parse_evaluation

    arguments = parse_evaluation(words, description=evaluate.__doc__)
    metrics = run(*arguments, say=say)
    if metrics:
        Console().print(metrics_table(metrics, title=arguments[0].model_name_or_path))


def chat(words: Sequence[str], line: str) -> None:
    """Talk to a language model that was trained: meft chat FOLDER."""
    from meft.parsing import parse

    from .chat import ChatArguments, chat_command

    chat_command(*parse((ChatArguments,), words, command="chat", description=chat.__doc__))


def verify(words: Sequence[str], line: str) -> int:
    """Check that a model's activations are rebuilt bit for bit, and its gradients with them."""
    from .verify import verify_command

    return verify_command(words, command=line, description=verify.__doc__)


def doctor(words: Sequence[str], line: str) -> int:
    """Say whether a model's layers return the same bits twice on this machine: meft doctor MODEL."""
    from .doctor import doctor_command

    return doctor_command(words, description=doctor.__doc__)


def export(words: Sequence[str], line: str) -> None:
    """Write a trained model or adapter into a folder that loads by itself; LoRA becomes a plain model."""
    from meft.parsing import parse

    from .export import ExportArguments, export_command

    export_command(*parse((ExportArguments,), words, command="export", description=export.__doc__))


def estimate(words: Sequence[str], line: str) -> int:
    """Predict the memory of a training step, by method, without weights and without a GPU."""
    from meft.methods.arguments import OptionArguments
    from meft.parsing import parse

    from .estimate import EstimateArguments, estimate_command

    types = (EstimateArguments, OptionArguments)
    return estimate_command(*parse(types, words, command="estimate", description=estimate.__doc__), command=line)


def run(words: Sequence[str], line: str) -> int:
    """Start a program that trains (meft run -- trl sft ...), and make the model of every Trainer in it reversible."""
    from .run import run_command

    return run_command(words, description=run.__doc__)


def all_commands() -> Commands:
    """Those of the library, and those of installed packages."""
    commands = Commands((train, evaluate, chat, verify, doctor, export, estimate, run))
    for point in entry_points(group="meft.commands"):
        point.load()(commands)
    return commands
