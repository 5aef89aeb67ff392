"""The figure of a sweep: every run a dot, one panel a column of the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .table import MEAN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_PANELS_A_ROW = 4


def scores_figure(table: Mapping[str, Any]) -> Figure:
    """Draws scores (times 100) by row of the table: a bar at the mean, its standard deviation, a dot for each seed.

    Args:
        table: What `table_of` returns.
    """
    from matplotlib.figure import Figure

    columns = [*table["columns"], *([MEAN] if len(table["columns"]) > 1 else [])]
    across = min(len(columns), _MOST_PANELS_A_ROW)
    down = -(-len(columns) // across)
    height = 0.9 + 0.32 * len(table["rows"])
    figure = Figure(figsize=(2.0 + 2.7 * across, 0.4 + height * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    panels = [panel for line in grid for panel in line]
    for panel, column in zip(panels, columns, strict=False):
        _draw(panel, table, column)
    for panel in panels[len(columns) :]:
        panel.set_visible(False)
    return figure


def _draw(axes: Axes, table: Mapping[str, Any], column: str) -> None:
    rows = table["rows"]
    for place, row in enumerate(rows):
        cell = row[MEAN] if column == MEAN else row["cells"][column]
        if cell["mean"] is None:
            continue
        scores = [100 * score for score in cell["scores"].values() if score is not None]
        axes.errorbar(
            100 * cell["mean"], place, xerr=100 * (cell["std"] or 0), fmt="|", color="black", capsize=3, markersize=14
        )
        axes.plot(scores, [place] * len(scores), "o", color="#1f78b4", alpha=0.6, markersize=5)
    metric = table["metric"].get(column)
    axes.set_title(column, fontsize="medium")
    axes.set_xlabel("mean of all" if column == MEAN else (metric or "score").replace("_", " "))
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
