"""Verification: does the backward pass rebuild what the forward pass computed, and are the gradients right?

A model is run on one batch as in training, with an observer that keeps the streams below every layer and compares
each with what the backward pass rebuilds there. The gradients are compared with those of the same network under
`backward="cached"`, started from the same random state. Then the model and the plain one, whose layers are run as
they are, are compared in evaluation. Everything that this touches is put back.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from meft.backbone.conversion import find_stacks
from meft.backbone.layers import ReversibleLayer, shared_by
from meft.backbone.plan import Plan
from meft.backbone.stack import ReversibleStack
from meft.engine.engine import observed_by
from meft.engine.replay import RngState
from meft.errors import ConfigError, DriftWarning, ReconstructionError, UnsupportedModelError

from .deployment import as_in_training, compare_deployment, refuse_deployment
from .distance import distance_from_plain, plain
from .gradients import Gradient, gradients_of, loss_of, relative_differences
from .preserve import preserved, replaced
from .reconstruction import CoupledStack, Recorder, relative_difference
from .report import StartingPoint, VerifyReport

# What the order of summation may change in a gradient; 16 bit gradients are rounded to 16 bit at every sum.
_GRADIENT_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def verify(model: nn.Module, batch: Mapping[str, Any], *, deploy: bool = False) -> VerifyReport:
    """Compares what the backward pass rebuilds with what the forward pass computed, bit by bit.

    Example:
        >>> report = meft.verify(model, batch)
        >>> print(report)
        >>> assert report.bitwise and report.passed()

    The model is run as in training, with its dropout and under the surrounding autocast, and is left as it was found:
    gradients, training flags, buffers, random states, adapters and options. Meanwhile all streams of the forward pass
    are kept: for each stream that the coupling changes, four bytes an element a layer where hidden states have 16 bits,
    eight where they have more (exact arithmetic, `fraction_bits="auto"`).

    Args:
        model: reversible by `get_peft_model(base, MeftConfig(...))` or `make_reversible`.
        batch: what the model is called with, as keyword arguments; it is moved to the model's device. Where it yields
            no loss (no labels), the loss is the sum of fixed random projections of the model's outputs.
        deploy: also find the loss as trained and as deployed, on the plain model that `restore` leaves, and what other
            gammas would give. The batch needs labels.

    Returns:
        The report: `bitwise`, `reconstruction_error`, `gradient_error`, `starting_point`, `deployment`, `passed()`,
        `figure(path)`.

    Raises:
        ConfigError: the model is not reversible, nothing in it is rebuilt or trainable, or the batch is no mapping;
            with `deploy`, the plain model cannot run its adapters, or the batch has no labels.
        UnsupportedModelError: the model's outputs cannot be read.
        StreamOverflowError: hidden states do not fit the fixed-point streams.
    """
    coupled = _find_coupled(model)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ConfigError(
            f"{type(model).__name__} has no parameter that requires gradients, so nothing is rebuilt in its backward "
            "pass. Verify it as it will be trained: activate its adapter, or call model.requires_grad_(True)."
        )
    if deploy:
        refuse_deployment(model)
    with preserved(model), _differentiable():
        inputs = _inputs(batch, next(iter(trainable.values())).device)
        state = [RngState.take(device) for device in {parameter.device for parameter in model.parameters()}]
        recorder, found, reference, integrity_error = _trained(model, inputs, coupled, list(trainable.values()), state)
        errors, floor = relative_differences(dict(zip(trainable, zip(found, reference, strict=True), strict=True)))
        del found, reference
        precision = _precision(recorder.dtypes | {parameter.dtype for parameter in trainable.values()})
        starting_point = _starting_point(model, inputs, coupled, state)
        deployment = compare_deployment(model, inputs, state) if deploy else None
    rebuilt = recorder.errors()
    if not rebuilt:
        raise ConfigError(
            f"No layer of {type(model).__name__} was rebuilt: none of its reversible layers lies between the loss and "
            "a trainable parameter. Train a parameter in or below one of them, and give a batch with labels."
        )
    plans = [entry.reversible_stack.plan for entry in coupled]
    return VerifyReport(
        bitwise=integrity_error is None and all(error.bitwise for layers in rebuilt.values() for error in layers),
        reconstruction_error=rebuilt,
        gradient_error=max(errors.values()),
        gradient_errors=errors,
        gradient_floor=floor,
        starting_point=starting_point,
        exact=all(plan.arithmetic.exact and plan.anchor_every is None for plan in plans),
        precision=str(precision).removeprefix("torch."),
        drift_tolerance=min(plan.drift_tolerance for plan in plans),
        gradient_tolerance=_gradient_tolerance(precision, plans),
        integrity_error=integrity_error,
        deployment=deployment,
        plans={entry.name: str(plan) for entry, plan in zip(coupled, plans, strict=True)},
    )


# -- what is reversible ----------------------------------------------------------------------------------------------


def _find_coupled(model: nn.Module) -> list[CoupledStack]:
    """Finds the reversible stacks, and refuses a model in which nothing would be rebuilt."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"verify() was given a {type(model).__name__} as model. Valid is a model that get_peft_model(base, "
            "MeftConfig(...)) or make_reversible returned."
        )
    stacks = [stack for stack in find_stacks(model) if any(isinstance(x, ReversibleLayer) for x in stack.layers)]
    if not stacks:
        raise ConfigError(
            f"{type(model).__name__} is not reversible, so there is nothing to verify. Make it so with "
            "peft.get_peft_model(model, meft.MeftConfig(...)) or meft.make_reversible(model) first."
        )
    pairs = [(stack, reversible_stack) for stack in stacks if (reversible_stack := shared_by(stack.layers)) is not None]
    if not pairs:
        raise ConfigError(
            f"No MEFT adapter of {type(model).__name__} is active, so its layers run as they are. Leave "
            "disable_adapter(), or activate one with model.set_adapter(name)."
        )
    live = [(stack, reversible_stack) for stack, reversible_stack in pairs if _rebuilds(reversible_stack)]
    if not live:
        raise ConfigError(
            f"No layer of {type(model).__name__} is rebuilt under its options: {_why_not(pairs[0][1])}. Verify a model "
            'with a coupling, backward="reversible", and fewer frozen and cached layers than it is deep.'
        )
    names = [reversible_stack.name for _, reversible_stack in live]
    unique = len(set(names)) == len(names)
    return [
        CoupledStack(reversible_stack.name if unique else stack.name, stack, reversible_stack)
        for stack, reversible_stack in live
    ]


