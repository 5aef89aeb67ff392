"""Questions with choices: trained as language modelling of the answer, scored as multiple choice."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from meft.errors import DataError
from meft.loading import models as loading
from meft.training.data.base import TaskData, TaskSpec
from meft.training.data.known import check_known
from meft.training.kinds.base import Collator, Encoded, Say, Scorer, first_rows
from meft.training.kinds.causal import CausalModelling
from meft_lab.tasks import QUESTION_TASKS, load_multiple_choice
from meft_lab.tasks.answers import FITS, IGNORED, encode_answers, fitting, mark_fitting
from meft_lab.tasks.harness import require_harness, score_choices
from meft_lab.tasks.multiple_choice import ANSWER

if TYPE_CHECKING:
    from meft.training.arguments import DataArguments


class MultipleChoice(CausalModelling):
    """A question and the right one of several answers, by a language model."""

    tasks = tuple(QUESTION_TASKS)

    def load_rows(
        self,
        arguments: DataArguments,
        splits: Sequence[str],
        *,
        config: PretrainedConfig,
        labels: Sequence[str] | None,
        cache_dir: str | None,
    ) -> TaskData:
        require_harness()
        return load_multiple_choice(arguments.task or "", arguments.data_dir, splits, cache_dir=cache_dir)

    def encode(
        self, data: TaskData, processor: Any, model: PreTrainedModel, arguments: DataArguments, say: Say
    ) -> Encoded:
        length = loading.context_length(model, processor, arguments.max_seq_length)
        unlabelled = frozenset(split for split, rows in data.splits.items() if ANSWER not in rows.column_names)
        encoded, skipped, questions = {}, {}, {}
        for split, rows in first_rows(data, arguments).items():
            # --max_seq_length is for training; scores are those of the whole questions, as lm-eval has them.
            limit = length if split == "train" else loading.longest_input(model, processor) or length
            kept = rows
            if split != "train":
                questions[split], _ = mark_fitting(rows, processor, limit)
                kept = fitting(questions[split])
            if split not in unlabelled:
                workers = arguments.preprocessing_num_workers
                kept, _ = encode_answers(kept, processor, limit, workers=workers, title=split)
                if len(kept):  # none has an error of its own
                    check_known(kept, processor, split, say)
            encoded[split], skipped[split] = kept, len(rows) - len(kept)
            _say_skipped(split, len(kept), skipped[split], limit, say)
        return Encoded(encoded, {}, skipped, questions, unlabelled)

    def collator(self, processor: Any) -> Collator:
        return partial(_pad, tokenizer=processor)

    def scorer(
        self, processor: Any, spec: TaskSpec, questions: Dataset, *, batch_size: int, quiet: bool
    ) -> Scorer | None:
        rows = fitting(questions)

        def score(model: nn.Module) -> dict[str, float]:
            return score_choices(model, processor, rows, name=spec.name, batch_size=batch_size, quiet=quiet).metrics

        return score

    def predict(
        self, trainer: Any, processor: Any, spec: TaskSpec, rows: Dataset, questions: Dataset | None
    ) -> list[str]:
        """The index of the choice with the highest log-likelihood, as `acc` has it; -1 for a question left out."""
        assert questions is not None
        found = score_choices(
            trainer.model,
            processor,
            fitting(questions),
            name=spec.name,
            batch_size=trainer.args.per_device_eval_batch_size,
            quiet=bool(trainer.args.disable_tqdm),
        )
        best = iter([max(range(len(each)), key=each.__getitem__) for each in found.loglikelihoods])
        return [str(next(best) if fits else -1) for fits in questions[FITS]]


def _say_skipped(split: str, kept: int, skipped: int, limit: int, say: Say) -> None:
    total = kept + skipped
    if not kept:
        raise DataError(
            f"None of the {total} {split} questions fits into {limit} tokens with its answer. Take a model with a "
            "longer context, or give a larger --max_seq_length."
        )
    if skipped:
        say(f"{skipped} of {total} {split} questions need more than {limit} tokens with an answer and were left out.")


def _pad(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """A batch padded on the right, as lm-eval pads: what is on the right of a token cannot change it."""
    fill = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}
    longest = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
        for name, value in fill.items()
    }
