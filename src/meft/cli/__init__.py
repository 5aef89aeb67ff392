"""The command line: finds the command, and says what went wrong in one sentence."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from meft.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InterruptedRunError,
    MeftError,
    MissingPackageError,
    OutputFolderError,
    UnsupportedModelError,
    first_line,
)

from .commands import all_commands
from .console import say

BAD_INPUT = (
    ConfigError,
    DataError,
    CheckpointError,
    OutputFolderError,
    UnsupportedModelError,
    MissingPackageError,
)


_EXTRAS = {name: "train" for name in ("datasets", "trl", "yaml", "sklearn", "scipy", "pyarrow")}
"""What brings a package that is not installed, by the package."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `meft` and exits: 0 when all went well, 2 for bad input, 1 for any other failure, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in words or os.environ.get("MEFT_TRACEBACK", "0") not in ("", "0")
    words = [word for word in words if word != "--traceback"]
    _quiet_libraries()
    try:
        sys.exit(all_commands().run(words, shlex.join(["meft", *words])))
    except MeftError as error:
        if show_traceback:
            raise
        _complain(error)
        sys.exit(2 if isinstance(error, BAD_INPUT) else 1)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(str(error.name).partition(".")[0])
        if show_traceback or extra is None:
            raise
        _complain(
            f'meft {words[0]} needs {error.name}, which is not installed. Install it with: pip install "meft[{extra}]"'
        )
        sys.exit(2)
    except InterruptedRunError as error:
        _complain(f"Interrupted. {error}")
        sys.exit(130)
    except KeyboardInterrupt:
        _complain("Interrupted.")
        sys.exit(130)
    except Exception as error:
        if show_traceback:
            raise
        _complain(_unforeseen(error))
        sys.exit(1)


def _unforeseen(error: Exception) -> str:
    """A sentence about an error that is none of meft's own."""
    said = first_line(error)
    if isinstance(error, ImportError):
        return f"{said} Install it, or leave out the option that needs it."
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror}."
    return f"{type(error).__name__}: {said} Run the same command with --traceback to see where it came from."


def _complain(problem: Any) -> None:
    console = Console(stderr=True, highlight=False)
    console.print("Error: ", style="bold red", end="")
    # Texts of others may hold what a terminal cannot show.
    text = str(problem).encode("utf-8", "backslashreplace").decode()
    console.print(text, markup=False, soft_wrap=True)


def _quiet_libraries() -> None:
    """Shows warnings as one sentence, and not at all where they speak to the developers of other libraries."""
    # PyTorch's C++ reads it when it is loaded; its profiler, which counts memory, speaks of the block of a step before.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.showwarning = lambda message, *_, **__: say(f"Warning: {message}")
