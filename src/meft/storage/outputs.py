"""Places that are to be written to, looked at before anything is computed, and the errors of writing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from meft.errors import ConfigError, MeftError, OutputFolderError, WriteError

_NUMBER = re.compile(r"os error (\d+)")


def check_output_file(option: str, path: str | Path) -> Path:
    """Refuses a file that could not be written at the end, before there is anything to write.

    Args:
        option: The argument that names it, for messages.
        path: The file, which may be there already.

    Raises:
        ConfigError: Its folder is not there or cannot be written to, or the path is a folder or another thing.
    """
    place = Path(path)
    folder = place.resolve().parent if not place.is_symlink() else place.parent
    if not place.name or place.is_dir():
        raise ConfigError(f"{option} is {str(path)!r}, which is a folder. Give a file.")
    if not folder.is_dir():
        raise ConfigError(f"The folder of {str(path)!r} does not exist. Create it, or choose another.")
    if (place.exists() and not place.is_file()) or (place.is_symlink() and not place.exists()):
        raise ConfigError(f"{option} is {str(path)!r}, which is no regular file. Give another.")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{option} is {str(path)!r}, in a folder that cannot be written to. Give another.")
    return place


def check_output_folder(folder: Path) -> None:
    """Refuses a folder for output that can be neither used nor made.

    Raises:
        OutputFolderError: It is a file or a link to nothing, or it or its parent is a file or cannot be written to.
    """
    if folder.is_symlink() and not folder.exists():
        raise OutputFolderError(
            f"output_dir is {str(folder)!r}, a link to {os.readlink(folder)!r}, which does not exist. Make that folder "
            "or choose another --output_dir."
        )
    there = folder
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        what = "which is a file" if there == folder else f"but {str(there)!r} is a file"
        raise OutputFolderError(f"output_dir is {str(folder)!r}, {what}. Choose another --output_dir.")
    if not os.access(there, os.W_OK | os.X_OK) or _read_only(there):
        raise OutputFolderError(
            f"output_dir is {str(folder)!r}, and {str(there)!r} cannot be written to. Choose another --output_dir."
        )


@contextmanager
def writing(place: Path, advice: str = "") -> Iterator[None]:
    """Says what could not be written, and why, in place of an error number.

    Raises:
        WriteError: The disk is full or read-only, or the place cannot be written to.
    """
    try:
        yield
    except MeftError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise WriteError(
            f"{place} could not be written: {reason}. Nothing half-written was left under that name. "
            f"{advice or 'Make room, or choose another place.'}"
        ) from error


def _reason(error: Exception) -> str | None:
    """Why something was not written; None for errors of another kind."""
    text = str(error)
    if isinstance(error, OSError):
        return error.strerror or text
    if isinstance(error, SafetensorError):
        found = _NUMBER.search(text)
        return os.strerror(int(found[1])) if found else text
    # PyTorch's writer does not say why.
    written = "PytorchStreamWriter" in text or "iostream" in text
    return "the disk is full or cannot be written to" if written else None


def _read_only(folder: Path) -> bool:
    return hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
