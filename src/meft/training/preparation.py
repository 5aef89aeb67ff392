"""Models and encoded rows, ready for the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig, enable_full_determinism, set_seed

from meft.backbone.conversion import make_reversible
from meft.errors import ConfigError, DataError
from meft.loading import models as loading
from meft.loading.arguments import ModelArguments
from meft.loading.folders import adapter_config, is_adapter, load_adapter
from meft.methods.registry import Way, apply_method, read_way
from meft.options import FUNCTION, options_of

from .arguments import DataArguments, MeftArguments
from .data.base import TaskData, TaskSpec
from .data.digest import digests
from .kinds import TaskKind, check_options, own_kind
from .kinds.base import Collator, Say, Scorer
from .recorded import read_task


@dataclass(frozen=True)
class Prepared:
    """A model with its encoded rows.

    Attributes:
        kind: The kind of the task.
        model: On the CPU, with its method applied.
        processor: What encoded the rows: a tokenizer, say.
        spec: The task's labels and metrics.
        splits: Encoded rows by split, named as in `TaskData.splits`.
        truncated: How many rows of a split were cut to the length that the model takes.
        skipped: How many rows of a split were left out.
        questions: Rows by split that are scored as texts.
        unlabelled: The splits without labels.
        way: How the model is trained; `None` for one that is only evaluated.
        digests: Of the rows of each split, where something is trained on them.
        reference: Builds the same model for plain full fine-tuning. `None` when nothing is trained.
        length: The most tokens that a row has, where that was chosen.
        columns: The names of the columns that are learnt from, where the rows are the user's own.
        messages: Whether rows are messages, written by the chat template.
        data: What the user said about the data, where its trainer must know.
    """

    kind: TaskKind
    model: nn.Module
    processor: Any
    spec: TaskSpec
    splits: Mapping[str, Dataset]
    truncated: Mapping[str, int]
    skipped: Mapping[str, int]
    questions: Mapping[str, Dataset] = field(default_factory=dict)
    unlabelled: frozenset[str] = frozenset()
    way: Way | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    reference: Callable[[], nn.Module] | None = None
    data: DataArguments | None = None
    length: int | None = None
    columns: tuple[str, ...] = ()
    messages: bool = False

    @property
    def collator(self) -> Collator:
        """Makes batches of the encoded rows."""
        return self.kind.collator(self.processor)

    def evaluation(self, split: str) -> dict[str, Dataset]:
        """The rows that `split` stands for, by what follows in their names: MNLI has two of each."""
        return {name[len(split) :].lstrip("_"): rows for name, rows in self.splits.items() if name.startswith(split)}

    def scorer(self, split: str, *, batch_size: int, quiet: bool) -> Scorer | None:
        """Scores the questions of `split`, where there are any with known answers."""
        if split not in self.questions or split in self.unlabelled:
            return None
        questions = self.questions[split]
        return self.kind.scorer(self.processor, self.spec, questions, batch_size=batch_size, quiet=quiet)


def prepare_training(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    meft_arguments: MeftArguments,
    *,
    seed: int,
    deterministic: bool = False,
    say: Say,
    settings: Mapping[str, Any] | None = None,
    kind: TaskKind | None = None,
) -> Prepared:
    """Loads data and model, seeds every generator, and applies the method.

    `settings` are those that a run which goes on began with, for options that are left open. `kind` is that of
    `chosen_kind`, where it was asked before: of own rows it takes reading them.

    Raises:
        ConfigError, DataError, CheckpointError, UnsupportedModelError: Something given is not valid.
    """
    name = loading.absolute(model_arguments.model_name_or_path)
    if is_adapter(name):
        raise ConfigError(f"{name} is an adapter, not a model. Give the base model to train a new adapter on.")
    kind = kind or chosen_kind(model_arguments, data_arguments)
    config = loading.load_config(model_arguments, name, kind.what)
    data = _load_rows(kind, data_arguments, ("train", "validation"), config, None, model_arguments.cache_dir, say)
    processor = kind.load_processor(model_arguments, name)
    enable_full_determinism(seed) if deterministic else set_seed(seed)
    base, new_modules = kind.load_model(model_arguments, name, data.spec, processor)
    kind.check_model(base, processor, name)
    if new_modules:
        say(f"The checkpoint has no weights for {', '.join(new_modules)}; they start at random and are trained.")
    encoded = kind.encode(data, processor, base, data_arguments, say)
    check_labelled(encoded.unlabelled)
    way = meft_arguments.way(settings=settings)
    if way.takes("modules_to_save"):
        named = (*(way.options.get("modules_to_save") or ()), *kind.heads(base, new_modules))
        way = read_way(way.name, {**way.options, "modules_to_save": tuple(dict.fromkeys(named)) or None})
    model = way.apply(base, kind.task_type)

    def reference() -> nn.Module:
        plain, _ = kind.load_model(model_arguments, name, data.spec, processor)
        return apply_method(plain, "full", task_type=kind.task_type)

    return Prepared(
        kind,
        model,
        processor,
        data.spec,
        **vars(encoded),
        way=way,
        digests=digests(data),
        reference=reference,
        data=data_arguments,
    )


def chosen_kind(model_arguments: ModelArguments, data_arguments: DataArguments) -> TaskKind:
    """The kind of the task, which for own rows is written into their arguments, so that it is known from now on.

    Raises:
        ConfigError, DataError, MissingPackageError: As of `own_kind`.
    """
    kind = own_kind(data_arguments, model_arguments)
    if kind.rows:
        data_arguments.form = kind.rows  # type: ignore[assignment]
    return kind


def prepare_evaluation(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    split: str,
    *,
    base: str | None = None,
    method: str | None = None,
    say: Say,
) -> Prepared:
    """Loads data and a trained model: a run's output folder, a checkpoint, an adapter or an ordinary model.

    An adapter is put on the model called `base`, or on the one that it names itself. What was trained on a reversible
    backbone is loaded on the plain model, as everybody else loads it, unless `method` names the way it was trained.

    Raises:
        ConfigError, DataError, CheckpointError, UnsupportedModelError: Something given is not valid.
    """
    kind = chosen_kind(model_arguments, data_arguments)
    name = loading.absolute(model_arguments.model_name_or_path)
    base_name = name
    if is_adapter(name):
        said = adapter_config(Path(name), kind.task_type).base_model_name_or_path
        base_name = loading.absolute(base or said or "")
    config = loading.load_config(model_arguments, base_name, kind.what)
    labels = read_task(name).labels
    data = _load_rows(kind, data_arguments, (split,), config, labels, model_arguments.cache_dir, say)
    processor = kind.load_processor(model_arguments, name if kind.has_processor(name) else base_name)
    model: nn.Module
    plain, new_modules = kind.load_model(model_arguments, base_name, data.spec, processor)
    kind.check_model(plain, processor, base_name)
    encoded = kind.encode(data, processor, plain, data_arguments, say)
    if base_name == name:
        loading.check_trained(name, new_modules)
        model = plain
    else:
        model = load_adapter(plain, Path(name), base_name=base_name)
    if method is not None:
        _as_trained(model, name, method)
    reference = None
    if kind.trainer == "dpo" and base_name == name:
        reference = _preferred_from(kind, model_arguments, name, base, data.spec, processor)
    return Prepared(kind, model.eval(), processor, data.spec, **vars(encoded), reference=reference, data=data_arguments)


def _preferred_from(
    kind: TaskKind, arguments: ModelArguments, name: str, base: str | None, spec: TaskSpec, processor: Any
) -> Callable[[], nn.Module]:
    """Builds the model that a whole model was trained from, which its preferences are measured against.

    Raises:
        ConfigError: It was not given; a folder is not believed about other folders.
    """
    if base is None:
        raise ConfigError(
            f"{name} is a whole model, and preferences are measured against what it was trained from. Give that "
            "model with --base_model_name_or_path."
        )
    return lambda: kind.load_model(arguments, base, spec, processor)[0]


def _as_trained(model: nn.Module, name: str, method: str) -> None:
    """Puts a trained model on the reversible backbone that it was trained on.

    Raises:
        ConfigError: The way has no backbone of its own, or the folder does not say that it was trained so.
    """
    way, trained = read_way(method), read_task(name)
    if way.under is None:
        raise ConfigError(
            f"method is {method!r}, under which there is no reversible backbone. Leave --method out: a folder is "
            "evaluated as what it holds."
        )
    if trained.method != way.name:
        said = f"was trained by {trained.method}" if trained.method else "does not say how it was trained"
        raise ConfigError(
            f"method is {method!r}, but {name} {said}. Give --method as it was trained by, or leave it out for the "
            "plain model."
        )
    known = options_of(FUNCTION)
    words = {option: value for option, value in (trained.options or {}).items() if option in known}
    make_reversible(model, coupling=way.under, **{option: known[option].read(value) for option, value in words.items()})


def check_labelled(unlabelled: Collection[str], hint: str = "") -> None:
    """Refuses splits without labels.

    Raises:
        DataError: There are any.
    """
    if unlabelled:
        raise DataError(
            f"The {' and '.join(sorted(unlabelled))} rows have no labels, so they cannot be scored. Give rows that "
            f"have some{hint}."
        )


def _load_rows(
    kind: TaskKind,
    arguments: DataArguments,
    splits: Sequence[str],
    config: PretrainedConfig,
    labels: Sequence[str] | None,
    cache_dir: str | None,
    say: Say,
) -> TaskData:
    """`labels` are those that the model was trained for, in the order of its outputs, where that is known."""
    arguments.check_source(splits)
    check_options(arguments, kind)
    data = kind.load_rows(arguments, splits, config=config, labels=labels, cache_dir=cache_dir)
    for note in data.notes:
        say(note)
    return data