def _rebuilds(reversible_stack: ReversibleStack) -> bool:
    return reversible_stack.plan.coupling is not None and reversible_stack.reversible(
        reversible_stack.plan.frozen_layers
    )


def _why_not(reversible_stack: ReversibleStack) -> str:
    plan = reversible_stack.plan
    if plan.coupling is None:
        return 'coupling="adapter" leaves the layers uncoupled'
    if not plan.reversible:
        return 'backward="cached" keeps all activations'
    layers = reversible_stack.depth
    return f"frozen_layers={plan.frozen_layers} and cached_layers={plan.cached_layers} are all {layers} layers"


def _inputs(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on the model's device, fit for autograd."""
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"verify() was given a {type(batch).__name__} as batch. Valid is a mapping of the model's keyword "
            "arguments, such as a tokenizer returns: {'input_ids': ..., 'attention_mask': ..., 'labels': ...}."
        )
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return {
        name: value.clone() if isinstance(value, Tensor) and value.is_inference() else value
        for name, value in moved.items()
    }


# -- running ---------------------------------------------------------------------------------------------------------


def _trained(
    model: nn.Module,
    inputs: Mapping[str, Any],
    coupled: Sequence[CoupledStack],
    parameters: list[Tensor],
    state: Sequence[RngState],
) -> tuple[Recorder, list[Gradient], list[Gradient], str | None]:
    """Runs one training step as the model is, and one with stored activations, from the same random state.

    Returns:
        The recorder of the first, the gradients of both, and what the integrity check raised.
    """

    def gradients(change: Callable[[Plan], Plan]) -> list[Gradient]:
        _put(state)
        with replaced([entry.reversible_stack for entry in coupled], change), _without_drift_warning():
            return gradients_of(model, inputs, parameters)

    model.train()
    recorder, integrity_error = Recorder(coupled), None
    try:
        with observed_by(recorder):
            found = gradients(lambda plan: plan)
    except ReconstructionError as error:
        # The pass ended there. What lies below, and the gradients, are had from another one that goes on.
        integrity_error = str(error)
        recorder = Recorder(coupled)
        with observed_by(recorder):
            found = gradients(_without_integrity_check)
    return recorder, found, gradients(lambda plan: dataclasses.replace(plan, reversible=False)), integrity_error


