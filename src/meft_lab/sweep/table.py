"""The one table that a sweep writes, as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from meft.storage import results
from meft.storage.terminal import markdown_table

from .details import details, shortened
from .recipe import Recipe, name_of, row_names
from .runs import LOST, Outcome, Run, lost_rows, score_of

MEAN = "mean"
_OF_A_RUN = ("metrics", "deployed_metrics", "steps", "rows", *LOST, "start", "settings", "peak_activation_bytes")
_OF_A_RUN += ("step_time_ratio", "trainable_parameters", "command", "started", "finished")
Found = dict[str, tuple[Run, dict[str, Any]]]


def table_of(recipe: Recipe, outcome: Outcome) -> dict[str, Any]:
    """Everything that a sweep found.

    Returns:
        `rows`, each with its `name`, its `cells` by column (`scores` by seed, their `mean` and sample standard
        deviation `std`, `missing` seeds), the mean over the columns under `"mean"`, how that compares with the
        references, trainable parameters and what was measured; and `runs`, every run with its metrics, those included
        that were only looked at to choose.
    """
    columns = row_names(recipe.grid, recipe.columns)
    rows = [_row(recipe, outcome, name, columns) for name in recipe.row_names()]
    for row in rows:
        row["compared"] = {name: _compare(row, _at(rows, name)) for name in recipe.references if name != row["name"]}
    return {
        "recipe": recipe.name,
        "description": recipe.description,
        "metric": {column: _metric(recipe, outcome, column) for column in columns},
        "seeds": list(recipe.seeds),
        "columns": columns,
        "references": list(recipe.references),
        "rows": rows,
        "chosen": [
            {"for": " ".join(group), **values, "candidates": recipe.choice.among if recipe.choice else {}}
            for group, values in outcome.chosen.items()
        ],
        "failed": dict(outcome.failed),
        "runs": [_run(recipe, run, found) for run, found in outcome.finished.values()],
    }


def markdown(table: Mapping[str, Any]) -> str:
    """The table for people: mean and standard deviation over the seeds, times 100 as is usual for these scores."""
    several = len(table["columns"]) > 1
    measured = any(row["peak_activation_bytes"] is not None for row in table["rows"])
    heads = ["", *(_headed(table, column) for column in table["columns"])]
    heads += (
        (["mean"] if several else [])
        + [f"to {name}" for name in table["references"]]
        + ["trainable"]
        + (["peak activations", "step time"] if measured else [])
    )
    rows = []
    for row in table["rows"]:
        cells = [row["name"], *(_shown(row["cells"][column], table) for column in table["columns"])]
        cells += [_shown(row[MEAN], table)] if several else []
        cells += [_difference(row["compared"].get(name)) for name in table["references"]]
        trainable = row["trainable_parameters"]
        cells.append("" if trainable is None else f"{trainable:,}")
        if measured:
            ratio = row["step_time_ratio"]
            cells += [results.format_bytes(row["peak_activation_bytes"]), "" if ratio is None else f"{ratio:.2f}"]
        rows.append(cells)
    return "\n".join([*markdown_table(heads, rows), "", *_notes(table, measured), "", *details(table)]).rstrip() + "\n"


def csv_text(table: Mapping[str, Any]) -> str:
    """One line a run."""
    flat = [{**run["point"], "seed": run["seed"], "score": run["score"], **run["metrics"]} for run in table["runs"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, _ordered(name for run in flat for name in run), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _row(recipe: Recipe, outcome: Outcome, name: str, columns: Sequence[str]) -> dict[str, Any]:
    runs = [run for run in outcome.final if name_of(run.point, recipe.rows) == name]
    by_column = {column: [run for run in runs if name_of(run.point, recipe.columns) == column] for column in columns}
    cells = {column: _cell(recipe, outcome.finished, there) for column, there in by_column.items()}
    found = [outcome.finished[run.title][1] for run in runs if run.title in outcome.finished]
    return {
        "name": name,
        "cells": cells,
        MEAN: _mean_cell(recipe, cells),
        "trainable_parameters": max((one["trainable_parameters"] for one in found), default=None),
        "peak_activation_bytes": _largest(one["peak_activation_bytes"] for one in found),
        "step_time_ratio": _largest(one["step_time_ratio"] for one in found),
    }


def _cell(recipe: Recipe, finished: Found, runs: Iterable[Run]) -> dict[str, Any]:
    done = {run.seed: finished[run.title][1] for run in runs if run.title in finished}
    scores = {str(seed): score_of(done[seed], recipe.metric) for seed in recipe.seeds if seed in done}
    return {**_spread(scores), "missing": [seed for seed in recipe.seeds if seed not in done]}


def _mean_cell(recipe: Recipe, cells: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The mean over the columns seed by seed, of the seeds that all columns have."""
    everywhere = [seed for seed in recipe.seeds if all(str(seed) in cell["scores"] for cell in cells.values())]
    scores: dict[str, float | None] = {}
    for seed in everywhere:
        there = [cell["scores"][str(seed)] for cell in cells.values()]
        scores[str(seed)] = None if None in there else fmean(there)
    return {**_spread(scores), "missing": [seed for seed in recipe.seeds if seed not in everywhere]}


