"""Optimizers by the name that `meft.estimate` knows them under."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from meft.errors import ConfigError

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]

_OPTIMIZERS: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "sgd+momentum": partial(torch.optim.SGD, momentum=0.9),
    "adafactor": torch.optim.Adafactor,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
NO_OPTIMIZER = "none"
OPTIMIZERS = (*_OPTIMIZERS, NO_OPTIMIZER)


def optimizer_maker(name: str, *, foreach: bool) -> MakeOptimizer | None:
    """Returns what makes the optimizer from its parameters, or None for "none".

    Args:
        name: one of `OPTIMIZERS`.
        foreach: update all parameters together, as PyTorch does on CUDA, rather than one after the other.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer is {name!r}; it must be one of {', '.join(OPTIMIZERS)}.")
    if name == NO_OPTIMIZER:
        return None
    return partial(_OPTIMIZERS[name], lr=1e-3, foreach=foreach)
