"""Which checkpoint of a run becomes its result, and when a run stops for want of progress."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import EarlyStoppingCallback, TrainerState
from transformers.trainer_utils import IntervalStrategy

from meft.errors import ConfigError

from .arguments import TrainerArguments
from .data.base import TaskSpec

_STATE = "early_stopping_patience_counter"


def check_early_stopping(patience: int | None, arguments: TrainerArguments) -> None:
    """Refuses early stopping without what it needs.

    Raises:
        ConfigError: The patience is not positive, nothing is evaluated during training, or the best checkpoint would
            not become the result.
    """
    if patience is None:
        return
    if patience < 1:
        raise ConfigError(f"early_stopping_patience is {patience}; it must be at least 1. Leave it out to train on.")
    if arguments.eval_strategy == IntervalStrategy.NO:
        raise ConfigError(
            f"early_stopping_patience is {patience}, but eval_strategy is no, so progress would never be seen. Give "
            "--eval_strategy epoch, --save_strategy epoch and --load_best_model_at_end."
        )
    if not arguments.load_best_model_at_end:
        raise ConfigError(
            f"early_stopping_patience is {patience}, but load_best_model_at_end is False, so the result would be the "
            f"model of {patience} evaluations past the best. Give --load_best_model_at_end, with the same "
            "--save_strategy as --eval_strategy."
        )


def metric_names(spec: TaskSpec, suffixes: Iterable[str]) -> list[str]:
    """All metrics of an evaluation, as `--metric_for_best_model` takes them: MNLI has those of two sets of rows."""
    names = (*spec.metrics, "loss")
    return [f"{suffix}_{name}" if suffix else name for suffix in suffixes for name in names]


def check_metric(arguments: TrainerArguments, spec: TaskSpec, suffixes: Iterable[str]) -> None:
    """Refuses a `metric_for_best_model` that no evaluation of the task gives, before training instead of after it.

    Raises:
        ConfigError: There is no such metric.
    """
    metric, names = arguments.metric_for_best_model, metric_names(spec, suffixes)
    if metric is not None and metric.removeprefix("eval_") not in names:
        raise ConfigError(
            f"metric_for_best_model is {metric!r}; the metrics of {spec.name} are {', '.join(names)}. Give one of them."
        )


class EarlyStopping(EarlyStoppingCallback):
    """That of Transformers, which a resumed run finds as the killed one left it."""

    def restore(self, state: TrainerState) -> bool:
        """Takes over the count of a checkpoint's state; returns whether that run had stopped."""
        stored: Any = state.stateful_callbacks or {}
        saved = stored.get(type(self).__name__, {}) if isinstance(stored, dict) else {}
        self.early_stopping_patience_counter = saved.get("attributes", {}).get(_STATE, 0)
        return self.stopped

    @property
    def stopped(self) -> bool:
        """Whether there was no progress for as many evaluations as the patience has."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience
