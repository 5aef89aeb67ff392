"""How the rows of one step of the optimizer are shared out among processes."""

from __future__ import annotations

from transformers import TrainingArguments

from meft.errors import ConfigError


def share_batch(total: int | None, arguments: TrainingArguments) -> None:
    """Sets `gradient_accumulation_steps` so that a step takes `total` rows, however many processes there are.

    Args:
        total: rows of a step over all processes and accumulated batches; None leaves the arguments as they are.
        arguments: changed in place.

    Raises:
        ConfigError: the processes cannot share these rows evenly, or `gradient_accumulation_steps` is given as well.
    """
    if total is None:
        return
    if arguments.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"total_train_batch_size is {total} and gradient_accumulation_steps "
            f"{arguments.gradient_accumulation_steps}, but the second follows from the first. Give one of them."
        )
    size, processes = arguments.per_device_train_batch_size, arguments.world_size
    at_once = size * max(1, arguments.n_gpu) * processes
    steps, rest = divmod(total, at_once)
    if rest or steps < 1:
        near = " or ".join(str(n * at_once) for n in (steps, steps + 1) if n > 0)
        raise ConfigError(
            f"total_train_batch_size is {total}, which {processes} process{'es' if processes > 1 else ''} with "
            f"per_device_train_batch_size {size} cannot share evenly: it must be a multiple of {at_once}. Take {near}, "
            "another per_device_train_batch_size, or another number of processes."
        )
    arguments.gradient_accumulation_steps = steps
