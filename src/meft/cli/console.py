"""How commands speak."""

from __future__ import annotations

from rich.console import Console


def say(text: str) -> None:
    """Says something on standard error, so that what a command prints can be piped."""
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
