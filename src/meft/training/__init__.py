"""`meft train`: builds the Trainer from parsed arguments, and runs it to a finished output folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorWithPadding, EvalPrediction
from transformers.trainer import TRAINING_ARGS_NAME

from meft import results
from meft.errors import ConfigError
from meft.methods import check_method, count_parameters
from meft.storage import publish_files, read_json, remove_leftovers, staged, write_json
from meft.tasks import TaskSpec
from meft.tasks.metrics import score
from meft.training.arguments import DataArguments, MeftArguments, ModelArguments, RunArguments, TrainerArguments
from meft.training.checkpoints import CheckpointingTrainer, check_checkpoint, newest_complete
from meft.training.costs import StepCosts, measure_costs
from meft.training.loading import ADAPTER_CONFIG
from meft.training.preparation import TASK_FILE, Prepared, Say, prepare_training
from meft.training.runs import RESULTS_FILE, claimed, inspect_folder, now

TRAIN_TYPES = (ModelArguments, DataArguments, MeftArguments, RunArguments, TrainerArguments)
COSTS_FILE = "costs.json"
REFERENCE = "full"
# A folder without its configuration loads as nothing, so that is published after the weights.
_PUBLISHED_LAST = ("config.json", ADAPTER_CONFIG)
_EVALUATED_ALIKE = {
    ModelArguments: {"config_name", "revision", "trust_remote_code", "dtype", "attn_implementation"},
    DataArguments: {field.name for field in fields(DataArguments)}
    - {"labels", "num_labels", "max_train_samples", "preprocessing_num_workers"},
    TrainerArguments: {"per_device_eval_batch_size", "bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32"},
}
_PATHS = {"data_dir", "train_file", "validation_file", "test_file", "config_name"}


def train(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    meft_arguments: MeftArguments,
    run_arguments: RunArguments,
    trainer_arguments: TrainerArguments,
    *,
    command: str = "",
    say: Say = print,
) -> dict[str, Any]:
    """Trains, evaluates and saves; the same call again goes on with a run that was killed.

    Args:
        model_arguments: The model.
        data_arguments: The task.
        meft_arguments: The method.
        run_arguments: The output folder and what is measured.
        trainer_arguments: As Transformers documents them. Without `output_dir` it is `runs/<task>-<method>`.
        command: The command line, for `run.json` and `results.json`.
        say: Called with each sentence meant for the user.

    Returns:
        What `results.json` holds.

    Raises:
        ConfigError, DataError, CheckpointError, UnsupportedModelError: Something given is not valid.
        OutputFolderError: The output folder holds another run.
    """
    check_method(meft_arguments.method, meft_arguments.options())
    if run_arguments.measure_steps < 0:
        raise ConfigError(f"measure_steps is {run_arguments.measure_steps}; it must be 0 (nothing) or more.")
    if not trainer_arguments.output_dir_given:
        trainer_arguments.output_dir = str(Path("runs", f"{data_arguments.task or 'files'}-{meft_arguments.method}"))
    folder = Path(trainer_arguments.output_dir or "")
    if not trainer_arguments.should_save:
        say = _nothing
    arguments = _flat(model_arguments, data_arguments, meft_arguments, run_arguments, trainer_arguments)
    state = inspect_folder(folder, arguments, resume=run_arguments.resume, overwrite=run_arguments.overwrite_run)
    prepared = prepare_training(
        model_arguments,
        data_arguments,
        meft_arguments,
        seed=trainer_arguments.seed,
        deterministic=trainer_arguments.full_determinism,
        say=say,
    )
    record = _task_record(prepared.spec, model_arguments, data_arguments, trainer_arguments)
    _wait_for_others(trainer_arguments)  # until every process has looked at the folder, none may write to it
    with ExitStack() as stack:
        run = {}
        if trainer_arguments.should_save:
            run = stack.enter_context(claimed(folder, state, arguments, command))
            remove_leftovers(folder)
        _wait_for_others(trainer_arguments)
        steps = run_arguments.measure_steps
        costs = _Costs(folder, prepared, meft_arguments.method, steps, trainer_arguments, say)
        trainer = build_trainer(
            prepared,
            trainer_arguments,
            before_training=costs,
            extra_files=lambda place: write_json(place / TASK_FILE, record),
        )
        start = _checkpoint(folder, trainer_arguments, say)
        trainer.train_or_restore(start)
        metrics = metrics_of(trainer)
        _save_final(trainer, prepared, folder, record)
        found = {
            "method": meft_arguments.method,
            "task": prepared.spec.name,
            "model": model_arguments.model_name_or_path,
            **_figures(trainer, prepared, metrics, costs.found, meft_arguments.method),
            "versions": results.versions(),
            "hardware": results.hardware(),
            "command": run.get("command"),
            "started": run.get("started"),
            "finished": now(),
            "resumed_from": None if start is None else start.name,
            "arguments": arguments,
        }
        if trainer_arguments.should_save:
            write_json(folder / RESULTS_FILE, found)
    return found


def build_trainer(
    prepared: Prepared,
    arguments: TrainerArguments,
    *,
    split: str = "validation",
    before_training: Callable[[nn.Module], None] | None = None,
    extra_files: Callable[[Path], None] | None = None,
) -> CheckpointingTrainer:
    """The Trainer for training on `train` and evaluating on `split`, as far as there are such rows."""
    arguments.label_names = ["labels"]
    if not torch.cuda.is_available():
        arguments.dataloader_pin_memory = False  # PyTorch would warn that there is nothing to pin for
    evaluation = prepared.evaluation(split)
    return CheckpointingTrainer(
        model=prepared.model,
        args=arguments,
        train_dataset=prepared.splits.get("train"),
        eval_dataset=evaluation[""] if set(evaluation) == {""} else evaluation,
        data_collator=DataCollatorWithPadding(prepared.tokenizer),
        compute_metrics=partial(_compute_metrics, spec=prepared.spec),
        preprocess_logits_for_metrics=_first,
        before_training=before_training,
        extra_files=extra_files,
    )


def metrics_of(trainer: CheckpointingTrainer) -> dict[str, float | None]:
    """Evaluates; the loss comes last, and how long it took is left out."""
    found = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    left_out = ("epoch", "runtime", "samples_per_second", "steps_per_second", "preparation_time")
    names = sorted((name for name in found if not name.endswith(left_out)), key=lambda name: name.endswith("loss"))
    return results.without_nan({name: found[name] for name in names})


class _Costs:
    """Measures a step once the Trainer has the model ready, and keeps what it found for a resumed run."""

    def __init__(
        self, folder: Path, prepared: Prepared, method: str, steps: int, arguments: TrainerArguments, say: Say
    ) -> None:
        self.prepared, self.method, self.steps, self.arguments, self.say = prepared, method, steps, arguments, say
        self.file = folder / COSTS_FILE
        self.found = StepCosts(**read_json(self.file)) if self.file.is_file() else None

    def __call__(self, model: nn.Module) -> None:
        if self.found is None and self.steps and self.arguments.should_save:
            self.found = self._measure(model)
            write_json(self.file, asdict(self.found))

    def _measure(self, model: nn.Module) -> StepCosts:
        args = self.arguments
        rows = self.prepared.splits["train"]
        size = min(args.per_device_train_batch_size, len(rows))
        batch = DataCollatorWithPadding(self.prepared.tokenizer)([rows[index] for index in range(size)])
        build = self.prepared.reference if self.method != REFERENCE else None
        beside = "" if build is None else f" beside {REFERENCE} fine-tuning"
        self.say(f"Measuring {self.steps} steps{beside} before training; --measure_steps 0 leaves this out.")
        found = measure_costs(
            model,
            {name: value.to(args.device) for name, value in batch.items()},
            steps=self.steps,
            reference=None if build is None else lambda: build().to(args.device),
            reference_name=REFERENCE,
            autocast=partial(
                torch.autocast,
                args.device.type,
                dtype=torch.float16 if args.fp16 else torch.bfloat16,
                enabled=args.fp16 or args.bf16,
            ),
        )
        if build is not None and found.reference is None:
            self.say(f"{REFERENCE} fine-tuning does not fit into the memory of {args.device}: there is no time ratio.")
        return found


def _wait_for_others(arguments: TrainerArguments) -> None:
    if arguments.world_size > 1:
        torch.distributed.barrier()


def _nothing(_: str) -> None:
    """What processes say that are not the one to speak."""


def _checkpoint(folder: Path, arguments: TrainerArguments, say: Say) -> Path | None:
    if arguments.resume_from_checkpoint:
        given = Path(arguments.resume_from_checkpoint)
        check_checkpoint(given)
        return given
    found, reasons = newest_complete(folder)
    for reason in reasons:
        say(f"Passed over a checkpoint: {reason}")
    if found is not None:
        say(f"Going on from {found}.")
    return found


def _save_final(trainer: CheckpointingTrainer, prepared: Prepared, folder: Path, record: Mapping[str, Any]) -> None:
    if not trainer.args.should_save:
        return
    with staged(folder, "final") as staging:
        trainer.save_model(str(staging))
        (staging / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle; results.json has the arguments
        prepared.tokenizer.save_pretrained(staging)
        write_json(staging / TASK_FILE, record)
        publish_files(staging, folder, last=_PUBLISHED_LAST)


def _figures(
    trainer: CheckpointingTrainer,
    prepared: Prepared,
    metrics: Mapping[str, float | None],
    costs: StepCosts | None,
    method: str,
) -> dict[str, Any]:
    trainable, total = count_parameters(prepared.model)
    ratio = None if costs is None else 1.0 if method == REFERENCE else costs.step_time_ratio
    return {
        "metrics": metrics,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "peak_activation_bytes": None if costs is None else costs.peak_activation_bytes,
        "step_time_ratio": ratio,
        "step_time_ratio_to": None if ratio is None else REFERENCE,
        "costs": None if costs is None else asdict(costs),
        "steps": trainer.state.global_step,
        "truncated_rows": dict(prepared.truncated),
        "rows": {split: len(rows) for split, rows in prepared.splits.items()},
    }


def _task_record(
    spec: TaskSpec, model: ModelArguments, data: DataArguments, trainer: TrainerArguments
) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for given in (model, data, trainer):
        values = {name: getattr(given, name) for name in sorted(_EVALUATED_ALIKE[type(given)])}
        arguments |= {name: value for name, value in values.items() if value is not None}
    for name in _PATHS & arguments.keys():
        path = Path(arguments[name])
        arguments[name] = str(path.resolve()) if path.exists() else arguments[name]
    return {"labels": list(spec.labels), "arguments": arguments}


def _flat(*groups: Any) -> dict[str, Any]:
    """All arguments by name, as JSON has them."""
    flat: dict[str, Any] = {}
    for group in groups:
        flat |= group.to_dict() if isinstance(group, TrainerArguments) else asdict(group)
    plain = (bool, int, float, list, dict, type(None))
    return {name: value if isinstance(value, plain) else str(value) for name, value in flat.items()}


def _compute_metrics(prediction: EvalPrediction, spec: TaskSpec) -> dict[str, float]:
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids).reshape(-1)
    return score(logits, labels, spec.metrics, spec.regression)


def _first(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Of what a model returns beside its loss only the logits: BART adds its encoder's states."""
    return logits[0] if isinstance(logits, (tuple, list)) else logits
