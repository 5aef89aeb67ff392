"""The options of plug-ins whose program takes none: a JSON object in the environment variable MEFT_OPTIONS."""

from __future__ import annotations

import json
import os
from typing import Any

from meft.errors import ConfigError

OPTIONS = "MEFT_OPTIONS"
MADE = "MEFT_RUN_MADE"
"""Names the file that a process started by `meft run` makes when a Trainer's model became reversible."""


def options_given() -> dict[str, Any]:
    """The options of `make_reversible` in MEFT_OPTIONS, by name; none if it is not set.

    Raises:
        ConfigError: it holds something else.
    """
    text = os.environ.get(OPTIONS, "").strip()
    if not text:
        return {}
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        options = error
    if not isinstance(options, dict):
        raise ConfigError(
            f"The environment variable {OPTIONS} is {text!r}, which is no JSON object. Valid: the options of "
            'make_reversible by name, as {"gamma": 0.03125}.'
        )
    return options
