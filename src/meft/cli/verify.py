"""`meft verify`: builds a model, or loads a trained adapter, and verifies it on one batch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftType
from rich.console import Console
from torch import nn

from meft.backbone.conversion import make_reversible
from meft.engine.couplings import COUPLINGS
from meft.errors import ConfigError
from meft.loading.arguments import ModelArguments
from meft.loading.folders import adapter_config, is_adapter, load_adapter, trained_labels
from meft.loading.pretrained import load_pretrained
from meft.loading.tasks import TOKEN_TASKS
from meft.methods.arguments import USUAL, MeftArguments
from meft.methods.registry import PLAIN_METHODS, apply_method
from meft.options import FUNCTION, METHOD, check_choice, check_integer, options_of
from meft.parsing import option, parse
from meft.storage.figures import check_figure_path
from meft.storage.files import write_json
from meft.storage.outputs import check_output_file
from meft.storage.results import provenance
from meft.tuner.peft_type import MEFT
from meft.verification import VerifyReport, verify
from meft.verification.batches import random_batch, text_batch

_COUPLING_OPTIONS = tuple(name for name in options_of(FUNCTION) if name in options_of(METHOD))


@dataclass
class VerifyArguments:
    """What is verified, on what, and what is written."""

    _argument_group_name = "verification"

    under: str | None = option(
        f"For --method {', '.join(PLAIN_METHODS)} (--method lora --under momentum is --method lora+momentum), and for "
        f"adapters of other methods than MEFT: the coupling put under them. Left out: momentum. Valid: "
        f"{', '.join(COUPLINGS)}."
    )
    base_model_name_or_path: str | None = option(
        "For an adapter: its base model, when it is no longer where the adapter says."
    )
    task_type: str | None = option(f"The task head: {', '.join(TOKEN_TASKS)}. Left out: the checkpoint's own.")
    batch_size: int = option("Rows of the batch; all but the first are padded.", 2)
    seq_length: int = option("Tokens of a row.", 64)
    text_file: str | None = option("A file with a text a line, instead of random tokens.")
    autocast: Literal["bfloat16", "float16"] | None = option("Mixed precision: run under autocast to this dtype.")
    deploy: bool = option(
        "Also find the loss as trained, as deployed on the plain model, and with other gammas. Give a --text_file for "
        "figures that mean something.",
        False,
    )
    device: str | None = option("cpu, cuda, cuda:1, ... Left out: a GPU if there is one.")
    seed: int = option("Of random tokens, new weights and dropout.", 0)
    figure: str | None = option("Draw the error against depth to this file: .svg, .png or .pdf.")
    json: str | None = option("Write everything that was found to this JSON file.")

    def check(self) -> None:
        """Raises ConfigError if an option is not valid by itself."""
        if self.under is not None:
            check_choice("under", self.under, COUPLINGS)
        if self.task_type is not None:
            check_choice("task_type", self.task_type, TOKEN_TASKS)
        check_integer("batch_size", self.batch_size, 1)
        check_integer("seq_length", self.seq_length, 2)
        if self.figure is not None:
            check_figure_path(self.figure)
        if self.json is not None:
            check_output_file("json", self.json)


def verify_command(argv: Sequence[str], *, command: str = "", description: str | None = None) -> int:
    """Runs the words after `meft verify`.

    Example:
        >>> verify_command(["--model_name_or_path", "roberta-base", "--method", "meft1", "--figure", "error.svg"])
        0

    Returns:
        0 if activations are rebuilt as the options promise (bit for bit in exact arithmetic, within drift_tolerance
        otherwise) and gradients agree with those of stored activations, 1 if not.

    Raises:
        ConfigError, CheckpointError, DataError, UnsupportedModelError: what was given is not valid; exit code 2.
    """
    types = (ModelArguments, MeftArguments, VerifyArguments)
    model_arguments, method_arguments, arguments = parse(types, argv, command="verify", description=description)
    arguments.check()
    report = _verified(model_arguments, method_arguments, arguments)
    console = Console()
    console.print(report)
    if arguments.figure is not None:
        console.print(f"Figure: {report.figure(arguments.figure)}", markup=False, soft_wrap=True)
    if arguments.json is not None:
        write_json(Path(arguments.json), _record(report, command or shlex.join(["meft", "verify", *argv])))
    return 0 if report.passed() else 1


def _verified(model_arguments: ModelArguments, method: MeftArguments, arguments: VerifyArguments) -> VerifyReport:
    device = chosen_device(arguments.device)
    torch.manual_seed(arguments.seed)
    name = model_arguments.model_name_or_path
    if is_adapter(name):
        model, base, task_type = _from_adapter(model_arguments, method, arguments)
    else:
        base, task_type = load_pretrained(model_arguments, name, arguments.task_type)
        model = _from_base(base, task_type, method, arguments.under)
    sizes = {"batch_size": arguments.batch_size, "seq_length": arguments.seq_length, "seed": arguments.seed}
    if arguments.text_file is None:
        batch = random_batch(base, task_type, **sizes)
    else:
        batch = text_batch(model_arguments, base.name_or_path, base, task_type, arguments.text_file, **sizes)
    dtype = None if arguments.autocast is None else getattr(torch, arguments.autocast)
    with nullcontext() if dtype is None else torch.autocast(device.type, dtype):
        return verify(model.to(device), batch, deploy=arguments.deploy)


def _from_base(base: Any, task_type: str, method: MeftArguments, under: str | None) -> nn.Module:
    """A pretrained model with something new to train: MEFT's adapters, or LoRA or everything on a reversible stack."""
    name = method.method or USUAL
    if name in PLAIN_METHODS:
        name = f"{name}+{under or 'momentum'}"
    elif under is not None:
        raise ConfigError(
            f"under is {under!r}, but method {name!r} brings its own coupling, or has none. Leave --under out, or give "
            f"--method {', '.join(PLAIN_METHODS[:-1])} or {PLAIN_METHODS[-1]}."
        )
    return apply_method(base, name, task_type=task_type, **method.options().given())


