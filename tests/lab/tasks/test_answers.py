from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Regex, pre_tokenizers

from meft_lab.tasks.answers import encode_answers, fitting, mark_fitting, split_tokens
from support.tiny import make_tokenizer

# The vocabulary of tests/tiny.py: <s> is 0, "a" is 4, "the" is 5, and so on.
QUESTIONS = Dataset.from_dict(
    {"prompt": ["a cat", "the bird \n"], "choices": [["sat", "sat on"], ["ran", "flew"]], "answer": [1, 0]}
)


def test_only_the_right_answer_has_a_loss(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, end=False)
    words = {name: tokenizer.convert_tokens_to_ids(name) for name in ("a", "cat", "sat", "on", "the", "bird", "ran")}
    rows, skipped = encode_answers(QUESTIONS, tokenizer, 24)
    first, second = rows[0], rows[1]
    assert first["input_ids"] == [0, words["a"], words["cat"], words["sat"], words["on"]]
    assert first["labels"] == [-100, -100, -100, words["sat"], words["on"]]
    assert second["input_ids"] == [0, words["the"], words["bird"], words["ran"]]
    assert second["labels"] == [-100, -100, -100, words["ran"]]
    assert first["attention_mask"] == [1] * 5 and skipped == 0


def test_long_questions_are_left_out_and_counted(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, end=False)
    rows, skipped = encode_answers(QUESTIONS, tokenizer, 4)
    assert (len(rows), skipped) == (1, 1) and len(rows[0]["input_ids"]) == 4
    assert encode_answers(QUESTIONS, tokenizer, 5)[1] == 0
    # To be scored every choice must fit, not the right one alone.
    wrong = QUESTIONS.remove_columns("answer").add_column("answer", [0, 0])
    assert encode_answers(wrong, tokenizer, 4)[1] == 0
    marked, skipped = mark_fitting(wrong, tokenizer, 4)
    assert (marked["fits"][:], skipped) == ([False, True], 1)
    assert fitting(marked)["prompt"][:] == ["the bird \n"]


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("prompt", ["a cat", "a cat ", "a cat\n", "\na cat\nthe"])
def test_tokens_are_split_as_lm_eval_splits_them(prompt: str, end: bool, tmp_path: Path) -> None:
    model = pytest.importorskip("lm_eval.api.model").TemplateLM
    tokenizer = make_tokenizer(tmp_path, end=end)
    # Every blank is a token of its own here, so it matters on which side of the split it is.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "isolated")

    class Encoder(model):
        eot_token_id = 2

        def tok_encode(self, text: str, **_: object) -> list[int]:
            return tokenizer.encode(text)

        _loglikelihood_tokens = loglikelihood_rolling = generate_until = tok_encode

    assert split_tokens(tokenizer, [prompt], ["sat on"]) == [Encoder()._encode_pair(prompt, " sat on")]
