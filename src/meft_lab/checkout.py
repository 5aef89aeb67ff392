"""Which commit of the project is running."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path


@cache
def commit(folder: str | Path = Path(__file__).parent) -> str | None:
    """The commit that is checked out there, with "+" behind it where tracked files differ; `None` outside of git."""

    def git(*words: str) -> str:
        found = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
        return found.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
