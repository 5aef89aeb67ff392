"""What is printed while a model trains: a bar, and a line of the loss now and then."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from meft.integrations.callbacks import PEAK, MeftCallback
from meft.storage.results import format_bytes

from .kinds.base import Say

# What is printed of a log, under which name and how; the rest is in trainer_state.json.
_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "mean_token_accuracy": ("token accuracy", "{:.3f}"),
    "rewards/accuracies": ("preferred", "{:.3f}"),
    "learning_rate": ("learning rate", "{:.1e}"),
    PEAK: ("memory of a step", None),
    "eval_loss": ("validation loss", "{:.4f}"),
}
_EVALUATED = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time"}


class StepMemory(MeftCallback):
    """The peak memory of steps alone: the distance of the start is measured and said apart."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._first.stop()


class LossLines(ProgressCallback):
    """The Trainer's progress bar, with sentences where it prints dictionaries."""

    def __init__(self, say: Say, *, bar: bool) -> None:
        super().__init__()
        self.say, self.bar, self.training = say, bar, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = True
        if self.bar:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not self.bar or not state.is_world_process_zero or not has_length(eval_dataloader):
            return
        if self.prediction_bar is None:
            total = len(eval_dataloader)
            self.prediction_bar: Any = tqdm(total=total, desc="Evaluating", leave=False, dynamic_ncols=True)
        self.prediction_bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        line = line_of(logs or {}, state)
        if line is None or not self.training or not state.is_world_process_zero:
            return
        if self.training_bar is not None:
            self.training_bar.write(line, file=sys.stderr)
        else:
            self.say(line)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = False
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


def line_of(logs: Mapping[str, Any], state: TrainerState) -> str | None:
    """A log in one line; None for one that says nothing about the loss."""
    if "loss" not in logs and not any(name.startswith("eval_") for name in logs):
        return None
    shown = dict(_SHOWN)
    if "rewards/accuracies" in logs:
        del shown["mean_token_accuracy"]
    others = [name for name in logs if name.startswith("eval_") and name not in {*_SHOWN, *_EVALUATED}]
    shown |= {name: (name.removeprefix("eval_").replace("_", " "), "{:.4f}") for name in others}
    parts = [_part(label, how, logs[name]) for name, (label, how) in shown.items() if name in logs]
    return f"Step {state.global_step} of {state.max_steps}: {', '.join(parts)}"


def _part(label: str, how: str | None, value: Any) -> str:
    if how is None:
        return f"{label} {format_bytes(int(value))}"
    return f"{label} {how.format(float(value))}" if isinstance(value, (int, float)) else f"{label} {value}"


def show_progress(trainer: Trainer, say: Say, *, memory: bool) -> None:
    """Has a Trainer print lines, and the memory of steps among them if that is asked for."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if memory:
        trainer.callback_handler.callbacks.insert(0, StepMemory())  # before whatever logs what it adds
    trainer.add_callback(LossLines(say, bar=not trainer.args.disable_tqdm))
