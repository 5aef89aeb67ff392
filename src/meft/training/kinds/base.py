"""What `meft train` must know of a kind of task: its rows, its model, its batches, its scores.

A kind is an object without state. `meft.training.kinds.KINDS` lists them all; the name given as `--task` chooses one.
Packages add kinds through the entry points of the group "meft.tasks", each of which is a tuple of kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, TrainerCallback

from meft.loading import models as loading
from meft.loading.arguments import ModelArguments

from ..data.base import TaskData, TaskSpec

if TYPE_CHECKING:
    from ..arguments import DataArguments

Say = Callable[[str], None]
Collator = Callable[[list[Any]], dict[str, Any]]
# From the model to its scores by name.
Scorer = Callable[[nn.Module], dict[str, float]]


def say_nothing(_: str) -> None:
    """A `Say` for processes that are not the one to speak, and for runs of which something else tells."""


@dataclass(frozen=True)
class Encoded:
    """Rows as the model takes them.

    Attributes:
        splits: Encoded rows by split, named as in `TaskData.splits`.
        truncated: How many rows of a split were cut to the length that the model takes.
        skipped: How many rows of a split were left out because cutting them would lose what is asked or answered.
        questions: Rows by split that are scored as texts, beside those of `splits`.
        unlabelled: The splits without labels, which can be predicted but not scored.
        length: The most tokens that a row has, where that was chosen.
        columns: The names of the columns that are learnt from, where the rows are the user's own.
        messages: Whether rows are messages, written by the chat template.
    """

    splits: dict[str, Dataset]
    truncated: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    questions: dict[str, Dataset] = field(default_factory=dict)
    unlabelled: frozenset[str] = frozenset()
    length: int | None = None
    columns: tuple[str, ...] = ()
    messages: bool = False


class TaskKind(ABC):
    """A kind of task; subclass it, and name a tuple of instances as an entry point "meft.tasks", to add another.

    Attributes:
        what: What the model is for, in messages: `"sequence classification"`.
        task_type: PEFT's task type, or `None` where PEFT has none.
        auto_model: The Auto class of Transformers that loads the model.
        tasks: What `--task` may be; empty for the user's own files.
        options: The data arguments that belong to this kind alone, or to a few.
        rows: What the user's own rows of this kind are called in messages; empty for tasks by name.
        method: The way to train where none is asked for.
        measured_steps: How many steps are timed before training where nothing else is asked for.
        trainer: Which trainer of `meft.training.trainers` it is trained by.
        keep_columns: Whether the rows have columns that the model's `forward` does not name, for the collator.
    """

    what: ClassVar[str]
    task_type: ClassVar[str | None]
    auto_model: ClassVar[Any]
    tasks: ClassVar[tuple[str, ...]]
    options: ClassVar[tuple[str, ...]] = ()
    rows: str = ""
    method: ClassVar[str] = "meft1"
    measured_steps: ClassVar[int] = 5
    trainer: ClassVar[str] = "classic"
    keep_columns: ClassVar[bool] = False

    @abstractmethod
    def load_rows(
        self,
        arguments: DataArguments,
        splits: Sequence[str],
        *,
        config: PretrainedConfig,
        labels: Sequence[str] | None,
        cache_dir: str | None,
    ) -> TaskData:
        """Loads splits of the task from local files or from the hub.

        Args:
            arguments: What the user said about the data.
            splits: Any of `"train"`, `"validation"` and `"test"`.
            config: The model's configuration, which may order the labels in its own way.
            labels: The labels that the model was trained for, in the order of its outputs, where that is known.
            cache_dir: Where the hub's files are kept.

        Raises:
            ConfigError, DataError: Something given is not valid.
        """

    def load_processor(self, arguments: ModelArguments, name: str) -> Any:
        """What turns rows into inputs and is saved beside the model: a tokenizer, unless a kind has another."""
        return loading.load_tokenizer(arguments, name)

    def has_processor(self, folder: str) -> bool:
        """Whether a trained model's folder has a processor of its own; else that of its base is taken."""
        return loading.has_file(folder, "tokenizer_config.json")

    @abstractmethod
    def configure(self, config: PretrainedConfig, spec: TaskSpec, processor: Any) -> None:
        """Changes a model's configuration, before it is loaded, to what the task needs."""

    def load_model(
        self, arguments: ModelArguments, name: str, spec: TaskSpec, processor: Any
    ) -> tuple[PreTrainedModel, list[str]]:
        """The model, and the modules that its checkpoint has no weights for; errors as of `loading.load_model`."""
        config = loading.load_config(arguments, name, self.what)
        self.configure(config, spec, processor)
        return loading.load_model(arguments, name, config, self.auto_model, self.what)

    def check_model(self, model: PreTrainedModel, processor: Any, name: str) -> None:
        """Refuses a model and a processor that do not belong together.

        Raises:
            ConfigError, UnsupportedModelError: They do not.
        """
        loading.check_vocabulary(model, processor, name)

    @abstractmethod
    def heads(self, model: PreTrainedModel, new_modules: Sequence[str]) -> tuple[str, ...]:
        """The modules trained in full and saved beside an adapter, but for those that PEFT knows from `task_type`."""

    @abstractmethod
    def encode(
        self, data: TaskData, processor: Any, model: PreTrainedModel, arguments: DataArguments, say: Say
    ) -> Encoded:
        """Turns rows into the model's inputs, and says how many were cut or left out."""

    @abstractmethod
    def collator(self, processor: Any) -> Collator:
        """Makes batches of encoded rows; the labels are called `labels` in a batch."""

    def callbacks(self, collator: Collator) -> list[TrainerCallback]:
        """Callbacks of the Trainer that `collator` makes the batches of."""
        return []

    def trainer_options(self, spec: TaskSpec) -> dict[str, Any]:
        """Arguments of the Trainer: `compute_metrics` and what goes with it."""
        return {}

    def scorer(
        self, processor: Any, spec: TaskSpec, questions: Dataset, *, batch_size: int, quiet: bool
    ) -> Scorer | None:
        """Scores a model beyond its loss and `compute_metrics`, at every evaluation of `Encoded.questions`."""
        return None

    @abstractmethod
    def predict(
        self, trainer: Any, processor: Any, spec: TaskSpec, rows: Dataset, questions: Dataset | None
    ) -> list[str]:
        """A prediction for each row of a split, as text; `questions` are those of `Encoded.questions`."""


def first_rows(data: TaskData, arguments: DataArguments) -> dict[str, Dataset]:
    """The splits, each cut to as many rows as the user asked for."""
    limits = {"train": arguments.max_train_samples}
    most = {split: limits.get(split, arguments.max_eval_samples) or len(rows) for split, rows in data.splits.items()}
    return {split: rows.select(range(min(most[split], len(rows)))) for split, rows in data.splits.items()}
