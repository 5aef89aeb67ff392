"""Cells that train: the same batches in the same order for everyone, as `meft train` would with the same words."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from meft.errors import DriftWarning, ReconstructionError, StreamOverflowError, UnsupportedModelError
from meft.loading.arguments import ModelArguments
from meft.loading.models import load_config
from meft.training import build_trainer, metrics_of
from meft.training.arguments import DataArguments, MeftArguments, TrainerArguments
from meft.training.checkpoints import CheckpointingTrainer
from meft.training.costs import autocast_of, measure_costs
from meft.training.kinds.base import say_nothing
from meft.training.preparation import Prepared, prepare_training
from meft.verification.reconstruction import relative_difference

from .base import Cell, Found, Parsed, Request, StudyArguments, Tick

# The paper's optimiser (section 4); the number of steps is a study's own, since it compares and sets no record.
TRAINING_DEFAULTS: Mapping[str, Any] = {
    "output_dir": "studies",
    "max_steps": 200,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 0.06,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 1.0,
    "learning_rate": 5e-4,
}
_WITHOUT_EFFECT = {"output_dir", "logging_dir", "run_name", "cache_dir", "report_to", "disable_tqdm", "quick", "seeds"}
_UNSTABLE = (StreamOverflowError, ReconstructionError)


@dataclass(frozen=True)
class Change:
    """What is done to a model between applying its method and training it.

    Attributes:
        settings: Tells it from others.
        apply: Does it, to the model in place.
    """

    settings: Mapping[str, Any]
    apply: Callable[[nn.Module], None]


def training_cells(request: Request, label: str, words: tuple[str, ...], change: Change | None = None) -> list[Cell]:
    """One cell a seed: trains, and scores on the validation rows.

    Each finds `score` (the task's first metric; None where the training diverged), `metrics`, `train_loss` and
    `starting_point`: the relative change of the last hidden state by what the method puts into the model, before the
    first step, on the first training batch. Overflow and failed reconstruction are findings: `problem` names them.
    """
    cells = []
    for seed in request.parsed()[StudyArguments].seeds:
        seeded = (*words, "--seed", str(seed))
        cells.append(
            Cell(
                f"{label}, seed {seed}" if len(request.parsed()[StudyArguments].seeds) > 1 else label,
                {"train": settings_of(request, seeded), "change": dict(change.settings) if change else None},
                partial(_train, request, seeded, change),
            )
        )
    return cells


def costs_cell(request: Request, label: str, words: tuple[str, ...], steps: int) -> Cell:
    """A cell that measures a step: exact peak of activations, and time as a ratio to full fine-tuning.

    It finds `activation_bytes`, `full_activation_bytes`, `step_seconds`, `full_step_seconds` and `time_ratio`. Full
    fine-tuning runs on the same batch in the same precision, its steps alternating with the method's.
    """
    settings = {"costs": settings_of(request, words), "steps": steps}
    return Cell(f"{label}: memory and time", settings, partial(_measure, request, words, steps))


def depth_of(request: Request) -> int:
    """Layers of the model that is asked for.

    Raises:
        UnsupportedModelError: Its configuration does not say.
    """
    arguments = request.parsed()[ModelArguments]
    config = load_config(arguments, arguments.model_name_or_path).get_text_config()
    depth = getattr(config, "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise UnsupportedModelError(
            f"The configuration of {arguments.model_name_or_path} has no num_hidden_layers, so its layers cannot be "
            "divided. Give an encoder or a decoder."
        )
    return depth


@contextmanager
def ready(request: Request, *words: str) -> Iterator[tuple[CheckpointingTrainer, Prepared, dict[str, Tensor]]]:
    """The Trainer with its model on its device, and the first training batch."""
    parsed = request.parsed(*words)
    arguments = parsed[TrainerArguments]
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        arguments.output_dir, arguments.report_to, arguments.disable_tqdm = scratch, [], True
        arguments.save_strategy = arguments.eval_strategy = "no"
        prepared = prepare_training(
            parsed[ModelArguments],
            parsed[DataArguments],
            _method_arguments(request, parsed),
            seed=arguments.seed,
            deterministic=arguments.full_determinism,
            say=say_nothing,
        )
        trainer = build_trainer(prepared, arguments)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        batch = next(iter(trainer.get_train_dataloader()))
        yield trainer, prepared, dict(batch)


def starting_point(model: nn.Module, batch: Mapping[str, Tensor]) -> float | None:
    """Relative change of the last hidden state by the adapters and couplings of a PEFT model; None without any."""
    if not isinstance(model, PeftModel):
        return None
    model.eval()
    with torch.no_grad():
        hidden = last_hidden_state(model, batch)
        with model.disable_adapter():
            plain = last_hidden_state(model, batch)
    model.train()
    return relative_difference(hidden, plain)


def last_hidden_state(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What leaves the model below its head, shape (batch, sequence, hidden)."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone = getattr(base, base.base_model_prefix, base)
    seen: list[Any] = []
    handle = backbone.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        model(**batch)
    finally:
        handle.remove()
    return seen[-1]["last_hidden_state"] if hasattr(seen[-1], "keys") else seen[-1][0]


class _Report(TrainerCallback):
    """Tells the progress bar how far a training is."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tick(0.95 * state.global_step / max(state.max_steps, 1))


def _train(request: Request, words: tuple[str, ...], change: Change | None, tick: Tick) -> Found:
    with ready(request, *words) as (trainer, prepared, batch):
        if change is not None:
            change.apply(prepared.model)
        found: Found = {"starting_point": None, "score": None}
        try:
            found["starting_point"] = starting_point(prepared.model, batch)
            trainer.add_callback(_Report(tick))
            set_seed(trainer.args.seed)  # whatever was drawn for the change, training draws the same
            trained = trainer.train()
        except _UNSTABLE as error:
            return {**found, "problem": f"{type(error).__name__}: {error}"}
        metrics = metrics_of(trainer)
        return {
            **found,
            "score": next(iter(metrics.values())),
            "score_name": next(iter(metrics)),
            "metrics": metrics,
            "train_loss": trained.training_loss,
            "steps": trainer.state.global_step,
            "rows": {split: len(rows) for split, rows in prepared.splits.items()},
        }


def _measure(request: Request, words: tuple[str, ...], steps: int, tick: Tick) -> Found:
    with ready(request, *words) as (trainer, prepared, batch):
        args, reference = trainer.args, prepared.reference
        assert reference is not None
        costs = measure_costs(
            prepared.model,
            batch,
            steps=steps,
            reference=lambda: reference().to(args.device),
            reference_name="full",
            autocast=autocast_of(args),
        )
        tick(1.0)
    return {
        "activation_bytes": costs.peak_activation_bytes,
        "activation_causes": costs.peak_activation_causes,
        "full_activation_bytes": costs.reference_peak_activation_bytes,
        "step_seconds": costs.step_seconds,
        "full_step_seconds": costs.reference_step_seconds,
        "time_ratio": costs.step_time_ratio,
        "batch": [costs.rows, costs.tokens],
    }


def _method_arguments(request: Request, parsed: Parsed) -> MeftArguments:
    """The method's arguments; full fine-tuning needs none of the modules that the other methods train by default."""
    arguments = parsed[MeftArguments]
    if arguments.method == "full" and arguments.modules_to_save == list(request.defaults.get("modules_to_save", ())):
        return replace(arguments, modules_to_save=None)
    return arguments


def settings_of(request: Request, words: tuple[str, ...]) -> Found:
    """All arguments that decide about a training, by name."""
    parsed = request.parsed(*words)
    found = {
        **asdict(parsed[ModelArguments]),
        **asdict(parsed[DataArguments]),
        **asdict(_method_arguments(request, parsed)),
    }
    found |= parsed[TrainerArguments].to_dict()
    return {name: str(value) for name, value in found.items() if name not in _WITHOUT_EFFECT}


@contextmanager
def _quiet() -> Iterator[None]:
    """One progress bar is enough, and drift is what some studies measure."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DriftWarning)
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
