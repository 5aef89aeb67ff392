"""Classification of images: a folder of the user's own, CIFAR and SVHN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from meft.errors import ConfigError
from meft.loading import models as loading
from meft.loading.arguments import ModelArguments
from meft.training.data.base import LABEL, TaskData, TaskSpec
from meft.training.kinds.base import Collator, Encoded, Say, TaskKind
from meft.training.kinds.classification import classifier_options, predicted_labels
from meft_lab.tasks.image_tasks import IMAGE_TASKS
from meft_lab.tasks.images import load_images
from meft_lab.tasks.pixels import MIRROR, ROW, ImageCollator

if TYPE_CHECKING:
    from meft.training.arguments import DataArguments


class ImageClassification(TaskKind):
    """An image and its class. Rows keep images as stored; the collator makes pixels of them, a batch at a time."""

    what = "image classification"
    task_type = None  # PEFT has no name for it
    auto_model = AutoModelForImageClassification
    tasks = tuple(IMAGE_TASKS)
    options = ("validation_share", "augment")
    keep_columns = True

    def load_rows(
        self,
        arguments: DataArguments,
        splits: Sequence[str],
        *,
        config: PretrainedConfig,
        labels: Sequence[str] | None,
        cache_dir: str | None,
    ) -> TaskData:
        return load_images(
            arguments.task or "",
            arguments.data_dir,
            splits,
            labels=arguments.labels,
            trained=labels,
            outputs=[str(name) for _, name in sorted((config.id2label or {}).items())],
            validation_share=arguments.validation_share,
            cache_dir=cache_dir,
        )

    def load_processor(self, arguments: ModelArguments, name: str) -> BaseImageProcessor:
        return loading.load_image_processor(arguments, name)

    def has_processor(self, folder: str) -> bool:
        return loading.has_file(folder, "preprocessor_config.json")

    def configure(self, config: PretrainedConfig, spec: TaskSpec, processor: Any) -> None:
        config.num_labels = spec.outputs
        config.problem_type = "single_label_classification"
        config.id2label = dict(enumerate(spec.labels))
        config.label2id = {label: index for index, label in enumerate(spec.labels)}

    def check_model(self, model: PreTrainedModel, processor: Any, name: str) -> None:
        """Tries a black image: only the model knows which sizes it takes, for some take any."""
        pixels = processor(images=[Image.new("RGB", (64, 48))], return_tensors="pt")["pixel_values"]
        try:
            with torch.no_grad():
                model(pixel_values=pixels.to(model.device, model.dtype))
        except (ValueError, RuntimeError) as error:
            height, width = pixels.shape[-2:]
            raise ConfigError(
                f"The image processor of {name} makes images of {height} x {width} pixels, which the model does not "
                f"take: {str(error).rstrip('.')}. Mend the size in preprocessor_config.json, or give another model."
            ) from error

    def heads(self, model: PreTrainedModel, new_modules: Sequence[str]) -> tuple[str, ...]:
        return loading.heads_to_save(model, new_modules)

    def encode(
        self, data: TaskData, processor: Any, model: PreTrainedModel, arguments: DataArguments, say: Say
    ) -> Encoded:
        limits = {split: arguments.max_eval_samples for split in data.splits} | {"train": arguments.max_train_samples}
        splits = {split: _some_rows(rows, limits[split]) for split, rows in data.splits.items()}
        if "train" in splits:
            dropped = {"all": [], "move": [MIRROR], "none": [ROW, MIRROR]}[arguments.augment]
            splits["train"] = splits["train"].remove_columns(dropped)
        unlabelled = frozenset(split for split, rows in splits.items() if LABEL not in rows.column_names)
        return Encoded(splits, unlabelled=unlabelled)

    def collator(self, processor: Any) -> Collator:
        return ImageCollator(processor)

    def callbacks(self, collator: Any) -> list[TrainerCallback]:
        return [_Epochs(collator)]

    def trainer_options(self, spec: TaskSpec) -> dict[str, Any]:
        return classifier_options(spec)

    def predict(
        self, trainer: Any, processor: Any, spec: TaskSpec, rows: Dataset, questions: Dataset | None
    ) -> list[str]:
        return predicted_labels(trainer, spec, rows)


class _Epochs(TrainerCallback):
    """Tells the collator which epoch it is; in a run that goes on from the middle of one that is not the first."""

    def __init__(self, collator: ImageCollator) -> None:
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.collator.set_epoch(args.seed, int(state.epoch or 0))


def _some_rows(rows: Dataset, limit: int | None) -> Dataset:
    """The same rows every time, from all over: those of a folder come class by class."""
    if limit is None or limit >= len(rows):
        return rows
    chosen = np.random.default_rng(0).permutation(len(rows))[:limit]
    return rows.select(sorted(chosen.tolist()))
