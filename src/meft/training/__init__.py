"""`meft train`: builds the Trainer from parsed arguments, and runs it to a finished output folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from torch import nn
from transformers.trainer import TRAINING_ARGS_NAME

from meft.errors import ConfigError
from meft.loading.arguments import ModelArguments
from meft.methods.registry import count_parameters
from meft.storage import results
from meft.storage.files import finite, publish_files, remove_leftovers, staged, write_json, write_text
from meft.storage.outputs import writing
from meft.verification.deployment import uncoupled

from . import card
from .arguments import DataArguments, MeftArguments, RunArguments, TrainerArguments, flat
from .batches import share_batch
from .before import REFERENCE, CostsBeforeTraining, LossBeforeTraining, StartBeforeTraining, forget_measurements
from .checkpoints import CheckpointingTrainer, check_checkpoint, newest_complete, setting_up
from .costs import StepCosts
from .kinds.base import Say, say_nothing
from .preparation import Prepared, chosen_kind, prepare_training
from .progress import show_progress
from .recorded import TASK_FILE, trained_record, write_record
from .runs import (
    RESULTS_FILE,
    RUN_FILE,
    begun_with,
    check_rows,
    claimed,
    gone_on_with,
    inspect_folder,
    settings_of,
)
from .selection import EarlyStopping, check_early_stopping, check_metric
from .suited import suit, suit_logging
from .verdict import verdict

TRAIN_TYPES = (ModelArguments, DataArguments, MeftArguments, RunArguments, TrainerArguments)
# A folder without its configuration loads as nothing, so that is published after the weights.
_PUBLISHED_LAST = ("config.json", ADAPTER_CONFIG_NAME)


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
    kind = chosen_kind(model_arguments, data_arguments)
    meft_arguments.method = meft_arguments.method or kind.method
    way = meft_arguments.way()
    if run_arguments.measure_steps is None:
        run_arguments.measure_steps = kind.measured_steps
    if run_arguments.measure_steps < 0:
        raise ConfigError(f"measure_steps is {run_arguments.measure_steps}; it must be 0 (nothing) or more.")
    check_early_stopping(run_arguments.early_stopping_patience, trainer_arguments)
    share_batch(run_arguments.total_train_batch_size, trainer_arguments)
    if not trainer_arguments.output_dir_given:
        task = data_arguments.task or data_arguments.form or "files"
        trainer_arguments.output_dir = str(Path("runs", f"{task}-{meft_arguments.method}"))
    folder = Path(trainer_arguments.output_dir or "")
    if not trainer_arguments.should_save:
        say = say_nothing
    suit(trainer_arguments, way, kind.task_type, folder, say)
    arguments = flat(model_arguments, data_arguments, meft_arguments, run_arguments, trainer_arguments)
    state = inspect_folder(folder, arguments, resume=run_arguments.resume, overwrite=run_arguments.overwrite_run)
    prepared = prepare_training(
        model_arguments,
        data_arguments,
        meft_arguments,
        seed=trainer_arguments.seed,
        deterministic=trainer_arguments.full_determinism,
        say=say,
        settings=begun_with(folder, meft_arguments.method) if state == "resume" else None,
        kind=kind,
    )
    if state == "resume":
        sources = _sources(data_arguments)
        state = check_rows(folder, prepared.digests, sources, overwrite=run_arguments.overwrite_run)
    changed = gone_on_with(folder, arguments) if state == "resume" else []
    settings = settings_of(prepared.model)
    check_metric(trainer_arguments, prepared.spec, prepared.evaluation("validation"))
    suit_logging(trainer_arguments, len(prepared.splits["train"]))
    assert prepared.way is not None
    trained = trained_record(prepared.way, settings)
    record = write_record(list(prepared.spec.labels), model_arguments, data_arguments, trainer_arguments, trained)
    if prepared.columns:
        record["messages"] = prepared.messages
    _wait_for_others(trainer_arguments)  # until every process has looked at the folder, none may write to it
    with ExitStack() as stack:
        run = {}
        if trainer_arguments.should_save:
            run = stack.enter_context(claimed(folder, state, arguments, command, settings, prepared.digests))
            remove_leftovers(folder)
        _wait_for_others(trainer_arguments)
        start = _checkpoint(folder, trainer_arguments, say)
        if changed:
            say(f"{'Beginning anew' if start is None else f'Going on from {start.name}'} with: {'; '.join(changed)}.")
            forget_measurements(folder, trainer_arguments, begun=start is not None)
        steps = run_arguments.measure_steps
        costs = CostsBeforeTraining(folder, prepared, meft_arguments.method, steps, trainer_arguments, say)
        distance = StartBeforeTraining(folder, trainer_arguments, say)
        before = LossBeforeTraining(folder, trainer_arguments)

        def before_training(model: nn.Module) -> None:
            costs(model, trainer)
            distance(model, resumed=start is not None)

        with setting_up():
            trainer = build_trainer(
                prepared,
                trainer_arguments,
                patience=run_arguments.early_stopping_patience,
                before_training=before_training,
                extra_files=lambda place: write_json(place / TASK_FILE, record),
            )
        own_rows = kind.trainer != "classic"
        show_progress(trainer, say, memory=own_rows)
        if own_rows:
            before(lambda: _plain_metrics(trainer, prepared), resumed=start is not None)
        trainer.train_or_restore(start)
        if trainer.stopped_early:
            metric, reached = trainer_arguments.metric_for_best_model, trainer.state
            say(f"Stopped after step {reached.global_step}: {metric} was best at step {reached.best_global_step}.")
        metrics = metrics_of(trainer)
        _save_final(trainer, prepared, folder, record)
        deployed = None if prepared.way.under is None else _plain_metrics(trainer, prepared)
        judged = verdict(prepared, deployed or metrics, before.found, trainer.state.log_history, trainer_arguments)
        found = {
            "method": meft_arguments.method,
            "task": prepared.spec.name,
            "model": model_arguments.model_name_or_path,
            **_figures(trainer, prepared, metrics, costs.found, meft_arguments.method),
            "trains": prepared.way.method.trains,
            "coupling": prepared.way.under or prepared.way.method.coupling,
            "settings": settings,
            "deployed_metrics": deployed,
            "metrics_before": before.found,
            "learnt": judged.learnt,
            "verdict": judged.text,
            "data": {"columns": list(prepared.columns)},
            "start": None if distance.found is None else finite(asdict(distance.found)),
            "versions": results.versions(),
            "hardware": results.hardware(),
            "command": run.get("command"),
            "started": run.get("started"),
            "finished": results.now(),
            "resumed_from": None if start is None else start.name,
            "arguments": arguments,
        }
        if trainer_arguments.should_save:
            adapter = (folder / ADAPTER_CONFIG_NAME).is_file()
            write_text(folder / card.FILE, card.model_card(found, adapter=adapter))
            write_json(folder / RESULTS_FILE, found)
    return found


def what_is_kept(folder: str | None) -> str:
    """What an interrupted run has left in its folder, and what the same command would do."""
    place = Path(folder) if folder else None
    if place is None or not (place / RUN_FILE).is_file():
        return "Nothing was trained yet, and nothing is kept; the same command begins anew."
    if (place / RESULTS_FILE).is_file():
        return f"{place} holds a finished run, which is as it was."
    newest, _ = newest_complete(place)
    if newest is None:
        return (
            f"There is no checkpoint in {place} yet, so what was trained is lost; the same command begins anew. "
            "--save_steps 50, say, writes checkpoints sooner."
        )
    return f"The same command goes on from {newest}."


def _sources(data: DataArguments) -> dict[str, str]:
    """Where the rows of each split come from, in words."""
    place = f"{data.task} of {data.data_dir or 'the hub'}" if data.task else str(data.train_file)
    return {split: getattr(data, f"{split}_file") or place for split in ("train", "validation", "test")}


def build_trainer(
    prepared: Prepared,
    arguments: TrainerArguments,
    *,
    split: str = "validation",
    patience: int | None = None,
    before_training: Callable[[nn.Module], None] | None = None,
    extra_files: Callable[[Path], None] | None = None,
) -> CheckpointingTrainer:
    """The Trainer for training on `train` and evaluating on `split`, as far as there are such rows."""
    evaluation = prepared.evaluation(split)
    if not torch.cuda.is_available():
        arguments.dataloader_pin_memory = False  # PyTorch would warn that there is nothing to pin for
    ours: dict[str, Any] = {
        "before_training": before_training,
        "extra_files": extra_files,
        "surroundings": None if prepared.way is None else prepared.way.surroundings,
    }
    stopping = [EarlyStopping(patience)] if patience else []
    if prepared.kind.trainer != "classic":
        from .trl_trainers import build_trl

        return build_trl(prepared, arguments, split=split, callbacks=stopping, **ours)
    arguments.label_names = ["labels"]
    if prepared.kind.keep_columns:
        arguments.remove_unused_columns = False
    collator = prepared.collator
    trainer = CheckpointingTrainer(
        model=prepared.model,
        args=arguments,
        train_dataset=prepared.splits.get("train"),
        eval_dataset=evaluation[""] if set(evaluation) == {""} else evaluation,
        data_collator=collator,
        callbacks=[*prepared.kind.callbacks(collator), *stopping],
        **prepared.kind.trainer_options(prepared.spec),
        scorer=prepared.scorer(
            split,
            batch_size=arguments.per_device_eval_batch_size,
            quiet=bool(arguments.disable_tqdm) or arguments.process_index != 0,
        ),
        **ours,
    )
    if prepared.kind.task_type != "CAUSAL_LM":
        # Their loss is a mean over rows. As these models accept any argument, the Trainer takes it for one over the
        # items of all processes and batches, and would multiply it by the number of processes and batches.
        trainer.model_accepts_loss_kwargs = False
    return trainer


def metrics_of(trainer: CheckpointingTrainer) -> dict[str, float | None]:
    """Evaluates; the loss comes last, and how long it took is left out. Empty where there are no rows."""
    if trainer.eval_dataset is None:
        return {}
    found = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    left_out = ("epoch", "runtime", "samples_per_second", "steps_per_second", "preparation_time")
    names = sorted((name for name in found if not name.endswith(left_out)), key=lambda name: name.endswith("loss"))
    metrics: dict[str, float | None] = finite({name: found[name] for name in names})
    return metrics


def _plain_metrics(trainer: CheckpointingTrainer, prepared: Prepared) -> dict[str, float | None]:
    """Evaluates the model as it is deployed: on the plain layers, where it runs on them."""
    under = prepared.way is not None and prepared.way.under is not None
    with uncoupled(prepared.model) if under else nullcontext():
        return metrics_of(trainer)


def _wait_for_others(arguments: TrainerArguments) -> None:
    if arguments.world_size > 1:
        torch.distributed.barrier()


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
    advice = "Make room, and the same command goes on from the newest checkpoint."
    with writing(folder, advice), staged(folder, "final") as staging:
        trainer.save_model(str(staging))
        (staging / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle; results.json has the arguments
        prepared.processor.save_pretrained(staging)
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
    beside = REFERENCE if costs is None or costs.reference is None else costs.reference
    return {
        "metrics": metrics,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "peak_activation_bytes": None if costs is None else costs.peak_activation_bytes,
        "step_time_ratio": ratio,
        "step_time_ratio_to": None if ratio is None else beside,
        "costs": None if costs is None else asdict(costs),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "stopped_early": trainer.stopped_early,
        "truncated_rows": dict(prepared.truncated),
        "skipped_rows": dict(prepared.skipped),
        "rows": {split: len(rows) for split, rows in prepared.splits.items()},
    }
