"""The fastest way to train that fits into a budget, at a batch that is given.

Settings are tried from the fastest down: all activations kept; a reversible backbone whose highest layers keep theirs
(as many as fit, since a layer that keeps its activations is not run again); then what takes less memory for less speed
or a coupling further from the plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from meft.methods.registry import WAYS, own_options, read_way
from meft.storage.results import format_bytes

from .estimator import Estimator
from .report import BudgetError, MemoryEstimate, Tried

# A quarter keeps two bits of an element; the defaults keep five to eight, for a start nearer to the plain model.
_FEWEST_BITS = 0.25


Make = Callable[[str, Mapping[str, Any]], Estimator]
"""Makes the estimator of a way to train with options."""


def fastest_setting(
    make: Make,
    method: str,
    options: Mapping[str, Any],
    budget: int,
    device: str,
    batch_size: int,
    seq_len: int,
) -> tuple[MemoryEstimate, list[Tried]]:
    """Finds the fastest setting that fits.

    Args:
        make: makes the estimator of a way to train with options.
        method: the way; without a coupling of its own ("lora"), it is tried as it is and on `momentum`.
        options: that every setting has. One that is tried (cached_layers, residues, gamma) stays as it is given.
        budget: bytes.
        device: "cpu" or "cuda".
        batch_size: rows.
        seq_len: tokens of a row.

    Returns:
        The estimate, and everything that was tried in the order of trying.

    Raises:
        BudgetError: no setting fits.
    """
    search = _Search(make, options, budget, batch_size, seq_len)
    way = read_way(method)
    if not way.coupled:
        found = search.attempt(method, {})
        if found is not None:
            return found, search.tried
        method = f"{way.method.name}+momentum"
    for more in _ladder(method, options, device) if method in WAYS else ():
        found = search.attempt(method, more)
        if found is not None:
            return search.most_cached(method, more) or found, search.tried
    least = min(search.tried, key=lambda setting: setting.total_bytes)
    written = "".join(f", {name}={value!r}" for name, value in least.options.items())
    raise BudgetError(
        f"budget is {format_bytes(budget)}, in which no setting fits {batch_size} x {seq_len} tokens: {least.method}"
        f"{written} needs {format_bytes(least.total_bytes)}. Give a larger budget or a smaller "
        'batch_size or seq_len; longest="sequence" finds how long a sequence fits.',
        least.total_bytes,
    )


@dataclass
class _Search:
    """What is the same for every setting, and what was tried; `layers` are those of the last one's deepest stack."""

    make: Make
    options: Mapping[str, Any]
    budget: int
    batch_size: int
    seq_len: int
    tried: list[Tried] = field(default_factory=list)
    layers: int = 0

    def attempt(self, method: str, more: Mapping[str, Any]) -> MemoryEstimate | None:
        """The estimate of a setting if it fits."""
        estimator = self.make(method, {**own_options(method, self.options), **more})
        self.layers = max(estimator.predictor.depths)
        report = estimator.at(self.batch_size, self.seq_len)
        self.tried.append(Tried(method, dict(more), report.total_bytes, report.total_bytes <= self.budget))
        return report if self.tried[-1].fits else None

    def most_cached(self, method: str, more: Mapping[str, Any]) -> MemoryEstimate | None:
        """The estimate with as many cached layers as fit, by halving; None if none fits."""
        if "cached_layers" in self.options:
            return None
        best = None
        low, high = 0, self.layers
        while high - low > 1:
            middle = (low + high) // 2
            found = self.attempt(method, {**more, "cached_layers": middle})
            if found is None:
                high = middle
            else:
                low, best = middle, found
        return best


def _ladder(method: str, options: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    """Settings of a reversible way that take less and less memory.

    On the host residues change nothing that is learnt; fewer bits of them do, and are left for where there is no host
    beside the device.
    """
    rungs: list[dict[str, Any]] = [{}]
    if device != "cpu" and "residues" not in options:
        rungs.append({"residues": "host"})
    if device == "cpu" and "gamma" not in options and read_way(method).takes("gamma"):
        rungs.append({"gamma": _FEWEST_BITS})
    return rungs
