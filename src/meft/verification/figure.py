"""The figure of reconstruction error against depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from meft.storage.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "os^Dv<>P*X"
# Past an error of this size the numbers tell nothing more; what is larger, or not finite, is drawn here.
_CEILING = 1e6
_FIRST_DECADE = -8

Curve = Sequence[tuple[int, float]]
"""Points (number of layers rebuilt, relative error of the streams there)."""


def error_against_depth(panels: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """Draws relative errors of rebuilt streams against the number of layers rebuilt, one panel beside the other.

    The scale is logarithmic, which has no place for zero: errors of exactly zero lie on a line of their own at the
    foot of the panel, below a gap. Errors that are not finite, or too large to mean anything, lie at the top.

    Example:
        >>> figure = error_against_depth({"meft1": {"float32": [(1, 1e-6), (2, 1e-5)], "exact": [(1, 0.0), (2, 0.0)]}})

    Args:
        panels: curves by name, by title of their panel.
    """
    columns = min(2, len(panels)) or 1
    rows = -(-len(panels) // columns) or 1
    figure = new_figure(figsize=(5.6 * columns, 3.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    cells = [cell for row in grid for cell in row]
    for cell in cells[len(panels) :]:
        cell.remove()
    foot = _foot([curve for curves in panels.values() for curve in curves.values()])
    for cell, (title, curves) in zip(cells, panels.items(), strict=False):
        _draw_panel(cell, title, curves, foot)
    for row in grid:
        row[0].set_ylabel("relative error of the rebuilt streams")
    return figure


def _draw_panel(axes: Axes, title: str, curves: Mapping[str, Curve], foot: int) -> None:
    for index, (name, curve) in enumerate(curves.items()):
        depths = [depth for depth, _ in curve]
        heights = [_height(error, foot) for _, error in curve]
        axes.plot(depths, heights, marker=_MARKERS[index % len(_MARKERS)], markersize=3, linewidth=1, label=name)
    axes.axhline(foot + 0.5, color="0.7", linewidth=0.8, linestyle=(0, (2, 3)))
    axes.set_title(title)
    axes.set_xlabel("layers rebuilt, from the output down")
    top = round(math.log10(_CEILING))
    spacing = 2 if top - foot < 16 else 4
    shown = [decade for decade in range(foot + 1, top) if decade % spacing == 0]
    axes.set_yticks([foot, *shown, top], ["0", *(f"$10^{{{decade}}}$" for decade in shown), f"$10^{{{top}}}$ or more"])
    axes.set_ylim(foot - 0.6, top + 0.6)
    axes.grid(axis="y", color="0.92")
    axes.legend(fontsize="small")


def _height(error: float, foot: int) -> float:
    if error == 0:
        return foot
    return math.log10(min(error, _CEILING)) if math.isfinite(error) else math.log10(_CEILING)


def _foot(curves: Sequence[Curve]) -> int:
    """The decade that stands for zero: one below any error that was met."""
    errors = [error for curve in curves for _, error in curve if 0 < error < 1]
    return (math.floor(math.log10(min(errors))) if errors else _FIRST_DECADE) - 2
