"""The largest size whose need stays within a budget."""

from __future__ import annotations

from collections.abc import Callable


def largest(need: Callable[[int], int], budget: int, low: int, high: int) -> tuple[int | None, int]:
    """Finds the largest size from `low` to `high` with `need(size) <= budget`, where `need` never falls.

    Need is nearly linear in the size, or its square, so where it crosses the budget is guessed from the two nearest
    sizes known; halving takes over when guesses do not help.

    Returns:
        The size, or None if not even `low` fits; and what `low` needs.
    """
    least = need(low)
    if least > budget:
        return None, least
    below, below_need, above, above_need = low, least, high + 1, 0
    size = min(high, 2 * low)
    while above - below > 1:
        found = need(size)
        if found <= budget:
            rate = (found - below_need) / (size - below)
            below, below_need = size, found
        else:
            rate = (found - below_need) / (size - below)
            above, above_need = size, found
        size = _next(below, below_need, above, above_need, budget, rate)
    return below, least


def _next(below: int, below_need: int, above: int, above_need: int, budget: int, rate: float) -> int:
    if above_need:
        rate = (above_need - below_need) / (above - below)
    guess = below + int((budget - below_need) / rate) if rate > 0 else 2 * below
    if not above_need:
        guess = min(guess, 8 * below)  # a first guess from small sizes may overshoot by far, and cost much time
    return min(max(guess, below + 1), above - 1)
