"""From texts to token ids."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .base import LABEL, TEXT, TEXT_PAIR

_TRUNCATED = "truncated"


def encode(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, workers: int | None = None, title: str = ""
) -> tuple[Dataset, int]:
    """Tokenizes the texts of `rows`, cut at `max_length` tokens, longest text of a pair first.

    Args:
        rows: Columns as in `TaskData.splits`.
        tokenizer: The model's tokenizer.
        max_length: The most tokens that a row may have, special tokens included.
        workers: Processes to tokenize with; `None` for this one alone.
        title: What the progress bar says, the name of the split.

    Returns:
        The rows as the tokenizer's columns beside `label`, unpadded, and how many of them were cut.
    """

    def encode_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pair = batch.get(TEXT_PAIR)
        encoded = tokenizer(batch[TEXT], pair, truncation=True, max_length=max_length)
        columns: dict[str, list[Any]] = dict(encoded)
        if encoded.is_fast:
            cut = [bool(encoding.overflowing) for encoding in encoded.encodings or []]
        else:
            whole = tokenizer(batch[TEXT], pair, truncation=False, verbose=False)["input_ids"]
            cut = [len(ids) > max_length for ids in whole]
        return columns | {_TRUNCATED: cut}

    texts = [name for name in rows.column_names if name != LABEL]
    # A fingerprint of our own: hashing the tokenizer is slow and warns, and rows in memory are not cached anyway.
    encoded = rows.map(
        encode_batch,
        batched=True,
        remove_columns=texts,
        num_proc=workers,
        desc=f"Tokenizing {title}".strip(),
        new_fingerprint=f"{rows._fingerprint}-{max_length}",
    )
    return encoded.remove_columns(_TRUNCATED), sum(encoded[_TRUNCATED])
