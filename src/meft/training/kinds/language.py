"""Language models on the user's own rows: conversations, completions, plain text; and preferences of answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedModel

from meft.errors import ConfigError, DataError, MissingPackageError
from meft.loading import models as loading

from ..data.base import TaskData, TaskSpec
from ..data.chats import COMPLETIONS, CONVERSATIONS, PLAIN, PREFERENCES, ROW, rows_of
from ..data.sources import Source, find_source, read_split, renamed
from ..data.tokens import check_template, encode_rows
from .base import Collator, Encoded, Say, first_rows
from .causal import CausalModelling

if TYPE_CHECKING:
    from ..arguments import DataArguments

MOST_TOKENS = 1024
"""The length of a row where none is asked for, as in TRL."""
_HELD_OUT, _MOST_HELD_OUT, _FEWEST_ROWS = 0.1, 200, 10
COLUMNS = {
    CONVERSATIONS: ("messages",),
    COMPLETIONS: ("prompt", "completion"),
    PREFERENCES: ("prompt", "chosen", "rejected"),
    PLAIN: ("text",),
}
WORDS = {
    CONVERSATIONS: "conversations",
    COMPLETIONS: "prompts with completions",
    PREFERENCES: "pairs of a chosen and a rejected answer",
    PLAIN: "plain texts",
}


class LanguageModel(CausalModelling):
    """Rows of one form, learnt token by token by TRL's SFTTrainer."""

    tasks: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = (
        "columns",
        "packing",
        "completion_only_loss",
        "chat_template",
        "validation_share",
    )
    method = "lora+momentum"
    measured_steps = 1
    trainer = "sft"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy")

    def __init__(self, form: str) -> None:
        self.form, self.rows = form, form

    def load_rows(
        self,
        arguments: DataArguments,
        splits: Sequence[str],
        *,
        config: PretrainedConfig,
        labels: Sequence[str] | None,
        cache_dir: str | None,
    ) -> TaskData:
        require_trl()
        found: dict[str, Dataset] = {}
        notes: list[str] = []
        beside = find_validation(arguments, cache_dir)

        @cache
        def whole(place: str) -> Dataset:
            # Read once, for what is trained on and what is held out.
            return self._rows(read_split(place, "train", cache_dir), arguments)

        for split in splits:
            rows = self._split(arguments, split, cache_dir, notes, beside, whole)
            if rows is not None:
                found[split] = rows
        if "train" in found:
            notes.insert(0, f"{len(found['train'])} rows to train on: {WORDS[self.form]}.")
        return TaskData(TaskSpec(self.form, (), self.metrics), found, tuple(notes))

    def _split(
        self,
        arguments: DataArguments,
        split: str,
        cache_dir: str | None,
        notes: list[str],
        beside: Source | None,
        whole: Callable[[str], Dataset],
    ) -> Dataset | None:
        """The rows of a split; None where there are none to validate on."""
        own = getattr(arguments, f"{split}_file")
        if own and (split != "train" or arguments.validation_file or beside):
            return self._rows(read_split(own, split, cache_dir), arguments)
        if split == "validation" and beside is not None:
            notes.append(f"Validation is on {beside.name}.")
            return self._rows(beside, arguments)
        if not arguments.train_file or split == "test":
            raise ConfigError(f"There are no {split} rows. Give them with --{split}_file.")
        rows = whole(arguments.train_file)
        kept, held = held_out(len(rows), arguments.validation_share)
        if split == "train":
            return rows.select(kept)
        if not held:
            notes.append("There are no rows to validate on: the loss is that of training alone.")
            return None
        notes.append(
            f"{len(held)} of the {len(rows)} rows are held out, to see the loss on rows that are not trained on; "
            "--validation_file gives others, --validation_share 0 none."
        )
        return rows.select(held)

    def _rows(self, source: Source, arguments: DataArguments) -> Dataset:
        return rows_of(renamed(source, arguments.columns), self.form)

    def encode(
        self, data: TaskData, processor: Any, model: PreTrainedModel, arguments: DataArguments, say: Say
    ) -> Encoded:
        set_template(processor, arguments.chat_template)
        longest = loading.longest_input(model, processor)
        usual = MOST_TOKENS if longest is None else min(MOST_TOKENS, longest)
        length = loading.context_length(model, processor, arguments.max_seq_length or usual)
        answers_only = self.form != PLAIN and arguments.completion_only_loss is not False
        encoded, truncated, skipped, messages = {}, {}, {}, False
        for split, rows in first_rows(data, arguments).items():
            messages = messages or needs_template(rows)
            if messages:
                check_template(processor, str(model.name_or_path))
            coded, cut, empty = encode_rows(
                rows,
                self.form,
                processor,
                length,
                answers_only=answers_only,
                workers=arguments.preprocessing_num_workers,
                title=split,
            )
            encoded[split], truncated[split], skipped[split] = coded, cut, empty
            _say_cut(split, len(rows), cut, empty, length, say)
        if "train" in encoded:
            say(self._said(answers_only, arguments.packing, encoded["train"], length))
        return Encoded(encoded, truncated, skipped, length=length, columns=COLUMNS[self.form], messages=messages)

    def _said(self, answers_only: bool, packing: bool, rows: Dataset, length: int) -> str:
        learnt = sum(label != -100 for labels in rows["labels"] for label in labels)
        tokens = sum(len(ids) for ids in rows["input_ids"])
        what = {CONVERSATIONS: "what the assistant says", COMPLETIONS: "the completions"}.get(self.form, "the texts")
        whole = self.form in (CONVERSATIONS, COMPLETIONS) and not answers_only
        packed = f", packed into sequences of {length}" if packing else ""
        said = "whole rows" if whole else f"{what} alone" if self.form != PLAIN else what
        return f"The loss is that of {said}: {learnt:,} of {tokens:,} tokens{packed}."

    def collator(self, processor: Any) -> Collator:
        raise NotImplementedError("TRL's trainers make their batches themselves")

    def predict(
        self, trainer: Any, processor: Any, spec: TaskSpec, rows: Dataset, questions: Dataset | None
    ) -> list[str]:
        raise ConfigError(
            "predictions_file was given, but a language model has no labels to predict. Leave it out; meft chat FOLDER "
            "shows what it answers."
        )


