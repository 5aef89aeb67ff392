"""Models and encoded rows, ready for the Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase, enable_full_determinism, set_seed

from meft.errors import ConfigError
from meft.methods import apply_method
from meft.storage import read_json
from meft.tasks import GLUE_TASKS, TaskData, TaskSpec, load_files, load_glue
from meft.tasks.base import LABEL
from meft.tasks.encode import encode
from meft.training import loading
from meft.training.arguments import DataArguments, MeftArguments, ModelArguments

Say = Callable[[str], None]
# Beside every saved model: the labels it was trained for, and what evaluating it alike takes.
TASK_FILE = "task.json"


@dataclass(frozen=True)
class Prepared:
    """A model with its encoded rows.

    Attributes:
        model: On the CPU, with its method applied.
        tokenizer: The tokenizer that encoded the rows.
        spec: The task's labels and metrics.
        splits: Encoded rows by split, named as in `TaskData.splits`.
        truncated: How many rows of a split were cut to the length that the model takes.
        reference: Builds the same model for plain full fine-tuning. `None` when nothing is trained.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    spec: TaskSpec
    splits: Mapping[str, Dataset]
    truncated: Mapping[str, int]
    reference: Callable[[], nn.Module] | None = None

    def evaluation(self, split: str) -> dict[str, Dataset]:
        """The rows that `split` stands for, by what follows in their names: MNLI has two of each."""
        return {name[len(split) :].lstrip("_"): rows for name, rows in self.splits.items() if name.startswith(split)}


def prepare_training(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    meft_arguments: MeftArguments,
    *,
    seed: int,
    deterministic: bool = False,
    say: Say,
) -> Prepared:
    """Loads data and model, seeds every generator, and applies the method.

    Raises:
        ConfigError, DataError, CheckpointError, UnsupportedModelError: Something given is not valid.
    """
    name = loading.absolute(model_arguments.model_name_or_path)
    if loading.is_adapter(name):
        raise ConfigError(f"{name} is an adapter, not a model. Give the base model to train a new adapter on.")
    config = loading.load_config(model_arguments, name)
    data = _load_data(data_arguments, ("train", "validation"), config, None, model_arguments.cache_dir)
    tokenizer = loading.load_tokenizer(model_arguments, name)
    enable_full_determinism(seed) if deterministic else set_seed(seed)
    base, new_modules = loading.load_model(model_arguments, name, data.spec, tokenizer)
    if new_modules:
        say(f"The checkpoint has no weights for {', '.join(new_modules)}; they start at random and are trained.")
    length = loading.context_length(base, tokenizer, data_arguments.max_seq_length)
    inputs = set(inspect.signature(base.forward).parameters)
    options = vars(meft_arguments.options())
    if meft_arguments.method != "full":
        heads = loading.heads_to_save(base, new_modules)
        options["modules_to_save"] = tuple(dict.fromkeys((*(options["modules_to_save"] or ()), *heads))) or None
    model = apply_method(base, meft_arguments.method, task_type="SEQ_CLS", **options)
    splits, truncated = _encode(data, tokenizer, data_arguments, length, inputs, say)

    def reference() -> nn.Module:
        plain, _ = loading.load_model(model_arguments, name, data.spec, tokenizer)
        return apply_method(plain, "full", task_type="SEQ_CLS")

    return Prepared(model, tokenizer, data.spec, splits, truncated, reference)


def prepare_evaluation(
    model_arguments: ModelArguments, data_arguments: DataArguments, split: str, *, base: str | None = None, say: Say
) -> Prepared:
    """Loads data and a trained model: a run's output folder, a checkpoint, an adapter or an ordinary model.

    An adapter is put on the model called `base`, or on the one that it names itself.

    Raises:
        ConfigError, DataError, CheckpointError, UnsupportedModelError: Something given is not valid.
    """
    name = loading.absolute(model_arguments.model_name_or_path)
    base_name = name
    if loading.is_adapter(name):
        said = loading.load_adapter_config(name).base_model_name_or_path
        base_name = loading.absolute(base or said or "")
    config = loading.load_config(model_arguments, base_name)
    data = _load_data(data_arguments, (split,), config, read_task_file(name).get("labels"), model_arguments.cache_dir)
    has_tokenizer = (Path(name) / "tokenizer_config.json").is_file()
    tokenizer = loading.load_tokenizer(model_arguments, name if has_tokenizer else base_name)
    model: nn.Module
    plain, new_modules = loading.load_model(model_arguments, base_name, data.spec, tokenizer)
    length = loading.context_length(plain, tokenizer, data_arguments.max_seq_length)
    inputs = set(inspect.signature(plain.forward).parameters)
    if base_name == name:
        loading.check_trained(name, new_modules)
        model = plain
    else:
        model = loading.load_adapter(plain, name, base_name)
    splits, truncated = _encode(data, tokenizer, data_arguments, length, inputs, say)
    return Prepared(model.eval(), tokenizer, data.spec, splits, truncated)


def read_task_file(name: str) -> dict[str, Any]:
    """What `task.json` in a model's folder says; nothing when there is none."""
    path = Path(name) / TASK_FILE
    return read_json(path) if path.is_file() else {}


def _load_data(
    arguments: DataArguments,
    splits: Sequence[str],
    config: PretrainedConfig,
    labels: Sequence[str] | None,
    cache_dir: str | None,
) -> TaskData:
    """`labels` are those that the model was trained for, in the order of its outputs, where that is known."""
    arguments.check_source(splits)
    if arguments.task:
        order = labels or _label_order(config, arguments.task)
        return load_glue(arguments.task, arguments.data_dir, splits, labels=order, cache_dir=cache_dir)
    files = {split: getattr(arguments, f"{split}_file") for split in splits}
    return load_files(files, arguments.file_options(labels))


def _label_order(config: PretrainedConfig, task: str) -> tuple[str, ...] | None:
    """The task's labels as the model orders them: an MNLI model may well call contradiction 0."""
    labels = GLUE_TASKS[task].labels if task in GLUE_TASKS else ()
    own = [str(name).lower() for _, name in sorted((config.id2label or {}).items())]
    return tuple(own) if labels and set(own) == set(labels) and len(own) == len(labels) else None


def _encode(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    length: int,
    inputs: set[str],
    say: Say,
) -> tuple[dict[str, Dataset], dict[str, int]]:
    for note in data.notes:
        say(note)
    limits = {"train": arguments.max_train_samples}
    encoded, truncated = {}, {}
    for split, rows in data.splits.items():
        limit = limits.get(split, arguments.max_eval_samples)
        chosen = rows.select(range(min(limit or len(rows), len(rows))))
        coded, truncated[split] = encode(
            chosen, tokenizer, length, workers=arguments.preprocessing_num_workers, title=split
        )
        encoded[split] = coded.select_columns([name for name in coded.column_names if name in inputs or name == LABEL])
        if truncated[split]:
            say(f"{truncated[split]} of {len(chosen)} {split} rows are longer than {length} tokens and were cut.")
    return encoded, truncated
