"""The page and the figure of `benchmarks/images.py`."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from meft_lab.sweep.figure import scores_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCES = ("adapter", "full")


def spread(scores: Mapping[int, float]) -> dict[str, Any]:
    """Scores by seed, their mean and their sample standard deviation."""
    values = list(scores.values())
    deviation = stdev(values) if len(values) > 1 else None
    return {"scores": {str(seed): score for seed, score in scores.items()}, "mean": fmean(values), "std": deviation}


def as_markdown(found: Mapping[str, Any]) -> str:
    """The results as a page."""
    before, after = found["pretraining"], found["finetuning"]
    means = {row["name"]: row["test"]["mean"] for row in after["rows"]}
    lines = [
        "| method | learning rate | validation | test | to adapter | to full | trainable |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in after["rows"]:
        own = [row["name"], row["learning_rate"], percent(row["validation"]), percent(row["test"])]
        others = [f"{100 * (means[row['name']] - means[name]):+.1f}" if name in means else "" for name in REFERENCES]
        lines.append(f"| {' | '.join([*own, *others, format(row['trainable_parameters'], ',')])} |")
    images = after["images"]
    return "\n".join(
        [
            "# Images: five classes of CIFAR-10, fine-tuned from the other five",
            "",
            f"Pretraining: {before['parameters']:,} parameters, {before['patches']} patches an image, "
            f"{before['settings']['epochs']} epochs of {before['images']['train']} images of {listed(before)}; "
            f"{before['accuracy']:.1%} of {before['images']['test']} test images of these classes right.",
            "",
            f"Fine-tuning: {images['train']} images of {listed(after)}, {after['arguments']['num_train_epochs']} "
            f"epochs; validation on {images['validation']} training images held out, test on {images['test']}. "
            f"Accuracy in percent, mean ± standard deviation over {len(after['seeds'])} seeds; chance is "
            f"{after['chance']:.0%}. The columns 'to' are differences of the test accuracy in points.",
            "",
            *lines,
            "",
            f"- Pretrained: {provenance(before)}",
            f"- Fine-tuned: {provenance(after)}",
            "",
        ]
    )


def percent(cell: Mapping[str, Any]) -> str:
    return f"{100 * cell['mean']:.1f}" + ("" if cell["std"] is None else f" ± {100 * cell['std']:.1f}")


def listed(part: Mapping[str, Any]) -> str:
    *names, last = part["classes"]
    return f"{', '.join(names)} and {last}"


def provenance(part: Mapping[str, Any]) -> str:
    machine, found = part["hardware"], part["versions"]
    return (
        f"{part['date']}, {machine['processor']}, {machine['threads']} thread of {machine['cores']} cores, torch "
        f"{found['torch']}, transformers {found['transformers']}, peft {found['peft']}: `{part['command']}`"
    )


def figure_of(after: Mapping[str, Any]) -> Figure:
    """Every run's test accuracy, and chance."""
    rows = [{"name": row["name"], "cells": {"test images": row["test"]}} for row in after["rows"]]
    return scores_figure({"columns": ["test images"], "rows": rows, "metric": {"test images": "accuracy, percent"}})
