"""Every option, declared once: its name, values, default, help, and who reads it.

Example:
    >>> options_of("make_reversible")["tile_size"].valid
    "an integer, at least 1 or 'auto' or None"
"""

from .made import WithOptions, documented, option_arguments, option_dataclass
from .page import reference_page
from .places import INIT_STD, PLACES, check_places
from .table import (
    ADAPTER_ONLY,
    CONFIG,
    FUNCTION,
    METHOD,
    OPTIONS,
    UNSET,
    Option,
    checked,
    options_of,
    plan_options,
)
from .values import check_choice, check_integer, shown

__all__ = [
    "ADAPTER_ONLY",
    "CONFIG",
    "FUNCTION",
    "INIT_STD",
    "METHOD",
    "OPTIONS",
    "PLACES",
    "UNSET",
    "Option",
    "WithOptions",
    "check_choice",
    "check_integer",
    "check_places",
    "checked",
    "documented",
    "option_arguments",
    "option_dataclass",
    "options_of",
    "plan_options",
    "reference_page",
    "shown",
]
