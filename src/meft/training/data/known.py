"""Whether a tokenizer knows the texts: one that is not the model's turns them into unknown tokens, or into none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from datasets import Dataset

from meft.errors import DataError

NEARLY_ALL = 0.9
"""The share of unknown tokens from which on a text says nothing."""


def check_known(rows: Dataset, tokenizer: Any, split: str, say: Callable[[str], None]) -> None:
    """Says how many tokens of encoded rows are unknown to the tokenizer.

    Args:
        rows: With a column `input_ids`.
        tokenizer: That encoded them.
        split: What the rows are called in messages.
        say: Called with the sentence, where there are any.

    Raises:
        DataError: Nearly all are, or there are no tokens at all but those that every text has.
    """
    special = {int(each) for each in tokenizer.all_special_ids or ()}
    others = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "cls", "sep", "mask")}
    unknown_id = tokenizer.unk_token_id
    # Where one token means several things (GPT-2), nothing can be told from it.
    unknown_id = None if unknown_id in others else unknown_id
    words = unknown = 0
    for ids in _ids(rows):
        words += int(np.isin(ids, list(special - {unknown_id}), invert=True).sum())
        unknown += 0 if unknown_id is None else int((ids == unknown_id).sum())
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if words == 0 and len(rows):
        raise DataError(
            f"The {split} rows have no words: every one of {len(rows)} is empty or was encoded as nothing by the "
            f"tokenizer of {name}, which knows {len(tokenizer)} tokens. Give rows with texts, and a tokenizer that was "
            "made for them with --tokenizer_name."
        )
    if unknown > NEARLY_ALL * words:
        raise DataError(
            f"The tokenizer of {name}, which knows {len(tokenizer)} tokens, does not know {unknown} of {words} tokens "
            f"of the {split} rows, so there is nothing to learn from. Is the model's tokenizer missing from its "
            "folder? Copy it there, or give one with --tokenizer_name."
        )
    if unknown:
        say(f"{unknown} of {words} tokens of the {split} rows are unknown to the tokenizer.")


def _ids(rows: Dataset) -> Iterable[Any]:
    for table in rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=1000):
        yield table["input_ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