def _from_adapter(
    model_arguments: ModelArguments, method: MeftArguments, arguments: VerifyArguments
) -> tuple[nn.Module, Any, str]:
    """A trained adapter on its base model, made trainable again."""
    path = model_arguments.model_name_or_path
    config = adapter_config(Path(path))
    task_type = str(config.task_type or arguments.task_type or "FEATURE_EXTRACTION").removeprefix("TaskType.")
    base_name = arguments.base_model_name_or_path or str(config.base_model_name_or_path)
    is_meft = config.peft_type == MEFT
    given = [name.name for name in fields(method) if getattr(method, name.name) != getattr(MeftArguments(), name.name)]
    refused = [name for name in given if is_meft or name not in _COUPLING_OPTIONS]
    refused += ["under"] if is_meft and arguments.under is not None else []
    if refused:
        raise ConfigError(
            f"{refused[0]} was given, but {path} is an adapter of {PeftType(config.peft_type).value}, which has its "
            f"own options. Leave --{refused[0]} out, or give the base model {base_name} instead."
        )
    base, _ = load_pretrained(model_arguments, base_name, task_type, num_labels=trained_labels(Path(path)))
    model = load_adapter(base, Path(path), base_name=base_name)
    model.set_adapter(model.active_adapter)  # which makes its parameters require gradients, as in training
    if is_meft:
        return model, base, task_type
    chosen = method.options().given()
    coupling = {name: value for name, value in chosen.items() if name in _COUPLING_OPTIONS}
    return make_reversible(model, coupling=arguments.under or "momentum", **coupling), base, task_type


def chosen_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"device is {name!r}, which cannot be used here: {first} Give --device cpu.") from error
    return device


def _record(report: VerifyReport, command: str) -> dict[str, Any]:
    return {**report.as_dict(), **provenance(command)}