def _spread(scores: Mapping[str, float | None]) -> dict[str, Any]:
    values = [score for score in scores.values() if score is not None]
    return {
        "scores": dict(scores),
        "mean": fmean(values) if values else None,
        "std": stdev(values) if len(values) > 1 else None,
        "undefined": sum(score is None for score in scores.values()),
    }


def _compare(row: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float | None]:
    """The difference of two mean scores over the seeds that both have, and the reference's standard deviation there."""
    ours, theirs = row[MEAN]["scores"], reference[MEAN]["scores"]
    seeds = [seed for seed in ours if ours[seed] is not None and theirs.get(seed) is not None]
    if not seeds:
        return {"difference": None, "std": None}
    difference = fmean(ours[seed] for seed in seeds) - fmean(theirs[seed] for seed in seeds)
    return {"difference": difference, "std": stdev(theirs[seed] for seed in seeds) if len(seeds) > 1 else None}


def _run(recipe: Recipe, run: Run, found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "point": run.point,
        "seed": run.seed,
        "score": score_of(found, recipe.metric),
        **{name: found.get(name) for name in _OF_A_RUN},
        "validation_rows": sum(n for split, n in (found.get("rows") or {}).items() if split.startswith("validation")),
        "shortened": shortened(recipe, run.point),
        "commit": run.commit(),
    }


def _metric(recipe: Recipe, outcome: Outcome, column: str) -> str | None:
    if recipe.metric:
        return recipe.metric
    for run, found in outcome.finished.values():
        if name_of(run.point, recipe.columns) == column:
            return next(iter(found["metrics"])).removeprefix("matched_")
    return None


def _at(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["name"] == name)


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _headed(table: Mapping[str, Any], column: str) -> str:
    metric = table["metric"][column]
    return column if metric is None else f"{column} ({metric.replace('_', ' ')})"


def _shown(cell: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    if cell["mean"] is None:
        return "undefined" if cell["scores"] else "-"
    spread = "" if cell["std"] is None else f" ± {100 * cell['std']:.1f}"
    short = f" ({len(cell['scores']) - cell['undefined']} of {len(table['seeds'])})" if _short(cell) else ""
    return f"{100 * cell['mean']:.1f}{spread}{short}"


def _difference(found: Mapping[str, float | None] | None) -> str:
    difference = None if found is None else found["difference"]
    return "" if difference is None else f"{100 * difference:+.1f}"


def _short(cell: Mapping[str, Any]) -> bool:
    return bool(cell["missing"] or cell["undefined"])


def _notes(table: Mapping[str, Any], measured: bool) -> list[str]:
    notes = [f"Scores times 100: mean ± standard deviation over the seeds {', '.join(map(str, table['seeds']))}."]
    if table["references"]:
        notes.append("'to': difference of the mean scores, in points, over the seeds that both have.")
    if measured:
        notes.append("Peak activations and step time (of full fine-tuning's) are the largest over the columns.")
    for entry in table["chosen"]:
        among = ", ".join(
            f"{axis} {entry[axis]} of {', '.join(values)}" for axis, values in entry["candidates"].items()
        )
        if among:
            notes.append(f"Chosen on seed {table['seeds'][0]} for {entry['for'] or 'all'}: {among}.")
    for run in table["runs"]:
        notes += [f"{run['point'].get('task', 'All')}: {text}." for text in lost_rows(run)]
    notes += [f"Failed: {title}: {reason}" for title, reason in table["failed"].items()]
    return [f"- {note}" for note in _ordered(notes)]
