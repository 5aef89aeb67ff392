"""How a figure reaches the disk.

matplotlib is imported when a figure is drawn, and only its object interface is used: no window system and no global
state of `pyplot` are touched.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meft.errors import ConfigError, MissingPackageError

from .outputs import check_output_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("svg", "png", "pdf")


def new_figure(**options: Any) -> Figure:
    """An empty figure; the options are matplotlib's.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            f'Figures need matplotlib, which is not installed ({error}). Install it with: pip install "meft[lab]"'
        ) from error
    return Figure(**options)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes a figure beside its place and renames it, so that a kill leaves the old file or the new.

    Args:
        figure: what to write.
        path: ends in .svg, .png or .pdf.

    Returns:
        The path.

    Raises:
        ConfigError: the ending is another, or the folder does not exist.
    """
    place = check_figure_path(path)
    content = io.BytesIO()
    import matplotlib

    # The same figure is to be the same file: otherwise dates are written, and identifiers in SVG are random.
    undated: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(place.suffix, {})
    with matplotlib.rc_context({"svg.hashsalt": "meft"}):
        figure.savefig(content, format=place.suffix[1:], dpi=150, metadata=undated)
    beside = place.with_name(f".saving-{place.name}")
    beside.write_bytes(content.getvalue())
    os.replace(beside, place)
    return place


def check_figure_path(path: str | os.PathLike[str]) -> Path:
    """Raises ConfigError if a figure cannot be written there; finds out before the work, not after."""
    place = Path(path)
    if place.suffix[1:] not in FORMATS:
        raise ConfigError(
            f"{str(path)!r} does not say what kind of figure to write. Valid endings: "
            f"{', '.join('.' + name for name in FORMATS)}. Use one of these."
        )
    return check_output_file("figure", place)