class Preferences(LanguageModel):
    """Pairs of answers, one of them better, learnt by TRL's DPOTrainer."""

    options: ClassVar[tuple[str, ...]] = ("columns", "chat_template", "dpo_beta", "validation_share")
    trainer = "dpo"
    metrics: ClassVar[tuple[str, ...]] = ("preferred", "margin")

    def __init__(self) -> None:
        super().__init__(PREFERENCES)

    def _said(self, answers_only: bool, packing: bool, rows: Dataset, length: int) -> str:
        tokens = sum(len(p) + len(a) + len(b) for p, a, b in zip(*(rows[n] for n in rows.column_names), strict=True))
        return f"Preferences are learnt by DPO, over {tokens:,} tokens."


def require_trl() -> None:
    """Refuses own rows for language models where TRL is not installed, before anything is loaded.

    Raises:
        MissingPackageError: It is not.
    """
    if find_spec("trl") is None:
        raise MissingPackageError(
            'Language models on own rows need trl, which is not installed. Install it with: pip install "meft[train]"'
        )


def find_validation(arguments: DataArguments, cache_dir: str | None) -> Source | None:
    """The rows for validation that lie beside those for training, unless others are asked for."""
    if not arguments.train_file or arguments.validation_file or arguments.validation_share is not None:
        return None
    if Path(arguments.train_file).is_file():
        return None
    return find_source(arguments.train_file, "validation", cache_dir)


def held_out(rows: int, share: float | None) -> tuple[list[int], list[int]]:
    """The places of rows to train on and of those held out, evenly spread; the same in every run.

    Raises:
        ConfigError: The share leaves nothing to train on.
    """
    if share is not None and not 0 <= share < 1:
        raise ConfigError(f"validation_share is {share}; it must be at least 0 and below 1. 0.1 is a tenth.")
    if share is None:
        count = 0 if rows < _FEWEST_ROWS else min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * rows)))
    else:
        count = min(rows - 1, max(1, round(share * rows))) if share else 0
    held = sorted({(2 * index + 1) * rows // (2 * count) for index in range(count)}) if count else []
    taken = set(held)
    return [index for index in range(rows) if index not in taken], held


def needs_template(rows: Dataset) -> bool:
    """Whether the first row has messages; all have what the first has."""
    return '"role": ' in str(rows[ROW][0]) if len(rows) else False


def set_template(tokenizer: Any, given: str | None) -> None:
    """Has conversations written as a file of Jinja says.

    Raises:
        ConfigError: There is no such file.
    """
    if given is None:
        return
    path = Path(given)
    if not path.is_file():
        raise ConfigError(
            f"chat_template is {given!r}, which is no file. Give a file of Jinja, chat_template.jinja say."
        )
    tokenizer.chat_template = path.read_text(encoding="utf-8")


def _say_cut(split: str, rows: int, cut: int, empty: int, length: int, say: Say) -> None:
    if empty == rows:
        raise DataError(
            f"None of the {rows} {split} rows has anything to learn within {length} tokens. Give a larger "
            "--max_seq_length."
        )
    if cut:
        say(f"{cut} of {rows} {split} rows are longer than {length} tokens and were cut; --max_seq_length takes more.")
    if empty:
        say(f"{empty} of {rows} {split} rows have nothing to learn within {length} tokens and were left out.")
