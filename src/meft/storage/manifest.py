"""The manifest of a checkpoint: every file of it, by name, size and digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meft.errors import CheckpointError

from .claims import read_object, require

MANIFEST = "checkpoint.json"


def manifest_of(folder: Path, *, resumable: bool) -> dict[str, Any]:
    """The name, size in bytes and SHA-256 of every file in `folder`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    content = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    return {"resumable": resumable, "files": content}


def check_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Compares the files of a checkpoint with its manifest.

    Raises:
        CheckpointError: One is missing, or has another size or digest than when it was written.
    """
    for name, said in files.items():
        # Version 0.1.0 wrote the size alone.
        said = said if isinstance(said, dict) else {"bytes": said}
        size = require(folder / MANIFEST, name, said.get("bytes"), int)
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing from its checkpoint. Resume from an earlier checkpoint.")
        actual = path.stat().st_size
        if actual != size:
            raise CheckpointError(
                f"{path} has {actual} bytes, {size} were written. Copy it again or resume from an earlier checkpoint."
            )
        if "sha256" in said and sha256(path) != said["sha256"]:
            raise CheckpointError(
                f"{path} is not what was written: its SHA-256 is another. Copy it again or resume from an earlier "
                "checkpoint."
            )


def check_weights_as_written(folder: Path) -> None:
    """Compares the weights in a folder with its manifest, where it is a checkpoint.

    Raises:
        CheckpointError: As of `check_files`.
    """
    if (folder / MANIFEST).is_file():
        files = read_object(folder / MANIFEST, {"files": dict})["files"]
        check_files(folder, {name: said for name, said in files.items() if name.endswith(".safetensors")})


def sha256(path: Path) -> str:
    """The digest of a file's content."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()
