"""The figures of `run.py`. matplotlib is imported where one is drawn; no window system is touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measuring import title_of
from peers import BLOCKS, CHECKPOINTING, FULL, LAYERS, LORA, TILES
from tables import MIB

from meft.storage.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Found = Mapping[str, Any]
# One colour and marker a method, in every figure; grey for those that are not drawn as curves.
STYLES = {
    FULL: ("#444444", "s"),
    LORA: ("#999999", "D"),
    CHECKPOINTING: ("#d95f02", "o"),
    LAYERS: ("#7570b3", "v"),
    BLOCKS: ("#1b9e77", "^"),
    TILES: ("#1f78b4", "P"),
}
_OTHER = ("#bbbbbb", "x")


def memory_by_method(measured: Mapping[str, Found]) -> Figure:
    """Bars: the peak of activations of every method, one panel a decoder."""
    decoders = measured["decoders"]
    figure = _figure(11, 4.4)
    panels = figure.subplots(1, 2)
    for axes, subject in zip(panels, ("wide", "deep"), strict=True):
        rows = _at(decoders, decoders[subject])[::-1]
        sizes = [row["activation_peak_bytes"] / MIB for row in rows]
        colours = [STYLES.get(row["method"], _OTHER)[0] for row in rows]
        bars = axes.barh([row["method"] for row in rows], sizes, color=colours)
        axes.bar_label(bars, [f"{size:,.1f}" for size in sizes], padding=3, fontsize="small")
        axes.set_xlim(0, 1.16 * max(sizes))
        axes.set_xlabel("peak of activations, MiB")
        axes.set_title(title_of(decoders[subject]), fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].set_yticklabels([])
    return figure


def memory_against_depth(measured: Mapping[str, Found]) -> Figure:
    decoders = measured["decoders"]
    return _curves(decoders, decoders["deep"], "layers", "layers", "depth")


def memory_against_sequence(measured: Mapping[str, Found]) -> Figure:
    decoders = measured["decoders"]
    return _curves(decoders, decoders["wide"], "sequence", "tokens of a sequence", "sequence")


def time_against_memory(measured: Mapping[str, Found]) -> Figure:
    """Points: time of a step against peak of activations, both of LoRA + checkpointing's."""
    decoders, runs = measured["decoders"], measured["times"]["runs"]
    figure = _figure(5.2 * len(runs), 4.0)
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, run in zip(panels, runs, strict=True):
        sizes = {row["method"]: row["activation_peak_bytes"] for row in _at(decoders, run)}
        for method, ratio in run["ratios"].items():
            colour, marker = STYLES[method]
            share = 100 * sizes[method] / sizes[run["reference"]]
            axes.plot([share], [ratio], marker, color=colour, markersize=8)
            # Names are long: those on the right are written to the left of their point.
            right = share > 60
            axes.annotate(
                method,
                (share, ratio),
                xytext=(-9 if right else 9, 0),
                textcoords="offset points",
                ha="right" if right else "left",
                va="center",
                fontsize="small",
            )
        axes.set_xlim(0, 115)
        axes.margins(y=0.25)
        axes.set_xlabel(f"peak of activations, % of {run['reference']}")
        axes.set_ylabel(f"time of a step / {run['reference']}")
        axes.set_title(title_of(run), fontsize="medium")
        axes.grid(color="0.92")
    return figure


FIGURES: dict[str, tuple[Callable[[Mapping[str, Found]], Any], tuple[str, ...]]] = {
    "memory-by-method.svg": (memory_by_method, ("decoders",)),
    "memory-against-depth.svg": (memory_against_depth, ("decoders",)),
    "memory-against-sequence.svg": (memory_against_sequence, ("decoders",)),
    "time-against-memory.svg": (time_against_memory, ("decoders", "times")),
}
"""By the name of its file: what draws it, and the parts it needs."""


def save_figures(measured: Mapping[str, Found], folder: Path) -> list[Path]:
    """Writes the figures whose parts were measured, each beside its place and then renamed."""
    return [
        save_figure(draw(measured), folder / name)
        for name, (draw, needed) in FIGURES.items()
        if all(part in measured for part in needed)
    ]


def _curves(decoders: Found, shape: Found, varied: str, label: str, word: str) -> Figure:
    """Peaks of the main methods over one number, both scales logarithmic."""
    figure = _figure(8.4, 4.4)
    axes = figure.subplots()
    ticks: set[int] = set()
    for method, (colour, marker) in STYLES.items():
        rows = [row for row in decoders["rows"] if row["method"] == method and _alike(row, shape, varied)]
        points = sorted((row[varied], row["activation_peak_bytes"] / MIB) for row in rows)
        ticks |= {place for place, _ in points}
        axes.loglog(
            [place for place, _ in points], [size for _, size in points], marker=marker, color=colour, label=method
        )
    axes.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel(label)
    axes.set_ylabel("peak of activations, MiB")
    fixed = f"{shape['layers']} layers, " if varied == "sequence" else f"{shape['sequence']} tokens, "
    axes.set_title(
        f"Memory against {word}: Llama, {fixed}{shape['width']} wide, batch {shape['batch']}", fontsize="medium"
    )
    axes.grid(color="0.92", which="both")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _at(decoders: Found, shape: Found) -> Sequence[Found]:
    return [row for row in decoders["rows"] if _alike(row, shape, "")]


def _alike(row: Found, shape: Found, but: str) -> bool:
    keys = ("layers", "width", "sequence", "batch", "vocabulary")
    return all(row[key] == shape[key] for key in keys if key != but)
