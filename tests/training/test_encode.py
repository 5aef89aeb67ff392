from __future__ import annotations

from pathlib import Path

import pytest

from meft.training.data.base import to_rows
from meft.training.data.encode import encode
from support.tiny import make_tokenizer


@pytest.mark.parametrize("workers", [None, 2])
def test_rows_are_encoded_and_cuts_are_counted(workers: int | None, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    rows = to_rows([["a cat", "the big dog ran", "a"], ["sat", "under the tree", "a"]], [0, 1, 1])
    encoded, truncated = encode(rows, tokenizer, 7, workers=workers, title="train")
    assert truncated == 1
    assert tokenizer.decode(encoded[0]["input_ids"]) == "<s> a cat </s> sat </s>"
    # Seven tokens, three of them special: what is left is shared, the longer text cut first.
    assert tokenizer.decode(encoded[1]["input_ids"]) == "<s> the big </s> under the </s>"
    assert encoded["label"][:] == [0, 1, 1]
    assert set(encoded.column_names) == {"input_ids", "attention_mask", "label"}


def test_exactly_the_limit_is_not_cut(tmp_path: Path) -> None:
    assert encode(to_rows([["a cat sat"]], None), make_tokenizer(tmp_path), 5)[1] == 0
