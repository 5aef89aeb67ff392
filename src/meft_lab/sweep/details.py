"""The second table of a sweep: a line a run, every score with its standard error, and what was cut short for time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from meft.storage.results import format_bytes
from meft.storage.terminal import markdown_table

from .recipe import Point, Recipe

# Shares of the validation rows, so that the rows alone give their standard error.
SHARES = ("acc", "acc_norm", "accuracy", "matched_accuracy", "mismatched_accuracy")
# What makes a run shorter than its recipe says.
_LENGTHS = ("max_steps", "num_train_epochs", "max_train_samples", "max_eval_samples", "max_seq_length")


def standard_error(name: str, score: float | None, rows: int | None) -> float | None:
    """The standard error of a score for the choice of its rows; `None` for what is no share of rows right."""
    if name not in SHARES or score is None or not rows:
        return None
    return math.sqrt(score * (1 - score) / rows)


def shortened(recipe: Recipe, point: Point) -> dict[str, dict[str, Any]]:
    """What was typed beside a recipe that makes a run shorter than it says: by argument, `was` and `is`."""
    own, asked = recipe.own_arguments(point), recipe.arguments_of(point)
    found = {name: {"was": own.get(name), "is": asked.get(name)} for name in _LENGTHS if name in asked}
    return {name: both for name, both in found.items() if _less(both["is"], both["was"])}


def _less(now: Any, before: Any) -> bool:
    """Whether a limit is tighter than it was; what had none, -1 included, is tighter with any."""
    limits = [float("inf") if value is None or float(value) < 0 else float(value) for value in (now, before)]
    return limits[0] < limits[1]


def details(table: Mapping[str, Any]) -> list[str]:
    """The lines of the table in Markdown; none where no run is finished."""
    runs = [run for run in table["runs"] if run.get("validation_rows")]
    names = list(dict.fromkeys(name for run in runs for name in run["metrics"]))
    deployed = any(run["deployed_metrics"] for run in runs)
    if not runs:
        return []
    heads = ["run", *names, *([f"{name}, plain model" for name in names] if deployed else [])]
    heads += ["start: KL, nats", "peak activations", "time to full", "steps", "rows scored", "commit"]
    cells = []
    for run in runs:
        cells.append(
            [
                " ".join([*run["point"].values(), f"seed {run['seed']}"]),
                *_scores(run, run["metrics"], names),
                *(_scores(run, run["deployed_metrics"] or {}, names) if deployed else []),
                _number((run["start"] or {}).get("kl"), "{:.3f}"),
                format_bytes(run["peak_activation_bytes"]),
                _number(run["step_time_ratio"], "{:.2f}"),
                f"{run['steps']}{_cut(run, ('max_steps', 'num_train_epochs', 'max_train_samples'))}",
                f"{run['validation_rows']}{_cut(run, ('max_eval_samples', 'max_seq_length'))}",
                (run["commit"] or "")[:9],
            ]
        )
    # A column that no run has anything for tells nothing.
    kept = [place for place in range(len(heads)) if any(row[place] for row in cells)]
    lines = markdown_table([heads[place] for place in kept], [[row[place] for place in kept] for row in cells])
    return [*lines, "", "- ±: standard error for the choice of the validation rows, on which all runs are scored."]


def _scores(run: Mapping[str, Any], scores: Mapping[str, float | None], names: Sequence[str]) -> list[str]:
    shown = []
    for name in names:
        score = scores.get(name)
        error = standard_error(name, score, run["validation_rows"])
        shown.append(_number(score, "{:.3f}") + ("" if error is None else f" ± {error:.3f}"))
    return shown


def _cut(run: Mapping[str, Any], names: Sequence[str]) -> str:
    told = [f"{name} {run['shortened'][name]['is']}" for name in names if name in run["shortened"]]
    was = [f"{run['shortened'][name]['was'] or 'none'}" for name in names if name in run["shortened"]]
    return f" (cut short: {', '.join(told)} instead of {', '.join(was)})" if told else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
