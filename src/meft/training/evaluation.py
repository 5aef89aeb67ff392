"""`meft evaluate`: the metrics of a trained model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from meft import results
from meft.errors import DataError
from meft.storage import write_json, write_text
from meft.tasks.base import LABEL
from meft.tasks.metrics import predictions_of
from meft.training import build_trainer, metrics_of
from meft.training.arguments import DataArguments, EvaluationArguments, ModelArguments, TrainerArguments, parse
from meft.training.checkpoints import CheckpointingTrainer
from meft.training.preparation import Prepared, Say, prepare_evaluation, read_task_file

EVALUATE_TYPES = (ModelArguments, DataArguments, EvaluationArguments, TrainerArguments)
_SOURCES = ("task", "data_dir", "train_file", "validation_file", "test_file")


def parse_evaluation(
    argv: Sequence[str],
) -> tuple[ModelArguments, DataArguments, EvaluationArguments, TrainerArguments]:
    """Parses the words after `meft evaluate`; what they leave out is taken from the trained model's `task.json`.

    Raises:
        ConfigError: As `meft.training.arguments.parse`.
    """
    model, data, *_ = parse(EVALUATE_TYPES, argv, command="evaluate")
    recorded = read_task_file(model.model_name_or_path).get("arguments", {})
    named = any(getattr(data, name) for name in _SOURCES if name != "data_dir")
    defaults = {name: value for name, value in recorded.items() if not (named and name in _SOURCES)}
    model, data, evaluation, trainer = parse(EVALUATE_TYPES, argv, command="evaluate", defaults=defaults)
    return model, data, evaluation, trainer


def evaluate(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    evaluation_arguments: EvaluationArguments,
    trainer_arguments: TrainerArguments,
    *,
    say: Say = print,
) -> dict[str, float | None]:
    """Evaluates a run's output folder, one of its checkpoints, an adapter or a model.

    Returns:
        The metrics; those of a run's output folder on the same rows equal the run's own bit for bit. Empty when the
        rows have no labels and only predictions were asked for.

    Raises:
        ConfigError, DataError, CheckpointError, UnsupportedModelError: Something given is not valid.
    """
    split = evaluation_arguments.split
    base = evaluation_arguments.base_model_name_or_path
    prepared = prepare_evaluation(model_arguments, data_arguments, split, base=base, say=say)
    labelled = all(LABEL in rows.column_names for rows in prepared.splits.values())
    if not labelled and not evaluation_arguments.predictions_file:
        raise DataError(
            f"The {split} rows have no labels, so they cannot be scored. Give rows that have some, or "
            "--predictions_file to write the predictions instead."
        )
    with tempfile.TemporaryDirectory() as scratch:
        trainer_arguments.output_dir = scratch  # the Trainer makes this folder even when it writes nothing
        trainer = build_trainer(prepared, trainer_arguments, split=split)
        if evaluation_arguments.predictions_file:
            _write_predictions(trainer, prepared, split, Path(evaluation_arguments.predictions_file))
        metrics = metrics_of(trainer) if labelled else {}
    if evaluation_arguments.results_file:
        found = {
            "model": model_arguments.model_name_or_path,
            "task": prepared.spec.name,
            "split": split,
            "metrics": metrics,
            "versions": results.versions(),
            "hardware": results.hardware(),
        }
        write_json(Path(evaluation_arguments.results_file), found)
    return metrics


def _write_predictions(trainer: CheckpointingTrainer, prepared: Prepared, split: str, path: Path) -> None:
    """Writes `index` and `prediction` columns, the layout that GLUE's server takes; MNLI gets one file a set."""
    for suffix, rows in prepared.evaluation(split).items():
        logits = trainer.predict(rows.remove_columns([LABEL] if LABEL in rows.column_names else [])).predictions
        predicted = predictions_of(np.asarray(logits), prepared.spec.regression)
        names = [f"{value:.6g}" if prepared.spec.regression else prepared.spec.labels[value] for value in predicted]
        lines = ["index\tprediction", *(f"{index}\t{name}" for index, name in enumerate(names))]
        place = path.with_stem(f"{path.stem}-{suffix}") if suffix else path
        write_text(place, "\n".join(lines) + "\n")
