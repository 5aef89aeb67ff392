"""The arguments of `meft train` and `meft evaluate`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from meft.errors import ConfigError
from meft.methods.arguments import MeftArguments
from meft.parsing import as_words, option, parse, read_mapping

from .data.files import FileOptions
from .numbers import check_numbers

__all__ = [
    "DataArguments",
    "EvaluationArguments",
    "MeftArguments",
    "RunArguments",
    "TrainerArguments",
    "as_words",
    "flat",
    "parse",
    "read_mapping",
]


@dataclass
class DataArguments:
    """The task: one known by name, or the user's own files."""

    _argument_group_name = "data"

    task: str | None = option(
        "A task known by name: rte, sst2, arc_easy, cifar10, ...; a name that is none lists them all."
    )
    data_dir: str | None = option("The task's official folder or a parent of it. Left out: the task from the hub.")
    train_file: str | None = option(
        "Your own training rows: a file (.jsonl, .json, .csv, .parquet, or .tsv, read without quoting), a folder of "
        "such files or of save_to_disk, or a name on the hub. What is learnt follows from the columns: messages, "
        "prompt and completion, chosen and rejected, or text train a language model; text and label a classifier."
    )
    validation_file: str | None = option(
        "Your own validation rows. Left out: for language models a tenth of the training rows, 200 at most."
    )
    test_file: str | None = option("Your own test rows; labels are optional.")
    form: Literal["conversations", "completions", "preferences", "text", "classes"] | None = option(
        "What your own rows are. Left out: seen from their columns."
    )
    columns: list[str] | None = field(
        default=None,
        metadata={"help": "Other names of columns: prompt=question completion=answer, say."},
    )
    packing: bool = option(
        "Pack several rows into one sequence of max_seq_length tokens, so that none is padding.", False
    )
    completion_only_loss: bool | None = option(
        "Learn the completions, or what the assistant says, alone; --no_completion_only_loss learns whole rows. Left "
        "out: yes, but for plain texts."
    )
    chat_template: str | None = option(
        "A file of Jinja that says how conversations are written. Left out: the model's."
    )
    dpo_beta: float = option("DPO: how much a model that comes to prefer the chosen answers may change.", 0.1)
    text_column: list[str] = field(
        default_factory=lambda: ["text"],
        metadata={"help": "The column of the text in your files, or two columns for pairs."},
    )
    label_column: str = option("The column of the label in your files.", "label")
    labels: list[str] | None = field(
        default=None, metadata={"help": "All labels of your files, in the order of the model's outputs."}
    )
    num_labels: int | None = option("Your labels are the numbers 0 to num_labels - 1.")
    regression: bool = option("Your labels are numbers to be predicted, not classes.", False)
    max_seq_length: int | None = option(
        "Longer texts are cut to this many tokens, longer questions are left out of training. Left out: what the model "
        "takes, and for language models on own rows at most 1024."
    )
    validation_share: float | None = option(
        "Hold out this share of the training rows (images: of every class's) for validation. 0.1 is a tenth."
    )
    augment: Literal["all", "move", "none"] = option(
        "Random changes to training images: all moves and mirrors them (SVHN's digits are not mirrored), move only "
        "moves them.",
        "all",
    )
    max_train_samples: int | None = option("Train on the first this many rows only; of images, on a fixed choice.")
    max_eval_samples: int | None = option("Evaluate on the first this many rows only; of images, on a fixed choice.")
    preprocessing_num_workers: int | None = option("Processes to tokenize with.")

    def file_options(self, labels: Sequence[str] | None = None) -> FileOptions:
        """The columns and labels of the user's own files; `labels` are those that a model has learnt."""
        names = self.labels or labels
        if self.num_labels is not None:
            if self.labels or self.regression or self.num_labels < 2:
                raise ConfigError(
                    f"num_labels is {self.num_labels}; it must be at least 2 and stand without --labels and "
                    "--regression."
                )
            names = [str(index) for index in range(self.num_labels)]
        chosen = tuple(names) if names and not self.regression else None
        return FileOptions(tuple(self.text_column), self.label_column, chosen, self.regression)

    def check_source(self, splits: Iterable[str]) -> None:
        """Refuses anything but one source of rows for each of the splits.

        Raises:
            ConfigError: There is no source, there are two, or a number of rows is not positive.
        """
        files = {name: getattr(self, f"{name}_file") for name in ("train", "validation", "test")}
        given = [f"--{name}_file" for name, path in files.items() if path]
        if self.task and given:
            raise ConfigError(f"--task {self.task} stands beside {', '.join(given)}; give one of the two.")
        if not self.task and self.data_dir:
            raise ConfigError(f"--data_dir {self.data_dir} stands without --task; name the task, --task rte say.")
        for name in _OWN_FILES if self.task else ():
            if getattr(self, name) != getattr(DataArguments(), name):
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r} beside --task {self.task}; it describes your own files. Leave "
                    "it out."
                )
        missing = [f"--{split}_file" for split in splits if not files[split]]
        if self.form != "classes" and self.form is not None and files["train"]:
            missing = []  # what is held out of the training rows
        if not self.task and missing:
            raise ConfigError(
                f"There is no data: give --task with the name of one, or your own rows with {' and '.join(missing)}."
            )
        if self.dpo_beta <= 0:
            raise ConfigError(
                f"dpo_beta is {self.dpo_beta}; it must be above 0. 0.1 is usual, and larger changes less."
            )
        for name in ("max_seq_length", "max_train_samples", "max_eval_samples", "preprocessing_num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1. Leave it out for no limit.")


