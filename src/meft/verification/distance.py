"""How far a coupled model is from the plain one: the loss and the predictions of both on one batch, in evaluation.

The plain model runs its layers as they are, without a coupling and without MEFT adapters, and with whatever else it
holds (LoRA inside the layers, a head). Right after conversion the distance is what the coupling itself costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meft.backbone.layers import ReversibleLayer
from meft.loss import lazily

from .deployment import as_in_training
from .preserve import preserved, replaced

FAR = 0.5
"""Nats from which on a start is called far."""

# Positions whose predictions are compared: enough for a mean, and few beside a vocabulary's logits of a whole batch.
_POSITIONS = 256
_LOGITS = ("logits", "start_logits", "end_logits", "prediction_logits")


@dataclass(frozen=True)
class Distance:
    """Loss and predictions of a coupled model beside those of the plain one.

    Attributes:
        loss: the coupled model's loss, or None where the batch has no labels.
        plain_loss: the plain model's, or None.
        kl: mean KL divergence of the coupled predictions from the plain ones, in nats, over at most 256 positions that
            are no padding; None where the model returns no logits.
    """

    loss: float | None = None
    plain_loss: float | None = None
    kl: float | None = None

    @property
    def change(self) -> float | None:
        """The loss of the coupled model less that of the plain one."""
        return None if self.loss is None or self.plain_loss is None else self.loss - self.plain_loss

    @property
    def far(self) -> bool:
        """Whether the loss is higher, or the KL divergence is, by more than `FAR` nats, or not finite."""
        return any(value is not None and not value <= FAR for value in (self.change, self.kl))


def distance_from_plain(model: nn.Module, *args: Any, **batch: Any) -> Distance | None:
    """Runs the model on a batch twice without gradients, coupled and plain, and leaves no trace.

    Training flags, buffers and random states are as before. Logits of a whole vocabulary do not exist whole where the
    model's loss is taken in tiles.

    Example:
        >>> distance_from_plain(model, input_ids=ids, labels=ids).kl
        0.0153

    Args:
        model: with reversible layers.
        args: what the model is called with by position.
        batch: what it is called with by name.

    Returns:
        The distance, or None if no layer of the model is coupled now, or its weights are spread over processes.
    """
    layers = [module for module in model.modules() if isinstance(module, ReversibleLayer)]
    placements = [placement for layer in layers if (placement := layer.placement()) is not None]
    reversible_stacks = list(
        {id(placement.reversible_stack): placement.reversible_stack for placement in placements}.values()
    )
    if not any(reversible_stack.plan.coupling is not None for reversible_stack in reversible_stacks) or _spread(model):
        return None
    # The Trainer divides by the items of all batches of a step; without it the loss is the mean of this one.
    batch.pop("num_items_in_batch", None)
    batch.pop("fused_lm_head", None)  # of TRL: log-probabilities in place of the loss and the logits
    with preserved(model), torch.no_grad(), lazily():
        model.eval()
        with replaced(reversible_stacks, as_in_training):
            loss, predicted = _run(model, args, batch)
        with plain(layers):
            plain_loss, plainly = _run(model, args, batch)
        return Distance(loss, plain_loss, _divergence(plainly, predicted))


@contextmanager
def plain(layers: list[ReversibleLayer]) -> Iterator[None]:
    """Runs the pretrained layers as they are."""
    try:
        for layer in layers:
            layer.__dict__["placement"] = lambda: None
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("placement", None)


def warning_of(distance: Distance, model: nn.Module) -> str:
    """What to say of a start that is far, with the settings that bring it nearer."""
    plans = [module.placement() for module in model.modules() if isinstance(module, ReversibleLayer)]
    plan = next(placement.reversible_stack.plan for placement in plans if placement is not None)
    assert plan.coupling is not None
    factors = {step.factor for step in plan.coupling.steps if step.factor != 1}
    largest = max(factors, default=1.0)
    smaller = f"1/{min(256, max(64, round(4 / largest)))}"
    remedy = f"gamma={smaller}" if plan.coupling.name == "momentum" else _factors(plan.coupling.name, smaller)
    if plan.coupling.output not in ((0.0, 1.0),) and plan.coupling.rule != "weighted":
        remedy += ', output="newest"'
    if any(placement is not None and placement.has_adapters for placement in plans):
        remedy += ", adapter_init_std=0"
    change = "" if distance.change is None else f"its loss is {distance.loss:.3f} instead of {distance.plain_loss:.3f}"
    kl = "" if distance.kl is None else f"its predictions are {distance.kl:.3f} nats (KL) away"
    found = " and ".join(part for part in (change, kl) if part)
    return (
        f"On the first batch the coupled model is far from the plain one: {found}, more than {FAR} nats. It has to "
        f"learn that distance back before it can improve. Nearer: {remedy}. The options in use: {plan}."
    )


def _factors(coupling: str, value: str) -> str:
    names = {"meft1": ("lam",), "meft2": ("beta",), "meft3": ("lam", "beta")}[coupling]
    return ", ".join(f"{name}={value}" for name in names)


def _spread(model: nn.Module) -> bool:
    """Whether weights are gathered for the forward pass by hooks, which two more passes within one would upset."""
    sharded = hasattr(torch.distributed, "tensor")
    return any(
        hasattr(parameter, "ds_id") or (sharded and isinstance(parameter, torch.distributed.tensor.DTensor))
        for parameter in model.parameters()
    )


def _run(model: nn.Module, args: Any, batch: Mapping[str, Any]) -> tuple[float | None, dict[str, Tensor]]:
    output = model(*args, **batch)
    if not isinstance(output, Mapping):
        return None, {}
    loss = output.get("loss")
    kept = {name: _sample(output[name], batch) for name in _LOGITS if isinstance(output.get(name), Tensor)}
    return None if not isinstance(loss, Tensor) else float(loss.mean()), kept


def _sample(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Log-probabilities of some positions, evenly spread over the batch, float32 of shape (positions, classes)."""
    rows = logits.reshape(-1, logits.shape[-1])
    step = max(1, math.ceil(len(rows) / _POSITIONS))
    # A slice, which logits that are not computed yet can take before they are.
    # A copy of its own, so that these alone are computed.
    taken = torch.log_softmax(rows[::step].clone().float(), -1)
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
        seen = mask.reshape(-1)[::step].bool()
        taken = taken[seen.to(taken.device)] if seen.any() else taken
    return taken


def _divergence(plainly: Mapping[str, Tensor], predicted: Mapping[str, Tensor]) -> float | None:
    shared = [name for name in plainly if name in predicted and plainly[name].numel()]
    if not shared:
        return None
    found = [
        nn.functional.kl_div(predicted[name], plainly[name], reduction="batchmean", log_target=True) for name in shared
    ]
    return float(torch.stack(found).sum())
