"""`MeftCallback`: peak memory, drift of rebuilt activations and distance of the start in the logs of a Trainer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from meft.engine.tape import tell_drift_to
from meft.errors import DistantStartWarning
from meft.memory.measurement.timeline import Timeline, peak_bytes, recording_cpu
from meft.verification.distance import Distance, distance_from_plain, warning_of

Kind = TypeVar("Kind")
PEAK, DRIFT = "meft_peak_memory_bytes", "meft_drift"
START_LOSS, START_KL = "meft_start_loss_change", "meft_start_kl"


class FirstBatch:
    """Measures how far a coupled model is from the plain one, on the first batch that it is trained on, once.

    Example:
        >>> first = FirstBatch(print)
        >>> first.wait(model)          # ... and the model's first call in training is preceded by the comparison
        >>> first.stop()

    A distance of more than half a nat is warned of.

    Args:
        tell: called with what was found.
    """

    def __init__(self, tell: Callable[[Distance], None]) -> None:
        self.tell = tell
        self._handle: Any = None

    def wait(self, model: nn.Module) -> None:
        """Puts a hook on the model, which its first call in training takes off again."""
        self.stop()

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training and torch.is_grad_enabled():
                self.stop()
                self._measure(module, args, kwargs)

        self._handle = model.register_forward_pre_hook(before, with_kwargs=True)

    def stop(self) -> None:
        """Takes the hook off, if it is there."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _measure(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = distance_from_plain(model, *args, **kwargs)
        if found is None:
            return
        self.tell(found)
        if found.far:
            warnings.warn(warning_of(found, model), DistantStartWarning, stacklevel=2)


class MeftCallback(TrainerCallback):
    """Adds figures to the logs of the training loss, wherever `report_to` sends them.

    Example:
        >>> Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[meft.MeftCallback()])

    `meft_peak_memory_bytes` is the most that was live on the model's device during a step, forward pass to optimizer,
    above what was live when the step began: activations, gradients, and in a first step the optimizer's new state.

    - On CUDA every step is measured (`torch.cuda.max_memory_allocated`, whose peak statistics are reset at each
      step), and the largest since the last log is logged.
    - On the CPU one step is measured, the second of the run or its only one, by the meter of `meft.measure`: a sum of
      exact allocation sizes, the same in every run. PyTorch's profiler runs during that step, which takes longer
      than the others. The figure is logged from then on.
    - On other devices, and where a profiler is running already, it is left out.

    `meft_drift` is how far the rebuilt input of a stack was from the original, the largest over all stacks since the
    last log: 0 in exact arithmetic (anything else raises `ReconstructionError`), in float arithmetic and with
    `anchor_every` the relative deviation that is compared with `drift_tolerance`. It is left out if no step was rebuilt
    down to the stack's input: nothing is reversible, or the lowest layers train nothing.

    `meft_start_loss_change` and `meft_start_kl`, in the first log of a run that begins, say how far the coupled model
    is from the plain one on the first batch, in nats and without dropout: its loss less the plain model's, and the KL
    divergence of its predictions. It takes two forward passes without gradients, once. Beyond half a nat a
    `DistantStartWarning` names settings that begin nearer.

    With several processes the figures are those of the process that logs.
    """

    def __init__(self) -> None:
        self._peak: int | None = None
        self._drift: float | None = None
        self._device = torch.device("cpu")
        self._start = self._measured_step = 0
        self._step = ExitStack()
        self._recorded: list[Timeline] = []
        self._recording = False
        self._distance: Distance | None = None
        self._first = FirstBatch(self._hear_distance)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._finish()
        self._peak = self._drift = None
        self._device = args.device
        self._measured_step = min(state.global_step + 1, state.max_steps - 1)
        tell_drift_to(self._hear_drift)
        model = kwargs.get("model")
        if state.global_step == 0 and isinstance(model, nn.Module):
            self._first.wait(model)
        _call_first(self, inspect.currentframe())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
            return
        due = self._device.type == "cpu" and state.global_step == self._measured_step
        if due and not torch.autograd._profiler_enabled():
            self._record()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) - self._start
            self._peak = max(peak, self._peak or 0)
            return
        self._step.close()
        self._recording = False
        if self._recorded:
            self._peak = peak_bytes(self._recorded.pop().blocks)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        found = [(PEAK, self._peak), (DRIFT, self._drift)]
        if self._distance is not None:
            found += [(START_LOSS, self._distance.change), (START_KL, self._distance.kl)]
            self._distance = None
        figures = {name: value for name, value in found if value is not None}
        logs.update(figures)
        # The Trainer has made its own copy before it tells the callbacks.
        if state.log_history:
            state.log_history[-1].update(figures)
        self._drift = None
        if self._device.type == "cuda":
            self._peak = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._finish()

    def _hear_drift(self, deviation: float) -> None:
        # Unlike `max`, keeps a NaN.
        if self._drift is None or not deviation <= self._drift:
            self._drift = deviation

    def _hear_distance(self, distance: Distance) -> None:
        self._distance = distance
        # What the comparison took is none of the step's memory.
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._recording:
            self._step.close()
            self._record()

    def _record(self) -> None:
        self._recorded = self._step.enter_context(recording_cpu())
        self._recording = True

    def _finish(self) -> None:
        """Ends what a run that was interrupted has left open as well."""
        self._first.stop()
        self._distance = None
        self._step.close()
        self._recorded, self._recording = [], False
        tell_drift_to(None)


def _call_first(callback: TrainerCallback, frame: Any) -> None:
    """Moves a callback before the integrations of `report_to`, so that they log what it adds.

    They stand first, and each is handed the same logs in turn.
    """
    handler = caller(frame, CallbackHandler)
    if handler is not None and callback in handler.callbacks:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)


def caller(frame: FrameType | None, kind: type[Kind]) -> Kind | None:
    """The nearest object of a type whose method called: a callback is not told who calls it.

    Args:
        frame: of the callback's method (`inspect.currentframe()`).
        kind: the type, as `Trainer`.
    """
    while frame is not None:
        holder = frame.f_locals.get("self")
        if isinstance(holder, kind):
            return holder
        frame = frame.f_back
    return None
