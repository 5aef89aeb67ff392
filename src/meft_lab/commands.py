"""The laboratory's commands, which `meft` finds through the entry point "meft.commands".

Nothing of the laboratory is imported before one of them runs.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from meft.errors import InterruptedRunError

# These commands hand their words on to the parser of Transformers, which knows the Trainer's arguments.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def add_commands(app: typer.Typer) -> None:
    """Adds sweep, study, families and demo to the command line."""
    app.command(context_settings=_PASS_ON)(sweep)
    app.command(context_settings=_PASS_ON, add_help_option=False)(study)
    app.command()(families)
    app.command()(demo)


def sweep(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that comes with meft.")],
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", help="Folder of all runs; left out: runs/<recipe>.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry_run", help="List the runs, and run none.")] = False,
) -> None:
    """Run every combination of a recipe, go on where it stopped, and write one table.

    Arguments of meft train follow and hold for every run: --model_name_or_path, --data_dir, and so on. The name of an
    axis of the recipe narrows it: --task rte mrpc --seeds 0.
    """
    from meft_lab.cli.sweep import sweep_command

    try:
        code = sweep_command(recipe, context.args, output_dir=output_dir, dry_run=dry_run, command=context.obj)
    except KeyboardInterrupt:
        raise InterruptedRunError from None
    sys.exit(code)


def study(context: typer.Context) -> None:
    """Answer one of the paper's questions with a table and a figure; meft study --help lists them."""
    from meft_lab.cli.study import study_command

    try:
        code = study_command(context.args, command=context.obj)
    except KeyboardInterrupt:
        raise InterruptedRunError from None
    sys.exit(code)


def demo(
    context: typer.Context,
    output_dir: Annotated[str, typer.Option("--output_dir", help="Folder for the table and the figure.")] = "demo",
    methods: Annotated[str, typer.Option("--methods", help="Which methods to run, separated by blanks.")] = "",
    steps: Annotated[int, typer.Option("--steps", help="Training steps of each method; 0 for the usual.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything drawn at random.")] = 0,
) -> None:
    """Train a real BERT on your own Python library by every method side by side; needs no network."""
    from meft_lab.demo import run

    chosen: dict[str, Any] = {"methods": methods.split()} if methods else {}
    chosen |= {"steps": steps} if steps else {}
    run(output_dir, seed=seed, command=context.obj, **chosen)


def families(
    context: typer.Context,
    model_type: Annotated[
        list[str] | None,
        typer.Option("--model_type", help="A model type of Transformers, such as llama; any number of times."),
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the page of the documentation.")] = False,
    output: Annotated[str | None, typer.Option("--output", help="A file to write instead of printing.")] = None,
) -> None:
    """Try families of models, and any model type of Transformers, with the libraries installed here."""
    from meft_lab.cli.families import families_command

    sys.exit(families_command(model_type or (), as_markdown=as_markdown, output=output, command=context.obj))
