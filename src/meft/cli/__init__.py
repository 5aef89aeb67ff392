"""The command line: parse, call, print."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from rich.console import Console

from meft.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InterruptedRunError,
    MeftError,
    MissingPackageError,
    OutputFolderError,
    UnsupportedModelError,
)
from meft.options import METHOD, options_of

from .console import say

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


@app.command(context_settings=_PASS_ON, add_help_option=False)
def train(context: typer.Context) -> None:
    """Fine-tune a model on texts, questions or images: a task known by name, or your own files."""
    from meft.storage.results import summary_table
    from meft.training import TRAIN_TYPES
    from meft.training import train as run
    from meft.training.arguments import parse

    arguments = parse(TRAIN_TYPES, context.args, command="train")
    try:
        found = run(*arguments, command=context.obj, say=say)
    except KeyboardInterrupt:
        raise InterruptedRunError from None
    if arguments[-1].process_index == 0:
        Console().print(summary_table(found))
        say(f"Saved to {arguments[-1].output_dir}")


@app.command(context_settings=_PASS_ON, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Score a trained model or adapter."""
    from meft.storage.results import metrics_table
    from meft.training.evaluation import evaluate as run
    from meft.training.evaluation import parse_evaluation

    arguments = parse_evaluation(context.args)
    metrics = run(*arguments, say=say)
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
    sys.exit(estimate_command(**given, methods=method, json=json, extra=context.args, command=context.obj))


def _add_commands() -> None:
    """Adds the commands of installed packages: each entry point of "meft.commands" is given the application."""
    for point in entry_points(group="meft.commands"):
        point.load()(app)


_add_commands()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `meft` and exits: 0 when all went well, 2 for bad input, 1 for any other failure, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in words or os.environ.get("MEFT_TRACEBACK", "0") not in ("", "0")
    words = [word for word in words if word != "--traceback"]
    _quiet_libraries()
    try:
        app(args=words, prog_name="meft", obj=shlex.join(["meft", *words]))
    except (MeftError, OSError) as error:
        if show_traceback:
            raise
        _complain(error)
        sys.exit(2 if isinstance(error, BAD_INPUT) else 1)
    except InterruptedRunError:
        _complain("Interrupted. The same command goes on from the newest checkpoint.")
        sys.exit(130)


def _complain(problem: Any) -> None:
    console = Console(stderr=True, highlight=False)
    console.print("Error: ", style="bold red", end="")
    console.print(str(problem), markup=False, soft_wrap=True)


def _quiet_libraries() -> None:
    """Shows warnings as one sentence, and not at all where they speak to the developers of other libraries."""
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.showwarning = lambda message, *_, **__: say(f"Warning: {message}")
