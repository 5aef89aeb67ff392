"""What `meft demo` shows: what it is about to do, the progress, the table and the figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from meft.memory.measurement.causes import CAUSES
from meft.methods.registry import read_way
from meft.storage.results import format_bytes
from meft.storage.terminal import progress_bar as bar
from meft_lab.tasks.docstrings import Docstrings

KIND, RESULTS_FILE, FIGURE_FILE = "meft demo", "results.json", "meft-demo.png"

# Peers that keep every activation, and reversible methods, which do not. Colours of Okabe and Ito, told apart by all.
_PEER_COLOUR, _REVERSIBLE_COLOUR = "#999999", "#0072b2"


def table(results: Mapping[str, Any]) -> Table:
    """The table printed at the end of the demo."""
    caption = (
        f"Accuracy on {results['validation_texts']} docstrings of files not trained on, ± one standard error; "
        f"chance is {results['chance']:.3f}. Memory: peak of the activations of one training step of "
        f"{results['settings']['batch_size']} texts. Time: median training step, the methods taking turns."
    )
    shown = Table(
        title="Which part of the standard library is a docstring from?", caption=caption, caption_justify="left"
    )
    shown.add_column("method")
    deployed = any(row.get("score_deployed") is not None for row in results["methods"])
    for heading in (
        "accuracy",
        *(["on the plain model"] if deployed else []),
        "trainable",
        "peak activations",
        "step time",
    ):
        shown.add_column(heading, justify="right")
    for row in results["methods"]:
        ratio = row["step_time_ratio_to_full"]
        shown.add_row(
            row["method"],
            f"{row['score']:.3f} ± {row['score_standard_error']:.3f}",
            *([_deployed(row)] if deployed else []),
            f"{row['trainable_parameters']:,}",
            format_bytes(row["peak_activation_bytes"]),
            f"{row['step_seconds']:.2f} s" if ratio is None else f"{ratio:.2f} x full",
        )
    return shown


def _deployed(row: Mapping[str, Any]) -> str:
    """The score of what was trained on a reversible backbone when it runs on the plain model."""
    return "" if row.get("score_deployed") is None else f"{row['score_deployed']:.3f}"


def memory_table(results: Mapping[str, Any]) -> Table:
    """What the peak memory of every method is for."""
    rows = results["methods"]
    causes = [cause for cause in CAUSES if any(row["peak_activation_causes"][cause] for row in rows)]
    shown = Table(title="What the activations at the peak are for", title_justify="left")
    shown.add_column("method")
    for cause in causes:
        shown.add_column(cause, justify="right")
    for row in rows:
        sizes = [row["peak_activation_causes"][cause] for cause in causes]
        shown.add_row(row["method"], *(format_bytes(size) if size else "" for size in sizes))
    return shown


def draw(results: Mapping[str, Any]) -> Figure:
    """Draws score and memory by method, side by side."""
    rows = results["methods"][::-1]  # bars are drawn from the bottom up
    names = [row["method"] for row in rows]
    colours = [_REVERSIBLE_COLOUR if read_way(name).coupled else _PEER_COLOUR for name in names]
    figure = Figure(figsize=(9, 1.9 + 0.42 * len(rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    scores = [row["score"] for row in rows]
    errors = [row["score_standard_error"] for row in rows]
    left.barh(names, scores, color=colours, xerr=errors, error_kw={"elinewidth": 1, "capsize": 3})
    for place, (score, error) in enumerate(zip(scores, errors, strict=True)):
        left.annotate(f"{score:.2f}", (score + error, place), (4, 0), textcoords="offset points", va="center")
    left.axvline(results["chance"], color="black", linestyle="--", linewidth=1)
    left.annotate(
        f"chance {results['chance']:.2f}",
        (results["chance"], 1.0),
        (0, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        fontsize="small",
    )
    left.set(
        xlim=(0, 1.2),
        xticks=[0, 0.2, 0.4, 0.6, 0.8, 1],
        xlabel=f"accuracy on {results['validation_texts']} unseen docstrings",
    )
    keys = [
        Patch(color=_PEER_COLOUR, label="keeps activations"),
        Patch(color=_REVERSIBLE_COLOUR, label="rebuilds them"),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False)
    mebibytes = [row["peak_activation_bytes"] / 2**20 for row in rows]
    bars = right.barh(names, mebibytes, color=colours)
    right.bar_label(bars, [f"{value:.1f}" for value in mebibytes], padding=4)
    right.set(xlim=(0, 1.2 * max(mebibytes)), xlabel="peak activation memory of a training step, MiB")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("meft demo: which part of the standard library is a docstring from?")
    return figure


def describe(task: Docstrings, steps: int, batch_size: int) -> str:
    """What is about to happen, in two lines."""
    left_out = "".join(f" ({label} is left out: only {n} texts here)" for label, n in task.left_out.items())
    return (
        f"Which part of the standard library is a docstring from: {', '.join(task.labels)}?{left_out}\n"
        f"{len(task.train)} texts to learn from, {len(task.validation)} of other files to be scored on. "
        f"{steps} steps of {batch_size} texts for each method, on the CPU."
    )


def progress_bar(console: Console, total: int) -> Progress:
    """A bar with one task, which `meft_lab.demo.training.compete` describes and advances."""
    progress = bar(console, width=20)
    progress.add_task("loading", total=total)
    return progress
