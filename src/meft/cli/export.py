"""`meft export`: a trained model or adapter into a folder that loads by itself."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console

from meft.errors import ConfigError
from meft.loading.models import quiet_transformers
from meft.training.export import export

_KINDS = {"model": "a plain model", "adapter": "an adapter with its base model inside"}


def export_command(
    source: str,
    output_dir: str,
    *,
    base_model_name_or_path: str | None = None,
    merge: bool | None = None,
    dtype: str = "auto",
) -> None:
    """Exports a folder, and says what was written and how it is loaded.

    Raises:
        ConfigError, CheckpointError, OutputFolderError: what was given is not valid; exit code 2.
    """
    known = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise ConfigError(f"dtype is {dtype!r}. Valid: auto, float32, bfloat16, float16. Give one of these.")
    options: dict[str, Any] = {"dtype": dtype}
    with quiet_transformers():
        found = export(source, output_dir, base_model_name_or_path=base_model_name_or_path, merge=merge, **options)
    console = Console(highlight=False)
    console.print(f"Wrote {_KINDS[found.kind]} to {found.folder}. To load it:", markup=False, soft_wrap=True)
    for line in found.code.splitlines():
        console.print(f"    {line}", markup=False, soft_wrap=True)
