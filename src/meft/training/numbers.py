"""What the Trainer's own numbers may be: it checks few of them, and stumbles over the rest in mid-training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from meft.errors import ConfigError


@dataclass(frozen=True)
class _Range:
    """From `lowest`, which belongs to it unless `above`, to `highest`, unless `below`."""

    lowest: float
    highest: float = math.inf
    above: bool = False
    below: bool = False
    also: float | None = None
    hint: str = ""

    def holds(self, value: float) -> bool:
        if value == self.also:
            return True
        low = value > self.lowest if self.above else value >= self.lowest
        high = value < self.highest if self.below else value <= self.highest
        return math.isfinite(value) and low and high

    def __str__(self) -> str:
        low = f"more than {self.lowest:g}" if self.above else f"{self.lowest:g} or more"
        high = "" if self.highest == math.inf else f" and {'less than' if self.below else 'at most'} {self.highest:g}"
        other = "" if self.also is None else f", or {self.also:g}"
        return f"a finite number, {low}{high}{other}"


_COUNT, _AMOUNT, _POSITIVE = _Range(1), _Range(0), _Range(0, above=True)
_SHARE = _Range(0, 1, below=True)
_SEED = _Range(0, 2**32, below=True)
_NO_LIMIT = _Range(1, hint=" Leave it out for no limit.")

RANGES: dict[str, _Range] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "torch_empty_cache_steps"), _COUNT),
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout"), _COUNT),
    **dict.fromkeys(("learning_rate", "warmup_steps", "warmup_ratio", "weight_decay", "adam_epsilon"), _AMOUNT),
    **dict.fromkeys(("max_grad_norm", "eval_delay", "dataloader_num_workers"), _AMOUNT),
    **dict.fromkeys(("num_train_epochs", "neftune_noise_alpha"), _POSITIVE),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), _POSITIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _SHARE),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    "label_smoothing_factor": _Range(0, 1),
    "max_steps": _Range(1, also=-1, hint=" -1, the default, leaves it to num_train_epochs."),
    "save_total_limit": _NO_LIMIT,
    "local_rank": _Range(0, also=-1),
}
"""The numbers of `TrainingArguments` by name; one that is None was left out."""


def check_numbers(arguments: Any) -> None:
    """Refuses a number that the Trainer cannot train with.

    Raises:
        ConfigError: One is not a number, not finite, or outside of its range.
    """
    for name, valid in RANGES.items():
        value = getattr(arguments, name, None)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not valid.holds(value):
            raise ConfigError(f"{name} is {value!r}; it must be {valid}.{valid.hint}")
