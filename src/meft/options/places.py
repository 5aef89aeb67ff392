"""Where adapters stand: the places of each method."""

from __future__ import annotations

from typing import Any

from meft.errors import ConfigError

INIT_STD = 0.02
"""Standard deviation of the paper's new adapters."""

PLACES: dict[str, dict[str, str]] = {
    "adapter": {"f": "feed_forward", "g": "layer"},
    "meft1": {"f": "feed_forward", "g": "function"},
    "meft2": {"f": "function", "g": "feed_forward"},
    "meft3": {"f": "attention", "g": "feed_forward"},
    "momentum": {"f": "feed_forward", "g": "layer"},
}
"""The adapters of each method, by the letter in their parameters' names, and their places.

"feed_forward" is beside the feed-forward, "attention" behind the attention, "layer" behind the layer (behind its last
block, where a coupling takes blocks), "function" a function of its own, which the other stream is added to.
"""


def check_places(places: Any, method: str) -> list[str]:
    """Returns the places of a method's adapters in the order of its row.

    Raises:
        ConfigError: one of them is no place of the method's, stands there twice, or there is none.
    """
    valid = list(PLACES[method].values())
    listed = list(places) if isinstance(places, list | tuple) else None
    if not listed or sorted(set(listed) & set(valid)) != sorted(listed):
        raise ConfigError(
            f"adapter_places={places!r} does not go with coupling={method!r}. Valid: some or all of {valid}, each "
            "once, or None for all of them."
        )
    return [place for place in valid if place in listed]