def _starting_point(
    model: nn.Module, inputs: Mapping[str, Any], coupled: Sequence[CoupledStack], state: Sequence[RngState]
) -> StartingPoint:
    """Compares the model with itself without coupling, in evaluation, where dropout does not blur it."""
    model.eval()
    _put(state)
    with replaced([entry.reversible_stack for entry in coupled], as_in_training):
        hidden, loss = _evaluated(model, inputs, coupled)
    layers = [layer for entry in coupled for layer in entry.stack.layers if isinstance(layer, ReversibleLayer)]
    with plain(layers):
        plain_hidden, plain_loss = _evaluated(model, inputs, coupled)
    change = relative_difference(hidden, plain_hidden)
    _put(state)
    distance = distance_from_plain(model, **inputs)
    kl = None if distance is None else distance.kl
    if loss is None or plain_loss is None:
        return StartingPoint(change, kl=kl)
    return StartingPoint(change, relative_difference(loss, plain_loss), float(loss), float(plain_loss), kl)


def _evaluated(
    model: nn.Module, inputs: Mapping[str, Any], coupled: Sequence[CoupledStack]
) -> tuple[Tensor, Tensor | None]:
    """What leaves the model around the last stack, its final norm included, and the loss if there are labels.

    Where no module around the layers is called, or where it returns something else, it is what leaves the last layer.
    """
    around: list[Any] = []
    layers: list[Any] = []
    with ExitStack() as stack, torch.no_grad():
        for entry in coupled:
            handle = entry.stack.parent.register_forward_hook(lambda module, args, output: around.append(output))
            stack.callback(handle.remove)
            for layer in entry.stack.layers:
                handle = layer.register_forward_hook(lambda module, args, output: layers.append(output))
                stack.callback(handle.remove)
        loss = loss_of(model(**inputs))
    for seen in (around, layers):
        value = _hidden_state(seen[-1]) if seen else None
        if value is not None:
            return value, loss
    raise UnsupportedModelError(
        f"The last hidden state of {type(model).__name__} was not found: none of its coupled layers was run on this "
        "batch. Give a batch that reaches them."
    )


def _hidden_state(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = output.get("last_hidden_state")
    elif isinstance(output, tuple | list):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


# -- leaving no trace ------------------------------------------------------------------------------------------------


@contextmanager
def _differentiable() -> Iterator[None]:
    """Gradients are wanted even where the caller is in `no_grad` or `inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _without_integrity_check(plan: Plan) -> Plan:
    """Streams may deviate under anchors; the first one lies above any layer here."""
    return dataclasses.replace(plan, anchor_every=plan.anchor_every or 2**62, drift_tolerance=math.inf)


@contextmanager
def _without_drift_warning() -> Iterator[None]:
    """The report says more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)
        yield


def _put(state: Sequence[RngState]) -> None:
    for generator in state:
        generator.put()


# -- what is allowed -------------------------------------------------------------------------------------------------


def _precision(dtypes: set[torch.dtype]) -> torch.dtype:
    """The coarsest dtype: of hidden states, trainable parameters and the surrounding autocast."""
    return max(dtypes, key=lambda dtype: _GRADIENT_TOLERANCES[dtype])


def _gradient_tolerance(precision: torch.dtype, plans: Sequence[Plan]) -> float:
    """Gradients of drifted streams drift as well."""
    drifts = [plan.drift_tolerance for plan in plans if not plan.arithmetic.exact or plan.anchor_every is not None]
    return max([_GRADIENT_TOLERANCES[precision], *drifts])
