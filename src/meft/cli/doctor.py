"""`meft doctor`: says whether a model's layers return the same bits twice on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn

from meft.loading.arguments import ModelArguments
from meft.loading.pretrained import load_pretrained
from meft.options import check_integer
from meft.parsing import option, parse
from meft.verification.batches import random_batch
from meft.verification.doctor import examine

from .verify import chosen_device


@dataclass
class DoctorArguments:
    """What the model is run on."""

    _argument_group_name = "doctor"

    task_type: str | None = option("The task head. Left out: the checkpoint's own.")
    batch_size: int = option("Rows of the batch; all but the first are padded.", 2)
    seq_length: int = option("Tokens of a row.", 64)
    device: str | None = option("cpu, cuda, cuda:1, ... Left out: a GPU if there is one.")
    seed: int = option("Of random tokens, new weights and dropout.", 0)

    def check(self) -> None:
        """Raises ConfigError if an option is not valid by itself."""
        check_integer("batch_size", self.batch_size, 1)
        check_integer("seq_length", self.seq_length, 2)


def doctor_command(words: Sequence[str], *, description: str | None = None) -> int:
    """Runs the words after `meft doctor`: MODEL, or --model_name_or_path MODEL, and options.

    Returns:
        0 if every layer's output has the same bits twice, 1 if not.
    """
    if words and not words[0].startswith("-"):
        words = ["--model_name_or_path", *words]
    model_arguments, arguments = parse(
        (ModelArguments, DoctorArguments), words, command="doctor", description=description
    )
    arguments.check()
    device = chosen_device(arguments.device)
    torch.manual_seed(arguments.seed)
    base, task_type = load_pretrained(model_arguments, model_arguments.model_name_or_path, arguments.task_type)
    base.config.use_cache = False
    batch = random_batch(
        base, task_type, batch_size=arguments.batch_size, seq_length=arguments.seq_length, seed=arguments.seed
    )
    model: nn.Module = base
    diagnosis = examine(model.to(device).train(), {name: tensor.to(device) for name, tensor in batch.items()})
    Console().print(str(diagnosis), markup=False, soft_wrap=True)
    return 0 if diagnosis.passed() else 1
