"""The command line: parse, call, print."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from meft.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MeftError,
    MissingPackageError,
    OutputFolderError,
    UnsupportedModelError,
)
from meft.options import METHOD, options_of

BAD_INPUT = (
    ConfigError,
    DataError,
    CheckpointError,
    OutputFolderError,
    UnsupportedModelError,
    MissingPackageError,
)
# These commands hand their words on to the parser of Transformers, which knows the Trainer's arguments.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    name="meft",
    help="Memory-efficient fine-tuning of pretrained transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _InterruptedError(Exception):
    """Ctrl-C in a training; of its own kind because typer makes `Aborted!` of a KeyboardInterrupt."""


@app.command(context_settings=_PASS_ON, add_help_option=False)
def train(context: typer.Context) -> None:
    """Fine-tune a model on texts, questions or images: a task known by name, or your own files."""
    from meft.storage.results import summary_table
    from meft.training import TRAIN_TYPES
    from meft.training import train as run
    from meft.training.arguments import parse

    arguments = parse(TRAIN_TYPES, context.args, command="train")
    try:
        found = run(*arguments, command=_command(context), say=_say)
    except KeyboardInterrupt:
        raise _InterruptedError from None
    if arguments[-1].process_index == 0:
        Console().print(summary_table(found))
        _say(f"Saved to {arguments[-1].output_dir}")


@app.command(context_settings=_PASS_ON, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Score a trained model or adapter."""
    from meft.storage.results import metrics_table
    from meft.training.evaluation import evaluate as run
    from meft.training.evaluation import parse_evaluation

    arguments = parse_evaluation(context.args)
    metrics = run(*arguments, say=_say)
    if metrics:
        Console().print(metrics_table(metrics, title=arguments[0].model_name_or_path))


@app.command(context_settings=_PASS_ON, add_help_option=False)
def verify(context: typer.Context) -> None:
    """Check that a model's activations are rebuilt bit for bit, and its gradients with them."""
    from .verify import verify_command

    sys.exit(verify_command(context.args))


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="The folder of a run or of an adapter.")],
    output_dir: Annotated[str, typer.Option("--output_dir", help="A folder that does not exist or is empty.")],
    base_model_name_or_path: Annotated[
        str | None,
        typer.Option("--base_model_name_or_path", help="The adapter's base, when it is not where the adapter says."),
    ] = None,
    merge: Annotated[
        bool | None,
        typer.Option("--merge/--no-merge", help="Fold the adapter into its base, or keep it beside; left out: if can."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the weights that are written.")] = "auto",
) -> None:
    """Write a trained model or adapter into a folder that loads by itself; LoRA becomes a plain model."""
    from .export import export_command

    export_command(source, output_dir, base_model_name_or_path=base_model_name_or_path, merge=merge, dtype=dtype)


@app.command()
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

    sys.exit(families_command(model_type or (), as_markdown=as_markdown, output=output, command=_command(context)))


@app.command(
    context_settings=_PASS_ON,
    epilog=f"Options of the methods (docs/options.md): {', '.join(f'--{name}' for name in options_of(METHOD))}.",
)
def estimate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A name on the hub, a model's folder, or a config.json.")],
    method: Annotated[str, typer.Option("--method", help="all, or names separated by blanks: lora momentum.")] = "all",
    batch_size: Annotated[int, typer.Option("--batch_size", help="Rows of a batch.")] = 1,
    seq_len: Annotated[int, typer.Option("--seq_len", help="Tokens of a row.")] = 512,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the weights.")] = "bfloat16",
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, sgd, adafactor, ..., none.")] = "adamw",
    task_type: Annotated[str | None, typer.Option("--task_type", help="The head; left out: the model's own.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda; left out: cuda if there is one.")] = None,
    attn_implementation: Annotated[str | None, typer.Option("--attn_implementation", help="sdpa or eager.")] = None,
    padded: Annotated[bool, typer.Option("--padded", help="Batches have padding.")] = False,
    autocast: Annotated[str | None, typer.Option("--autocast", help="Mixed precision to this dtype.")] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="24GiB, say: find the largest that fits.")] = None,
    longest: Annotated[str, typer.Option("--longest", help="What to find: batch or sequence.")] = "batch",
    revision: Annotated[str | None, typer.Option("--revision", help="Of the model on the hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust_remote_code", help="Run the model's own code.")] = False,
    json: Annotated[str | None, typer.Option("--json", help="Write everything that was found to this file.")] = None,
) -> None:
    """Predict the memory of a training step, by method, without weights and without a GPU.

    Options of the methods follow as --lora_rank 16, --bottleneck_dim 64, --frozen_layers 8, and so on.
    """
    from .estimate import estimate_command

    given = {name: value for name, value in context.params.items() if name not in ("method", "json")}
    sys.exit(estimate_command(**given, methods=method, json=json, extra=context.args, command=_command(context)))


@app.command(context_settings=_PASS_ON)
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
        code = sweep_command(recipe, context.args, output_dir=output_dir, dry_run=dry_run, command=_command(context))
    except KeyboardInterrupt:
        raise _InterruptedError from None
    sys.exit(code)


@app.command(context_settings=_PASS_ON, add_help_option=False)
def study(context: typer.Context) -> None:
    """Answer one of the paper's questions with a table and a figure; meft study --help lists them."""
    from meft_lab.cli.study import study_command

    try:
        code = study_command(context.args, command=_command(context))
    except KeyboardInterrupt:
        raise _InterruptedError from None
    sys.exit(code)


@app.command()
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
    run(output_dir, seed=seed, command=_command(context), **chosen)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `meft` and exits: 0 when all went well, 2 for bad input, 1 for any other failure, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in words or os.environ.get("MEFT_TRACEBACK", "0") not in ("", "0")
    words = [word for word in words if word != "--traceback"]
    _quiet_libraries()
    try:
        app(args=words, prog_name="meft", obj=words)
    except (MeftError, OSError) as error:
        if show_traceback:
            raise
        _complain(error)
        sys.exit(2 if isinstance(error, BAD_INPUT) else 1)
    except _InterruptedError:
        _complain("Interrupted. The same command goes on from the newest checkpoint.")
        sys.exit(130)


def _command(context: typer.Context) -> str:
    return shlex.join(["meft", *context.obj])


def _say(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


def _complain(problem: Any) -> None:
    console = Console(stderr=True, highlight=False)
    console.print("Error: ", style="bold red", end="")
    console.print(str(problem), markup=False, soft_wrap=True)


def _quiet_libraries() -> None:
    """Shows warnings as one sentence, and not at all where they speak to the developers of other libraries."""
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.showwarning = lambda message, *_, **__: _say(f"Warning: {message}")
