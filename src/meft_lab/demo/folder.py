"""The output folder of a demo: whose it is."""

from __future__ import annotations

from pathlib import Path

from meft.errors import OutputFolderError
from meft.storage.files import STAGING_PREFIX, is_kind, staged


def claim(folder: Path, kind: str, results_file: str, *others: str) -> Path:
    """Makes the folder, or sees that what it holds is an earlier demo; changes no file in it.

    Args:
        folder: Where the demo is to write.
        kind: What an earlier demo's results say that they are.
        results_file: Their name.
        others: Further files of a demo, which one that was stopped may have left.

    Raises:
        OutputFolderError: It is a file, holds something else, or cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputFolderError(f"output_dir is {str(folder)!r}, which is a file. Choose another --output_dir.")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if results_file in names:
        ours = is_kind(folder / results_file, kind)
    else:
        ours = all(name in others or name.startswith(STAGING_PREFIX) for name in names)
    if not ours:
        listed = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        raise OutputFolderError(
            f"output_dir is {str(folder)!r}, which holds files that are no earlier demo ({listed}). Nothing was "
            "changed. Choose a folder that is new or empty with --output_dir."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with staged(folder, "demo"):  # better refused now than after minutes of training
            pass
    except OSError as error:
        raise OutputFolderError(
            f"output_dir is {str(folder)!r}, which cannot be written to ({error}). Choose another --output_dir."
        ) from error
    return folder
