"""Whether a run has learnt anything, in words: against the most frequent label, or the model before training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .arguments import TrainerArguments
from .data.base import LABEL
from .preparation import Prepared

Metrics = Mapping[str, float | None]
# A loss that has fallen by less is called unchanged, in nats a token.
_FALL = 0.01


@dataclass(frozen=True)
class Verdict:
    """What is said of a run.

    Attributes:
        learnt: Whether it has learnt something; None where that cannot be told.
        text: A sentence or two; empty where nothing can be told.
    """

    learnt: bool | None = None
    text: str = ""


def verdict(
    prepared: Prepared,
    metrics: Metrics,
    before: Metrics | None,
    logged: Sequence[Mapping[str, Any]],
    arguments: TrainerArguments,
) -> Verdict:
    """Judges a finished run.

    Args:
        prepared: What was trained, and the rows.
        metrics: Its scores: of what is deployed, where that is another model.
        before: The same of the model before training, where it was scored.
        logged: The Trainer's log, for runs without rows to validate on.
        arguments: The Trainer's, for the advice.
    """
    if prepared.kind.trainer == "dpo":
        return _of_preferences(metrics, arguments)
    if prepared.kind.trainer == "sft":
        first, last = _losses(metrics, before, logged)
        return _of_loss(first, last, "validation" if metrics.get("loss") is not None else "training", arguments)
    labels = prepared.splits.get("validation")
    if labels is not None and metrics.get("accuracy") is not None and LABEL in labels.column_names:
        return _of_accuracy(float(metrics["accuracy"] or 0), labels[LABEL], prepared.spec.labels, arguments)
    return Verdict()


def _losses(
    metrics: Metrics, before: Metrics | None, logged: Sequence[Mapping[str, Any]]
) -> tuple[float | None, float | None]:
    if metrics.get("loss") is not None:
        return (before or {}).get("loss"), metrics["loss"]
    found = [entry["loss"] for entry in logged if "loss" in entry]
    return (found[0], found[-1]) if len(found) > 1 else (None, None)


def _of_loss(first: float | None, last: float | None, what: str, arguments: TrainerArguments) -> Verdict:
    if first is None or last is None:
        return Verdict()
    if not math.isfinite(last):
        return Verdict(False, f"The {what} loss is {last}: the training has diverged. {_slower(arguments)}")
    if last < first - _FALL:
        return Verdict(True, f"The {what} loss fell from {first:.3f} to {last:.3f}.")
    if last > first + _FALL:
        return Verdict(
            False, f"Nothing was learnt: the {what} loss rose from {first:.3f} to {last:.3f}. {_slower(arguments)}"
        )
    return Verdict(
        False, f"Nothing was learnt: the {what} loss was {first:.3f} and is {last:.3f}. {_faster(arguments)}"
    )


def _of_accuracy(accuracy: float, labels: Sequence[Any], names: Sequence[str], arguments: TrainerArguments) -> Verdict:
    label, count = Counter(labels).most_common(1)[0]
    share, rows = count / len(labels), len(labels)
    most = f"the most frequent label, {names[int(label)]}, alone gives {share:.3f}"
    # One standard deviation of the accuracy of guessing.
    if accuracy > share + math.sqrt(share * (1 - share) / rows):
        return Verdict(True, f"The accuracy on {rows} validation rows is {accuracy:.3f}; {most}.")
    return Verdict(
        False,
        f"Nothing was learnt that shows: the accuracy on {rows} validation rows is {accuracy:.3f}, and {most}. "
        f"{_faster(arguments)}",
    )


def _of_preferences(metrics: Metrics, arguments: TrainerArguments) -> Verdict:
    preferred, margin = metrics.get("preferred"), metrics.get("margin")
    if preferred is None or margin is None:
        return Verdict()
    if preferred > 0.5 and margin > 0:
        return Verdict(True, f"Of {preferred:.0%} of the validation pairs the chosen answer has become likelier.")
    return Verdict(
        False,
        f"Nothing was learnt: of {preferred:.0%} of the validation pairs the chosen answer has become likelier; half "
        f"is chance. {_faster(arguments)}",
    )


def _faster(arguments: TrainerArguments) -> str:
    rate, epochs = arguments.learning_rate or 0, arguments.num_train_epochs
    longer = (
        f"--max_steps {2 * arguments.max_steps}" if arguments.max_steps > 0 else f"--num_train_epochs {2 * epochs:g}"
    )
    return f"Give a larger --learning_rate ({3 * rate:.0e} instead of {rate:.0e}), {longer}, or more rows."


def _slower(arguments: TrainerArguments) -> str:
    rate = arguments.learning_rate or 0
    return f"Give a smaller --learning_rate ({rate / 3:.0e} instead of {rate:.0e}), fewer epochs, or more rows."
