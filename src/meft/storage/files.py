"""Writing files and folders so that a kill at any moment leaves the old or the new, never half of one.

Everything is written beside its place, forced to disk, and then renamed: a rename inside one filesystem is atomic.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meft.errors import CheckpointError, MeftError, OutputFolderError

from .claims import read_json as read_json
from .manifest import check_weights_as_written
from .outputs import writing

STAGING_PREFIX = ".saving-"
DISCARD_PREFIX = ".removing-"


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    beside = path.with_name(f"{STAGING_PREFIX}{path.name}")
    with writing(path):
        try:
            beside.write_text(text, encoding="utf-8")
            _sync(beside)
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically; a number that JSON has no name for (nan) is refused with `ValueError`."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """The same with `None` for numbers that JSON has no name for, in mappings and lists too."""
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_kind(path: Path, kind: str) -> bool:
    """Whether a file is a result of `meft`'s own that calls itself `kind`."""
    try:
        content = read_json(path)
    except (MeftError, OSError):
        return False
    return isinstance(content, dict) and content.get("kind") == kind


@contextmanager
def staged(folder: Path, name: str) -> Iterator[Path]:
    """An empty folder inside `folder` to write into; whatever is left of it at the end is removed."""
    staging = folder / f"{STAGING_PREFIX}{name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish_folder(staging: Path, place: Path) -> None:
    """Renames a written folder to `place`, replacing a folder that stands there.

    A replaced folder is first renamed away. A kill between the two renames leaves neither under the name; callers
    replace only folders that are unusable already.
    """
    _sync_tree(staging)
    if place.exists():
        old = place.with_name(f"{DISCARD_PREFIX}{place.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(place, old)
        os.replace(staging, place)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(staging, place)
    _sync(place.parent)


def publish_new_folder(staging: Path, place: Path) -> None:
    """Renames a written folder to `place`, which is not there or empty.

    Raises:
        OutputFolderError: Somebody else has filled it meanwhile; what they wrote stays.
    """
    _sync_tree(staging)
    try:
        if os.name == "nt" and place.is_dir():
            place.rmdir()
        os.rename(staging, place)
    except OSError as error:
        if place.is_dir() and any(place.iterdir()):
            raise OutputFolderError(
                f"output_dir is {str(place)!r}, which another process has written to meanwhile. What it wrote was not "
                "changed. Choose another folder."
            ) from error
        raise
    _sync(place.parent)


def publish_files(staging: Path, folder: Path, last: tuple[str, ...]) -> None:
    """Renames the files of `staging` into `folder`, the names in `last` after all others.

    With the file that makes a folder loadable (`config.json`) last, a kill in between leaves nothing that loads as
    half a model.
    """
    _sync_tree(staging)
    for path in sorted(staging.iterdir(), key=lambda path: (path.name in last, path.name)):
        os.replace(path, folder / path.name)
    _sync(folder)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process left of unfinished writes and removals."""
    for path in folder.iterdir():
        if path.name.startswith((STAGING_PREFIX, DISCARD_PREFIX)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_weights(folder: Path) -> None:
    """Looks at the weights of a model or an adapter before they are loaded.

    Raises:
        CheckpointError: A safetensors file is not whole or, in a checkpoint, not as it was written; or there are
            pickled weights only.
    """
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    for path in found:
        check_safetensors(path)
    check_weights_as_written(folder)
    pickled = [path.name for ending in _PICKLED for path in sorted(folder.glob(ending))] if not found else []
    if pickled:
        raise CheckpointError(
            f"{folder} has its weights in {pickled[0]}, a pickle, which can run code when it is read. Weights are read "
            "from safetensors files only: load the model where you trust it and save it anew with save_pretrained."
        )


def check_safetensors(path: Path) -> None:
    """Compares the size of a safetensors file with what its header promises.

    Raises:
        CheckpointError: The file is shorter or longer, or its header cannot be read.
    """
    actual = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = file.read(length) if 8 + length <= actual else b""
    if len(header) < max(length, 1):
        raise CheckpointError(
            f"{path} is truncated: {actual} bytes, of which its header alone should take {8 + length}. {_REMEDY}"
        )
    try:
        tensors = json.loads(header)
        ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header cannot be read. {_REMEDY}") from error
    expected = 8 + length + max(ends, default=0)
    if actual != expected:
        state = "truncated" if actual < expected else "damaged"
        raise CheckpointError(f"{path} is {state}: {actual} bytes, its header promises {expected}. {_REMEDY}")


_PICKLED = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth", "*.ckpt")
_REMEDY = "Copy or download it again, or use an earlier checkpoint."


def _sync_tree(folder: Path) -> None:
    for directory, _, names in os.walk(folder):
        for name in names:
            _sync(Path(directory, name))
        _sync(Path(directory))


def _sync(path: Path) -> None:
    """Forces a file or a folder's entries to disk; without it a power cut can undo a rename or empty a file."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle of a folder to be flushed
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
