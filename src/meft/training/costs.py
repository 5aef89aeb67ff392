"""What one training step costs: its peak memory, and its time as a ratio to another way of training.

Memory is a property of the step; time is one of the machine and its load, so it is only quoted against a reference
whose steps alternate with ours in the same process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from meft.memory.measurement.measure import MemoryReport, measure

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def _own_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


@dataclass(frozen=True)
class StepCosts:
    """The costs of a forward and backward pass over one batch; the optimizer is not part of it.

    Attributes:
        rows: How many rows the batch has.
        tokens: How long they are, padding included; `None` for inputs that are no tokens.
        steps: How many steps the times are medians of.
        peak_activation_bytes: Peak live bytes above what was live before, gradients of the weights left out.
        step_seconds: Median time of a step.
        reference: What the ratio is a ratio to. `None`: nothing was measured beside the step.
        reference_peak_activation_bytes, reference_step_seconds: The same of the reference.
        peak_activation_causes, reference_peak_activation_causes: What those bytes are for
            (`meft.memory.measurement.causes.CAUSES`); `None` in results of versions that did not tell.
    """

    rows: int
    tokens: int | None
    steps: int
    peak_activation_bytes: int
    step_seconds: float
    reference: str | None = None
    reference_peak_activation_bytes: int | None = None
    reference_step_seconds: float | None = None
    peak_activation_causes: dict[str, int] | None = None
    reference_peak_activation_causes: dict[str, int] | None = None

    @property
    def step_time_ratio(self) -> float | None:
        """Time of a step over that of the reference."""
        return None if self.reference_step_seconds is None else self.step_seconds / self.reference_step_seconds


def autocast_of(arguments: TrainingArguments) -> Callable[[], AbstractContextManager[Any]]:
    """The precision in which a Trainer of these arguments runs a step."""
    return partial(
        torch.autocast,
        arguments.device.type,
        dtype=torch.float16 if arguments.fp16 else torch.bfloat16,
        enabled=arguments.fp16 or arguments.bf16,
    )


def measure_costs(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    steps: int,
    reference: Callable[[], nn.Module] | None = None,
    reference_name: str | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    surroundings: Callable[[], AbstractContextManager[Any]] = nullcontext,
    reference_surroundings: Callable[[], AbstractContextManager[Any]] = nullcontext,
    loss: Loss | None = None,
    rows: int | None = None,
) -> StepCosts:
    """Measures steps of `model` on `batch`, and leaves its gradients, its mode and every generator as they were.

    Args:
        model: The model as it will be trained.
        batch: Its inputs and labels on its device.
        steps: How many steps to time, one of the model and one of the reference in turn.
        reference: Builds the model to compare with, on the same device; it is dropped afterwards. Where it does not
            fit into the device's memory, nothing is compared: what is measured may be the only way that does.
        reference_name: What to call it.
        autocast: The context that the steps run in.
        surroundings: A further one for those of the model.
        reference_surroundings: A further one for those of the reference.
        loss: Computes the loss of a model on a batch; None for that which the model returns.
        rows: How many rows the batch has; None for as many as it has labels.
    """
    loss = loss or _own_loss
    with _unchanged(model):
        steppers = [_Stepper(model.train(), batch, autocast, surroundings, loss)]
        peaks = [steppers[0].peak()]
        if reference is not None:
            with suppress(torch.OutOfMemoryError):
                other = _Stepper(reference().train(), batch, autocast, reference_surroundings, loss)
                peaks.append(other.peak())
                steppers.append(other)
        times = [[stepper.seconds() for stepper in steppers] for _ in range(steps)]
    seconds = [median(each) for each in zip(*times, strict=True)]
    ours, theirs = peaks[0], peaks[1] if len(peaks) > 1 else None
    rows = len(batch["labels"]) if rows is None else rows
    tokens = batch["input_ids"].shape[1] if "input_ids" in batch else None
    return StepCosts(
        rows,
        tokens,
        steps,
        peak_activation_bytes=ours.activation_peak_bytes,
        step_seconds=seconds[0],
        reference=None if theirs is None else reference_name,
        reference_peak_activation_bytes=None if theirs is None else theirs.activation_peak_bytes,
        reference_step_seconds=None if theirs is None else seconds[1],
        peak_activation_causes=ours.activation_causes,
        reference_peak_activation_causes=None if theirs is None else theirs.activation_causes,
    )


class _Stepper:
    """Forward and backward passes of one model over one batch."""

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        autocast: Callable[[], AbstractContextManager[Any]],
        surroundings: Callable[[], AbstractContextManager[Any]],
        loss: Loss,
    ) -> None:
        self.model, self.batch, self.autocast, self.surroundings = model, batch, autocast, surroundings
        self.loss = loss

    def peak(self) -> MemoryReport:
        """The memory of a step."""
        self._drop_gradients()
        self._step()  # a first step allocates what later ones find ready
        self._drop_gradients()
        return measure(self._step, model=self.model)

    def seconds(self) -> float:
        """Time of a step."""
        self._drop_gradients()
        self._synchronize()
        start = time.perf_counter()
        self._step()
        self._synchronize()
        return time.perf_counter() - start

    def _step(self) -> None:
        with self.autocast(), self.surroundings():
            loss = self.loss(self.model, self.batch)
        loss.backward()

    def _drop_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def _synchronize(self) -> None:
        if next(iter(self.batch.values())).is_cuda:
            torch.cuda.synchronize()


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    training = model.training
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            model.train(training)
