"""`meft evaluate`: the metrics of a trained model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from meft.loading.arguments import ModelArguments
from meft.parsing import parse
from meft.storage import results
from meft.storage.files import write_json, write_text
from meft.storage.outputs import check_output_file

from . import build_trainer, metrics_of
from .arguments import DataArguments, EvaluationArguments, TrainerArguments
from .checkpoints import CheckpointingTrainer
from .kinds.base import Say
from .preparation import Prepared, check_labelled, prepare_evaluation
from .recorded import read_task

EVALUATE_TYPES = (ModelArguments, DataArguments, EvaluationArguments, TrainerArguments)
_SOURCES = ("task", "data_dir", "train_file", "validation_file", "test_file")


def parse_evaluation(
    argv: Sequence[str], *, description: str | None = None
) -> tuple[ModelArguments, DataArguments, EvaluationArguments, TrainerArguments]:
    """Parses the words after `meft evaluate`; what they leave out is taken from the trained model's `task.json`.

    Of that file only `recorded.ALIKE` is taken: nothing in a folder grants trust.

    Raises:
        ConfigError: As `meft.training.arguments.parse`.
        CheckpointError: `task.json` cannot be read, or says something of another kind.
    """
    if argv and not argv[0].startswith("-") and not Path(argv[0]).is_file():
        argv = ["--model_name_or_path", *argv]  # meft evaluate FOLDER
    model, data, *_ = parse(EVALUATE_TYPES, argv, command="evaluate", description=description)
    recorded = read_task(model.model_name_or_path).arguments or {}
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
        The metrics; those of a run's output folder on the same rows equal the run's own bit for bit (of one trained on
        a reversible backbone the `deployed_metrics`, and with `--method` those as it was trained). Empty when the
        rows have no labels and only predictions were asked for.

    Raises:
        ConfigError, DataError, CheckpointError, UnsupportedModelError: Something given is not valid.
    """
    for name in ("results_file", "predictions_file"):
        if (given := getattr(evaluation_arguments, name)) is not None:
            check_output_file(name, given)
    split = evaluation_arguments.split
    base = evaluation_arguments.base_model_name_or_path
    method = evaluation_arguments.method
    prepared = prepare_evaluation(model_arguments, data_arguments, split, base=base, method=method, say=say)
    if not evaluation_arguments.predictions_file:
        check_labelled(prepared.unlabelled, hint=", or --predictions_file to write the predictions instead")
    with tempfile.TemporaryDirectory() as scratch:
        trainer_arguments.output_dir = scratch  # the Trainer makes this folder even when it writes nothing
        trainer = build_trainer(prepared, trainer_arguments, split=split)
        metrics = {} if prepared.unlabelled else metrics_of(trainer)
        if evaluation_arguments.predictions_file:
            _write_predictions(trainer, prepared, split, Path(evaluation_arguments.predictions_file))
    if evaluation_arguments.results_file:
        found = {
            "model": model_arguments.model_name_or_path,
            "method": method,
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
        questions = prepared.questions.get(f"{split}_{suffix}" if suffix else split)
        predictions = prepared.kind.predict(trainer, prepared.processor, prepared.spec, rows, questions)
        lines = ["index\tprediction", *(f"{index}\t{name}" for index, name in enumerate(predictions))]
        place = path.with_stem(f"{path.stem}-{suffix}") if suffix else path
        write_text(place, "\n".join(lines) + "\n")
