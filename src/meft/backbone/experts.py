"""Mixtures of experts that add up in a fixed order.

Transformers runs experts one by one ("eager"), which adds each one's tokens to the sum by an operation that
accelerators do with atomics, or all at once ("grouped_mm"), which sums over a dimension. A reversible layer has to
return the same bits twice, so on an accelerator it takes the second, where the model has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

_ATTRIBUTE = "_experts_implementation_internal"
ORDERED = "grouped_mm"


def unordered(layers: Iterable[nn.Module], owner: Any) -> list[tuple[Any, str, str]]:
    """What to change, as (configuration, attribute, value), for experts on accelerators to add up in a fixed order.

    Args:
        layers: those of a reversible stack.
        owner: the model of Transformers that runs them, which knows what it offers.
    """
    choose = getattr(owner, "get_correct_experts_implementation", None)
    if choose is None:
        return []
    found: dict[int, Any] = {}
    for layer in layers:
        for module in layer.modules():
            config = vars(module).get("config")
            # Experts that can be run in more than one way have this flag of Transformers' dispatch.
            if "_is_expert_parallel" in vars(module) and getattr(config, _ATTRIBUTE, None) == "eager":
                weight = next(module.parameters(), None)
                if weight is not None and on_accelerator(weight.device.type):
                    found[id(config)] = config
    if not found or choose(None) != ORDERED:
        return []
    return [(config, _ATTRIBUTE, ORDERED) for config in found.values()]


def on_accelerator(device: str) -> bool:
    """Whether sums at indices may be taken with atomics there."""
    return device not in ("cpu", "meta")
