"""Read by ms-swift (`--external_plugins`): the callback "meft" in its table of callbacks."""

from typing import Any

from swift.callbacks import callbacks_map

from meft.integrations.environment import options_given
from meft.integrations.reversible import ReversibleCallback


def make(args: Any, trainer: Any) -> ReversibleCallback:
    """ms-swift makes its callbacks so."""
    return ReversibleCallback(**options_given())


callbacks_map["meft"] = make
