"""From questions to token ids, split into prompt and answer as lm-eval splits them.

lm-eval encodes the prompt and the whole text, and calls whatever the whole has beyond the prompt's length the answer;
white space at the end of a prompt goes to the answer. Training on the same split means training on what is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .multiple_choice import ANSWER, CHOICES, PROMPT

IGNORED = -100  # the label of tokens without a loss, as PyTorch and Transformers have it
FITS = "fits"
# Between prompt and answer, in lm-eval's tasks as here.
_DELIMITER = " "


def split_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """The tokens of each prompt and those of the answer that follows it."""
    contexts = [prompt.rstrip() for prompt in prompts]
    wholes = [prompt + _DELIMITER + answer for prompt, answer in zip(prompts, answers, strict=True)]
    before = tokenizer(contexts, verbose=False)["input_ids"]
    whole = tokenizer(wholes, verbose=False)["input_ids"]
    return [(context, ids[len(context) :]) for context, ids in zip(before, whole, strict=True)]


def encode_answers(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, workers: int | None = None, title: str = ""
) -> tuple[Dataset, int]:
    """Encodes each prompt with its right answer for language modelling, with a loss on the answer alone.

    Args:
        rows: Questions with answers, columns as in `TaskData.splits`.
        tokenizer: The model's tokenizer.
        max_length: Questions of more tokens, answer included, are left out.
        workers: Processes to tokenize with; `None` for this one alone.
        title: What the progress bar says, the name of the split.

    Returns:
        The rows as `input_ids`, `attention_mask` and `labels`, unpadded, and how many questions were left out.
    """

    def encode_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        right = [choices[answer] for choices, answer in zip(batch[CHOICES], batch[ANSWER], strict=True)]
        columns: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for context, answer in split_tokens(tokenizer, batch[PROMPT], right):
            if answer and len(context) + len(answer) <= max_length:
                columns["input_ids"].append(context + answer)
                columns["attention_mask"].append([1] * (len(context) + len(answer)))
                columns["labels"].append([IGNORED] * len(context) + answer)
        return columns

    encoded = rows.map(
        encode_batch,
        batched=True,
        remove_columns=rows.column_names,
        num_proc=workers,
        desc=f"Tokenizing {title}".strip(),
        new_fingerprint=f"{rows._fingerprint}-answers-{max_length}",
    )
    return encoded, len(rows) - len(encoded)


def mark_fitting(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Dataset, int]:
    """Adds a column that says whether prompt and choice are at most `max_length` tokens for every choice.

    Returns:
        The rows with the column `fits`, and how many do not fit.
    """
    fits = []
    for prompt, choices in zip(rows[PROMPT], rows[CHOICES], strict=True):
        pairs = split_tokens(tokenizer, [prompt] * len(choices), choices)
        fits.append(all(answer and len(context) + len(answer) <= max_length for context, answer in pairs))
    return rows.add_column(FITS, fits), fits.count(False)


def fitting(rows: Dataset) -> Dataset:
    """The rows that `mark_fitting` found to fit."""
    return rows.select([index for index, fits in enumerate(rows[FITS]) if fits])
