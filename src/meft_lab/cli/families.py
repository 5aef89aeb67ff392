"""`meft families`: tries families of models with the installed libraries, and prints what works."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from meft.errors import ConfigError
from meft.parsing import option
from meft.storage.files import write_text
from meft.storage.terminal import progress_bar
from meft_lab.families.catalogue import CATALOGUE
from meft_lab.families.matrix import Row, families_of, matrix
from meft_lab.families.report import markdown, report

_FILE_WIDTH = 200


@dataclass
class FamiliesArguments:
    """What is tried, and how it is shown."""

    _argument_group_name = "families"

    model_type: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Model types of Transformers, such as llama. Left out: the whole catalogue.",
            "several": True,
        },
    )
    markdown: bool = option("Print the page of the documentation.", False)
    output: str | None = option("A file to write instead of printing.")


def families_command(
    model_types: Sequence[str] = (), *, as_markdown: bool = False, output: str | None = None, command: str = ""
) -> int:
    """Runs `meft families`.

    Example:
        >>> families_command(["llama", "bert"])
        0

    Args:
        model_types: as in `config.model_type`, each entry one or several separated by commas or blanks; none for the
            whole catalogue.
        as_markdown: print or write the page of the documentation instead of the table.
        output: a file to write instead of printing.
        command: the command line, for the record.

    Returns:
        0; 1 if a check failed, or a model type that was asked for could not be tried.

    Raises:
        ConfigError: Transformers has no such model type, or the file cannot be written.
    """
    asked = [name for words in model_types for name in words.replace(",", " ").split()]
    if output is not None:
        _check_output(output)
    families = families_of(asked) if asked else list(CATALOGUE.values())
    notes = Console(stderr=True, highlight=False)
    with progress_bar(notes, width=32) as progress, torch.random.fork_rng():
        task = progress.add_task("trying", total=len(families))
        rows = matrix(families, lambda row: progress.update(task, advance=1, description=row.family.name))
    if output is None:
        _print(rows, as_markdown, command)
    else:
        write_text(Path(output), markdown(rows, command) if as_markdown else _text(rows))
        notes.print(f"Saved {output}.", soft_wrap=True)
    for row in rows:
        for name, detail in row.failures.items():
            notes.print(f"Failed: {row.family.name}, {name}: {detail}", markup=False, soft_wrap=True)
        if asked and row.problem:
            notes.print(f"Not tried: {row.family.name}: {row.problem}", markup=False, soft_wrap=True)
    return 1 if any(row.failures or (asked and row.problem) for row in rows) else 0


def _print(rows: Sequence[Row], as_markdown: bool, command: str) -> None:
    if as_markdown:
        print(markdown(rows, command), end="")
    else:
        Console().print(report(rows))


def _text(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    Console(file=text, width=_FILE_WIDTH, color_system=None).print(report(rows))
    return text.getvalue()


def _check_output(output: str) -> None:
    """Better refused now than after minutes."""
    path = Path(output)
    if path.is_dir() or not path.resolve().parent.is_dir():
        wrong = "is a folder" if path.is_dir() else "lies in a folder that does not exist"
        raise ConfigError(f"output is {output!r}, which {wrong}. Give --output the name of a file to write.")
