"""`meft sweep`: runs a recipe and writes one table."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from meft.errors import ConfigError
from meft.parsing import option
from meft.storage.figures import save_figure
from meft.storage.files import write_json, write_text
from meft.storage.results import provenance
from meft.storage.terminal import progress_bar
from meft_lab.checkout import commit
from meft_lab.sweep import Outcome, Recipe, Run, Sweep, csv_text, load_recipe, markdown, table_of
from meft_lab.sweep.figure import scores_figure

TABLE_FILES = ("table.json", "table.md", "table.csv", "table.svg")


@dataclass
class SweepArguments:
    """Which recipe is run, and where."""

    _argument_group_name = "sweep"

    recipe: str = field(
        metadata={"help": "A YAML file, or the name of a recipe that comes with meft.", "positional": True}
    )
    output_dir: str | None = option("Folder of all runs. Left out: runs/<recipe>.")
    dry_run: bool = option("List the runs, and run none.", False)
    table_only: bool = option("Write the table of what is finished, and run nothing.", False)


def sweep_command(
    recipe: str,
    words: Sequence[str] = (),
    *,
    output_dir: str | None = None,
    dry_run: bool = False,
    table_only: bool = False,
    command: str = "",
) -> int:
    """Runs `meft sweep`.

    Example:
        >>> sweep_command("glue-roberta", ["--task", "rte", "--data_dir", "glue"], output_dir="runs/rte")
        0

    Args:
        recipe: A file, or the name of a recipe that comes with `meft`.
        words: What was typed beside it: `--name value ...`.
        output_dir: The folder of the sweep; `runs/<recipe>` when left out.
        dry_run: List the runs, and run none.
        table_only: Write the table of what is finished, and run none.
        command: The command line, for the records.

    Returns:
        0; 1 if a run failed.

    Raises:
        ConfigError: Recipe or words are not valid.
        OutputFolderError: A run's folder holds another run.
    """
    notes = Console(stderr=True, highlight=False)
    chosen = load_recipe(recipe, typed_values(words))
    folder = Path(output_dir or Path("runs", chosen.name))
    with notes.status("Checking every run's arguments"):
        sweep = Sweep(chosen, folder, say=lambda text: notes.print(text, markup=False, soft_wrap=True))
    if dry_run:
        _list_runs(sweep)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    if table_only:
        print(_write(chosen, sweep.outcome(), folder, command), end="")
        return 0
    with progress_bar(notes, remaining=False) as progress:
        bar = progress.add_task(chosen.name, total=sweep.planned(), completed=len(sweep.outcome().finished))

        def finished_one() -> None:
            outcome = sweep.outcome()
            _write(chosen, outcome, folder, command)
            progress.update(bar, completed=len(outcome.finished) + len(outcome.failed))

        outcome = sweep.run(finished_one, command=command)
    text = _write(chosen, outcome, folder, command)
    print(text, end="")
    notes.print(f"Saved {', '.join(TABLE_FILES)} in {folder}", soft_wrap=True)
    if outcome.failed:
        notes.print(f"{len(outcome.failed)} runs failed; the same command tries them again.", soft_wrap=True)
    return 1 if outcome.failed else 0


def typed_values(words: Sequence[str]) -> dict[str, list[str]]:
    """Values by name from `--name value ...` and `--name=value`; a name without a value is a switch that is on.

    Raises:
        ConfigError: A value stands before any name, or a name stands twice.
    """
    found: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            given, _, value = word[2:].partition("=")
            name = given.replace("-", "_")
            if name in found:
                raise ConfigError(f"--{name} stands twice; give its values after one: --{name} first second.")
            found[name] = [value] if value else []
        elif name is None:
            raise ConfigError(f"{word!r} stands after the recipe without a name. Arguments are given as --name value.")
        else:
            found[name].append(word)
    return {name: values or ["true"] for name, values in found.items()}


def _write(recipe: Recipe, outcome: Outcome, folder: Path, command: str) -> str:
    table = table_of(recipe, outcome) | provenance(command) | {"commit": commit()}
    text = markdown(table)
    write_json(folder / "table.json", table)
    write_text(folder / "table.md", text)
    write_text(folder / "table.csv", csv_text(table))
    save_figure(scores_figure(table), folder / "table.svg")
    return text


def _list_runs(sweep: Sweep) -> None:
    for run in sweep.looked_at():
        print(f"{run.title}: {_state(run)}: {shlex.join(['meft', 'train', *run.words()])}")
    recipe, outcome = sweep.recipe, sweep.outcome()
    known = {run.title: run for run in outcome.final}
    for run in known.values():
        print(f"{run.title}: {_state(run)}: {shlex.join(['meft', 'train', *run.words()])}")
    if recipe.choice is not None and len(known) < len(recipe.points()) * len(recipe.seeds):
        axes = ", ".join(recipe.choice.among)
        print(f"Then, with the {axes} chosen by these, every combination of {', '.join(recipe.grid)} and seed.")
    print(f"{sweep.planned()} runs in all, {len(outcome.finished)} finished.")


def _state(run: Run) -> str:
    return "finished" if run.results() is not None else "to do"