@dataclass
class RunArguments:
    """The output folder and what is measured."""

    _argument_group_name = "run"

    resume: Literal["auto", "never"] = option(
        "auto goes on from the newest checkpoint when output_dir holds an unfinished run of the same arguments.", "auto"
    )
    overwrite_run: bool = option("Move a run that output_dir holds aside (nothing is deleted) and start anew.", False)
    measure_steps: int | None = option(
        "Before training, time this many steps against full fine-tuning (language models on own rows: against the same "
        "method without its coupling) and measure the peak memory of one. 0 measures nothing. Left out: 5, and 1 of "
        "language models on own rows."
    )
    total_train_batch_size: int | None = option(
        "Rows of one step of the optimizer over all processes and accumulated batches; gradient_accumulation_steps "
        "follows from it, so that a recipe means the same on any number of processes."
    )
    early_stopping_patience: int | None = option(
        "Stop after this many evaluations in a row without progress in metric_for_best_model. Left out: never."
    )


@dataclass
class EvaluationArguments:
    """What `meft evaluate` reads and writes."""

    _argument_group_name = "evaluation"

    base_model_name_or_path: str | None = option("An adapter's base model, when it is no longer where it was.")
    method: str | None = option(
        "Evaluate on the reversible backbone that the folder was trained on: lora+momentum, say. Left out: on the "
        "plain model, where what was trained runs on it."
    )
    split: Literal["validation", "test"] = option("The rows to evaluate on.", "validation")
    results_file: str | None = option("Write the metrics to this JSON file.")
    predictions_file: str | None = option("Write the predictions to this tab-separated file.")


@dataclass
class TrainerArguments(TrainingArguments):
    """The Trainer's own arguments, as Transformers documents them, but for defaults that suit method and task."""

    _argument_group_name = "Trainer of Transformers"

    learning_rate: float | None = option(  # type: ignore[assignment]
        "The largest learning rate. Left out: what suits the method and the task."
    )
    warmup_steps: float | None = option(  # type: ignore[assignment]
        "Steps over which the learning rate rises to it, or below 1 their share. Left out: a tenth where the "
        "learning rate is left out as well, else none."
    )
    logging_steps: float | None = option(  # type: ignore[assignment]
        "Print the loss every so many steps, or below 1 at every such share. Left out: some twenty times a run."
    )

    def __post_init__(self) -> None:
        check_numbers(self)
        self.output_dir_given = self.output_dir is not None
        usual = {field.name: field.default for field in fields(TrainingArguments)}
        self.left_out = tuple(name for name in SUITED if getattr(self, name) is None)
        for name in self.left_out:
            setattr(self, name, usual[name])
        if self.bf16 and not accelerated():
            self.use_cpu = True  # which Transformers asks for in so many words
        super().__post_init__()


SUITED = ("learning_rate", "warmup_steps", "logging_steps")
"""What suits method and task where it is left out."""


def accelerated() -> bool:
    """Whether there is anything faster than the processor."""
    return torch.accelerator.is_available()


# Options that mean nothing beside --task.
_OWN_FILES = ("text_column", "label_column", "num_labels", "regression")


def flat(*groups: Any) -> dict[str, Any]:
    """All arguments by name, as JSON has them."""
    found: dict[str, Any] = {}
    for group in groups:
        found |= group.to_dict() if isinstance(group, TrainerArguments) else asdict(group)
    plain = (bool, int, float, list, dict, type(None))
    return {name: value if isinstance(value, plain) else str(value) for name, value in found.items()}
