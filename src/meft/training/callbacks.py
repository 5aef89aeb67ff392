"""`MeftCallback`: peak memory and the drift of rebuilt activations in the logs of a Trainer."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from meft.engine.tape import tell_drift_to
from meft.memory.measurement.timeline import Timeline, peak_bytes, recording_cpu

PEAK, DRIFT = "meft_peak_memory_bytes", "meft_drift"


class MeftCallback(TrainerCallback):
    """Adds two figures to every log of the training loss, wherever `report_to` sends it.

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

    With several processes the figures are those of the process that logs.
    """

    def __init__(self) -> None:
        self._peak: int | None = None
        self._drift: float | None = None
        self._device = torch.device("cpu")
        self._start = self._measured_step = 0
        self._step = ExitStack()
        self._recorded: list[Timeline] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._finish()
        self._peak = self._drift = None
        self._device = args.device
        self._measured_step = min(state.global_step + 1, state.max_steps - 1)
        tell_drift_to(self._hear_drift)
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
            self._recorded = self._step.enter_context(recording_cpu())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) - self._start
            self._peak = max(peak, self._peak or 0)
            return
        self._step.close()
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
        figures = {name: value for name, value in ((PEAK, self._peak), (DRIFT, self._drift)) if value is not None}
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

    def _finish(self) -> None:
        """Ends what a run that was interrupted has left open as well."""
        self._step.close()
        self._recorded = []
        tell_drift_to(None)


def _call_first(callback: TrainerCallback, frame: Any) -> None:
    """Moves a callback before the integrations of `report_to`, so that they log what it adds.

    They stand first, each is handed the same logs in turn, and a callback is not told who calls it: its caller is the
    only way to the list.
    """
    handler = frame.f_back.f_locals.get("self") if frame is not None and frame.f_back is not None else None
    if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)
