"""Classification and regression of the user's own texts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PretrainedConfig,
    PreTrainedModel,
)

from meft.loading import models as loading

from ..data.base import LABEL, TaskData, TaskSpec
from ..data.encode import encode
from ..data.files import load_files
from ..data.known import check_known
from ..data.metrics import predictions_of, score
from .base import Collator, Encoded, Say, TaskKind, first_rows

if TYPE_CHECKING:
    from ..arguments import DataArguments

# PEFT trains these heads of its own accord.
_PEFT_HEADS = ("classifier", "score")


class TextClassification(TaskKind):
    """A text or a pair of texts, and a class or a number."""

    what = "sequence classification"
    task_type = "SEQ_CLS"
    auto_model = AutoModelForSequenceClassification
    tasks: ClassVar[tuple[str, ...]] = ()

    def load_rows(
        self,
        arguments: DataArguments,
        splits: Sequence[str],
        *,
        config: PretrainedConfig,
        labels: Sequence[str] | None,
        cache_dir: str | None,
    ) -> TaskData:
        files = {split: getattr(arguments, f"{split}_file") for split in splits}
        return load_files(files, arguments.file_options(labels), cache_dir=cache_dir)

    def configure(self, config: PretrainedConfig, spec: TaskSpec, processor: Any) -> None:
        config.num_labels = spec.outputs
        config.problem_type = "regression" if spec.regression else "single_label_classification"
        if not spec.regression:
            config.id2label = dict(enumerate(spec.labels))
            config.label2id = {label: index for index, label in enumerate(spec.labels)}
        config.pad_token_id = processor.pad_token_id

    def heads(self, model: PreTrainedModel, new_modules: Sequence[str]) -> tuple[str, ...]:
        return loading.heads_to_save(model, new_modules, known=_PEFT_HEADS)

    def encode(
        self, data: TaskData, processor: Any, model: PreTrainedModel, arguments: DataArguments, say: Say
    ) -> Encoded:
        length = loading.context_length(model, processor, arguments.max_seq_length)
        inputs = {*inspect.signature(model.forward).parameters, LABEL}
        encoded, truncated = {}, {}
        for split, rows in first_rows(data, arguments).items():
            coded, cut = encode(rows, processor, length, workers=arguments.preprocessing_num_workers, title=split)
            encoded[split] = coded.select_columns([name for name in coded.column_names if name in inputs])
            truncated[split] = cut
            check_known(coded, processor, split, say)
            if cut:
                say(f"{cut} of {len(rows)} {split} rows are longer than {length} tokens and were cut.")
        unlabelled = frozenset(split for split, rows in encoded.items() if LABEL not in rows.column_names)
        return Encoded(encoded, truncated, unlabelled=unlabelled)

    def collator(self, processor: Any) -> Collator:
        return DataCollatorWithPadding(processor)

    def trainer_options(self, spec: TaskSpec) -> dict[str, Any]:
        return classifier_options(spec)

    def predict(
        self, trainer: Any, processor: Any, spec: TaskSpec, rows: Dataset, questions: Dataset | None
    ) -> list[str]:
        return predicted_labels(trainer, spec, rows)


def classifier_options(spec: TaskSpec) -> dict[str, Any]:
    """Scores logits by the metrics of `spec`; for texts and for whatever else is classified."""
    return {"compute_metrics": partial(_compute_metrics, spec=spec), "preprocess_logits_for_metrics": _first}


def predicted_labels(trainer: Any, spec: TaskSpec, rows: Dataset) -> list[str]:
    """The name of the most likely label of each row, or the number predicted."""
    logits = trainer.predict(rows.remove_columns([LABEL] if LABEL in rows.column_names else [])).predictions
    predicted = predictions_of(np.asarray(logits), spec.regression)
    return [f"{value:.6g}" if spec.regression else spec.labels[value] for value in predicted]


def _compute_metrics(prediction: EvalPrediction, spec: TaskSpec) -> dict[str, float]:
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids).reshape(-1)
    return score(logits, labels, spec.metrics, spec.regression)


def _first(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Of what a model returns beside its loss only the logits: BART adds its encoder's states."""
    return logits[0] if isinstance(logits, (tuple, list)) else logits
