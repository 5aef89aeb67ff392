"""The errors of `meft`, one tree under `MeftError`.

Every message says what was wrong, the value received, what is valid and what to do. Each class is also the
builtin type a caller would expect, so `except ValueError` and `except RuntimeError` keep working.
"""

from __future__ import annotations


class MeftError(Exception):
    """Base class of every error raised by `meft`."""


class ConfigError(MeftError, ValueError):
    """An option has a value that is not valid, alone or beside the others."""


class UnsupportedModelError(MeftError, ValueError):
    """The model cannot be made reversible, or does something between its layers that would be lost."""


class ReconstructionError(MeftError, RuntimeError):
    """A rebuilt activation differs from the original in exact arithmetic."""


class ConsumedTapeError(MeftError, RuntimeError):
    """The backward pass needs streams that are gone or out of order (second or partial backward)."""


class DoubleBackwardError(MeftError, RuntimeError):
    """Gradients of gradients were asked for through a reversible layer."""


class ModifiedTensorError(MeftError, RuntimeError):
    """A weight or input changed between the forward pass and its recomputation."""


class StreamOverflowError(MeftError, OverflowError):
    """A hidden state is too large, or not finite, for the fixed-point streams."""


class DataError(MeftError, ValueError):
    """A dataset lacks a column, a label is out of range, or a file has another layout."""


class CheckpointError(MeftError, RuntimeError):
    """Saved weights are truncated, unreadable, or belong to another model."""


class OutputFolderError(MeftError, FileExistsError):
    """The output folder holds another run that must not be overwritten."""


class BusyFolderError(OutputFolderError):
    """Another process is at work in the output folder right now."""


class WriteError(MeftError, OSError):
    """A file cannot be written: the disk is full or read-only, or the place is not there any more."""


class MissingPackageError(MeftError, ImportError):
    """A package that only some commands need is not installed."""


class MeftWarning(UserWarning):
    """Something the user asked for was switched off, with the reason."""


class DriftWarning(MeftWarning):
    """Float arithmetic rebuilt an activation worse than `drift_tolerance` allows."""


class DistantStartWarning(MeftWarning):
    """A coupled model begins far from the plain one."""


class MaterializedLogitsWarning(MeftWarning):
    """Logits whose loss could be taken in tiles were made whole."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, as a sentence; its type where it has none.

    A line that ends in a colon only announces the next.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if text.endswith(":") and len(lines) > 1:
        text = f"{text} {lines[1]}"
    return text if text.endswith(".") else f"{text}."


class InterruptedRunError(Exception):
    """Ctrl-C in a training; the text says what is kept."""
