"""`meft export`: a trained model or adapter into a folder that loads by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

from meft.errors import ConfigError
from meft.loading.models import quiet_transformers
from meft.parsing import option
from meft.training.export import export

_KINDS = {"model": "a plain model", "adapter": "an adapter with its base model inside"}


@dataclass
class ExportArguments:
    """What is written, and how."""

    _argument_group_name = "export"

    source: str = field(metadata={"help": "The folder of a run or of an adapter.", "positional": True})
    output_dir: str = field(metadata={"help": "A folder that does not exist or is empty."})
    base_model_name_or_path: str | None = option("The adapter's base, when it is not where the adapter says.")
    merge: bool | None = option(
        "Fold the adapter into its base; --no-merge keeps it beside. Left out: it is folded if it can be."
    )
    dtype: str = option("Of the weights that are written.", "auto")


def export_command(arguments: ExportArguments) -> None:
    """Exports a folder, and says what was written and how it is loaded.

    Raises:
        ConfigError, CheckpointError, OutputFolderError: what was given is not valid; exit code 2.
    """
    dtype = arguments.dtype
    known = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise ConfigError(f"dtype is {dtype!r}. Valid: auto, float32, bfloat16, float16. Give one of these.")
    options: dict[str, Any] = {"dtype": dtype}
    with quiet_transformers():
        found = export(
            arguments.source,
            arguments.output_dir,
            base_model_name_or_path=arguments.base_model_name_or_path,
            merge=arguments.merge,
            **options,
        )
    console = Console(highlight=False)
    console.print(f"Wrote {_KINDS[found.kind]} to {found.folder}. To load it:", markup=False, soft_wrap=True)
    for line in found.code.splitlines():
        console.print(f"    {line}", markup=False, soft_wrap=True)
