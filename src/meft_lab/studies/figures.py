"""What the studies' figures share: size, colours, and points that say what they are.

matplotlib is imported where a figure is made; no window system is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .base import Found

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito, told apart by all.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
METHOD_COLOURS: Mapping[str, str] = {
    "meft1": COLOURS[0],
    "meft2": COLOURS[1],
    "meft3": COLOURS[2],
    "momentum": COLOURS[3],
    "lora": COLOURS[4],
    "lora+checkpointing": COLOURS[5],
    "lora+momentum": COLOURS[3],
    "full": COLOURS[6],
}
MIB = 2**20


def new(width: float, height: float) -> Figure:
    """An empty figure, its size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def labelled_points(
    axes: Axes,
    places: Sequence[tuple[float, float, str]],
    colour: str,
    marker: str,
    label: str,
    *,
    joined: bool = True,
) -> None:
    """Draws (x, y, text) as points with their texts beside them, joined in the order of x."""
    if not places:
        return
    ordered = sorted(places)
    axes.plot(
        [x for x, _, _ in ordered],
        [y for _, y, _ in ordered],
        color=colour,
        marker=marker,
        linestyle="-" if joined else "none",
        linewidth=1,
        label=label,
    )
    for x, y, text in ordered:
        axes.annotate(text, (x, y), (5, 6), textcoords="offset points", fontsize="small", color=colour)
    tidy(axes)


def tidy(axes: Axes) -> None:
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.08)


def bars(axes: Axes, names: Sequence[str], values: Sequence[float | None], form: str, colours: Sequence[str]) -> None:
    """Horizontal bars, the first at the top, with their values at their ends; None is said, not drawn."""
    places = range(len(names) - 1, -1, -1)
    widths = [0.0 if value is None else value for value in values]
    drawn = axes.barh(list(places), widths, color=list(colours))
    axes.bar_label(drawn, ["none" if v is None else form.format(v) for v in values], padding=3, fontsize="small")
    axes.set_yticks(list(places), list(names))
    axes.set_xlim(0, 1.2 * max([*widths, 1e-9]))
    axes.spines[["top", "right"]].set_visible(False)


def score_label(found: Sequence[Found]) -> str:
    """The name of the score and how many rows it is of."""
    row: Mapping[str, Any] = next((row for row in found if "score_name" in row), {})
    validation = [count for split, count in row.get("rows", {}).items() if split.startswith("validation")]
    name = str(row.get("score_name", "score")).replace("_", " ")
    return f"{name} on {validation[0]} validation rows" if validation else name
