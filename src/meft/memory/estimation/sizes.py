"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

from meft.errors import ConfigError

_UNITS = {
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*")


def parse_size(value: str | int | float, name: str = "budget") -> int:
    """Reads a number of bytes.

    Example:
        >>> parse_size("24GiB"), parse_size("24 GB"), parse_size(1024)
        (25769803776, 24000000000, 1024)

    Args:
        value: a number with a unit: B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (of 1024), in any case of
            letters; or a number of bytes.
        name: what error messages call it.

    Raises:
        ConfigError: it is no size, or not above 0.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        found, unit = float(value), "b"
    else:
        match = _SIZE.fullmatch(str(value))
        found, unit = (float(match[1]), match[2].lower()) if match else (0.0, "")
    if unit not in _UNITS or not found * _UNITS[unit] >= 1 or found == float("inf"):
        raise ConfigError(
            f"{name} is {value!r}, which is no size. Give a number above 0 with a unit, for example 24GiB, 24GB or "
            "24000MiB (1 GiB = 1024**3 bytes, 1 GB = 1000**3 bytes)."
        )
    return int(found * _UNITS[unit])
