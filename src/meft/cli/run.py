"""`meft run`: starts a program, and makes the model of every Trainer in it reversible."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meft.errors import ConfigError
from meft.integrations import startup
from meft.integrations.environment import MADE, OPTIONS
from meft.options import FUNCTION, WithOptions, checked, option_dataclass, options_of
from meft.parsing import parse

from .console import say

_USAGE = (
    "Write the options, then --, then the program with its own arguments, as in "
    "meft run --gamma 0.03125 -- trl sft --model_name_or_path MODEL --dataset_name DATA"
)


@option_dataclass(options_of(FUNCTION).values(), lambda option: None)
class RunArguments(WithOptions):
    """How the model is made reversible. None is an option that was left out, the word "none" an option that is None."""

    _argument_group_name = "options of make_reversible"

    def options(self) -> dict[str, Any]:
        """All options, as `make_reversible` takes them.

        Raises:
            ConfigError: one is not valid by itself.
        """
        known = options_of(FUNCTION)
        words = {name: getattr(self, name) for name in known}
        return checked(
            FUNCTION,
            {name: known[name].default if word is None else known[name].read(word) for name, word in words.items()},
        )


def run_command(words: Sequence[str], *, description: str | None = None) -> int:
    """Runs a program to its end.

    Args:
        words: options, `--`, the program and its arguments.
        description: what `--help` says of the command.

    Returns:
        The program's exit code; 128 and the number of the signal that ended it.

    Raises:
        ConfigError: there is no program, or an option is not valid.
    """
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    program = words[end + 1 :]
    if not program and not {"-h", "--help"} & set(words[:end]):
        given = f"'meft run {' '.join(words)}'".replace(" '", "'")
        raise ConfigError(f"{given} names no program behind '--'. {_USAGE}.")
    # Before the program starts, so that what is not valid shows here and not in one of its processes.
    (arguments,) = parse((RunArguments,), words[:end], command="run", description=f"{description} {_USAGE}.")
    # Not at the head: it imports the Trainer, which --help does not need.
    from meft.integrations.reversible import Conversion

    options = Conversion("meft run", arguments.options()).options
    if shutil.which(program[0]) is None:
        raise ConfigError(f"No program {program[0]!r} was found. {_USAGE}.")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        code = _run(program, {OPTIONS: json.dumps(options), MADE: str(made)})
        if code == 0 and not made.exists():
            say(
                f"Warning: {program[0]} made no Trainer of Transformers, so nothing was reversible. Programs with a "
                "training loop of their own need meft.make_reversible(model) in it."
            )
    return code


def _run(program: Sequence[str], settings: dict[str, str]) -> int:
    path = os.pathsep.join([str(Path(startup.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(program, env={**os.environ, **settings, "PYTHONPATH": path})
    # Ctrl-C reaches the program by itself, which may take its time to save; other ways to end are handed on.
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
