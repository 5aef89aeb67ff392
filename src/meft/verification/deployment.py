"""The loss as trained and as deployed: what is lost or won when a model leaves its coupling behind.

What is trained inside the layers of a reversible backbone (LoRA, all weights) runs on the plain model as well, to which
the coupled one comes the nearer the smaller gamma is. The adapters of `meft1`, `meft2` and `meft3` do not: they are
functions of streams that the plain model lacks. That of `momentum` stands beside a feed-forward and runs there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from statistics import fmean
from typing import Any

import torch
from torch import nn

from meft.backbone.conversion import find_stacks
from meft.backbone.layers import ReversibleLayer
from meft.backbone.plan import Plan
from meft.backbone.stack import Placement, ReversibleStack
from meft.engine.couplings import output_weights
from meft.engine.replay import RngState
from meft.errors import ConfigError

from .gradients import loss_of
from .preserve import replaced
from .report import Deployment

_GAMMAS = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
_DRAWS = 4


def refuse_deployment(model: nn.Module) -> None:
    """Raises ConfigError if the plain model cannot run what is trained on the coupled one."""
    for placement in _placements(model):
        coupling = placement.reversible_stack.plan.coupling
        if coupling is not None and coupling.name != "momentum" and placement.has_adapters:
            raise ConfigError(
                f"deploy was asked for, but there is no plain model that runs the adapters of coupling="
                f"{coupling.name!r}: they act on two streams, of which it has one. Deploy them with their base model "
                'and meft, or train LoRA on make_reversible(model, coupling="momentum"), which the plain model runs.'
            )


def compare_deployment(model: nn.Module, inputs: Mapping[str, Any], state: Sequence[RngState]) -> Deployment:
    """Evaluates the model with its coupling, on the plain model, and with other gammas; in evaluation throughout.

    Args:
        model: with reversible stacks; left in evaluation.
        inputs: a batch with labels.
        state: the random state from which signs are drawn.

    Raises:
        ConfigError: the batch has no labels.
    """
    model.eval()
    reversible_stacks = _stacks_of(model)
    couplings = [
        reversible_stack.plan.coupling
        for reversible_stack in reversible_stacks
        if reversible_stack.plan.coupling is not None
    ]
    gammas = {*_GAMMAS, *(step.factor for coupling in couplings for step in coupling.steps)}
    if any(coupling.name != "momentum" for coupling in couplings):
        gammas = set()
    return Deployment(
        trained=_loss(model, inputs, reversible_stacks, state),
        deployed=_deployed_loss(model, inputs),
        by_gamma={
            _name(gamma): _loss(model, inputs, reversible_stacks, state, gamma) for gamma in sorted(gammas)[::-1]
        },
    )


def as_in_training(plan: Plan) -> Plan:
    """The plan under which evaluation is coupled as training is: with random signs drawn in it too."""
    return _with_steps(plan, lambda step: dataclasses.replace(step, sign="always") if step.sign == "random" else step)


@contextmanager
def uncoupled(model: nn.Module) -> Iterator[None]:
    """Runs the layers of a model's reversible stacks as the plain model does, to look at what is deployed.

    Raises:
        ConfigError: The plain model cannot run what is trained on the coupled one.
    """
    refuse_deployment(model)
    with replaced(_stacks_of(model), lambda plan: dataclasses.replace(plan, coupling=None)):
        yield


def _stacks_of(model: nn.Module) -> list[ReversibleStack]:
    stacks = [placement.reversible_stack for placement in _placements(model)]
    return list({id(stack): stack for stack in stacks}.values())


def _with_steps(plan: Plan, change: Any) -> Plan:
    if plan.coupling is None:
        return plan
    steps = tuple(change(step) for step in plan.coupling.steps)
    return dataclasses.replace(plan, coupling=dataclasses.replace(plan.coupling, steps=steps))


def _with_gamma(plan: Plan, gamma: float) -> Plan:
    """The plan with another gamma, in its output rule as well if that has one."""
    changed = _with_steps(plan, lambda step: dataclasses.replace(step, factor=gamma))
    if changed.coupling is None or changed.coupling.rule != "weighted":
        return changed
    weights = output_weights("weighted", gamma)
    return dataclasses.replace(changed, coupling=dataclasses.replace(changed.coupling, output=weights))


def _loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    reversible_stacks: Sequence[ReversibleStack],
    state: Sequence[RngState],
    gamma: float | None = None,
) -> float:
    """The loss with the coupling, of another gamma if one is given; the mean of a few draws where signs are random."""

    def change(plan: Plan) -> Plan:
        plan = as_in_training(plan)
        return plan if gamma is None else _with_gamma(plan, gamma)

    drawn = any(s.plan.coupling is not None and s.plan.coupling.random for s in reversible_stacks)
    for generator in state:
        generator.put()
    with replaced(reversible_stacks, change):
        return fmean(_evaluate(model, inputs) for _ in range(_DRAWS if drawn else 1))


def _deployed_loss(model: nn.Module, inputs: Mapping[str, Any]) -> float:
    with uncoupled(model):
        return _evaluate(model, inputs)


def _evaluate(model: nn.Module, inputs: Mapping[str, Any]) -> float:
    with torch.no_grad():
        loss = loss_of(model(**inputs))
    if loss is None:
        raise ConfigError(
            f"deploy compares losses, but {type(model).__name__} returned none on this batch ({', '.join(inputs)}). "
            "Give a batch with labels; on the command line, a --task_type that has some."
        )
    return float(loss) if math.isfinite(float(loss)) else math.nan


def _placements(model: nn.Module) -> list[Placement]:
    layers = [layer for stack in find_stacks(model) for layer in stack.layers if isinstance(layer, ReversibleLayer)]
    return [placement for layer in layers if (placement := layer.placement()) is not None]


def _name(gamma: float) -> str:
    """`1/8` for 0.125."""
    near = Fraction(gamma).limit_denominator(256)
    return f"{near.numerator}/{near.denominator}" if abs(float(near) - gamma) < 1e-9 else f"{gamma:g}"
