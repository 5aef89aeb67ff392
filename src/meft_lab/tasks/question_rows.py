"""From the rows of the question-answering tasks, of official files and of the hub, to questions.

The prompts are those of the tasks that lm-eval has under the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from meft.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        prompt: What comes before the answer.
        choices: The possible answers.
        answer: Index of the right one; `None` where it is not known.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int | None

    @property
    def right(self) -> str:
        """The right answer."""
        return self.choices[self.answer] if self.answer is not None else ""


def lettered(row: Row, where: str, prompt: str) -> Question:
    """A question of ARC or OpenBookQA, whose choices bear letters or digits.

    Read are the official files (`question` with `stem` and `choices`, `answerKey`), the rows of the hub (`question` or
    `question_stem`, `choices` with `text` and `label`, `answerKey`), and plain rows (`question`, `choices` as a list of
    texts, `answer` as an index).

    Raises:
        DataError: A column is missing, or there is no such choice as the answer names.
    """
    inner = _take(row, "question_stem" if "question_stem" in row else "question", where)
    stem = _text(inner, "stem", where) if isinstance(inner, dict) else inner
    given = _take(inner if isinstance(inner, dict) else row, "choices", where)
    texts, labels = _choices(given, where)
    if "answer" in row and "answerKey" not in row:
        answer = row["answer"]
        if not isinstance(answer, int) or not 0 <= answer < len(texts):
            raise DataError(f"{where} has the answer {answer!r}; it must be 0 to {len(texts) - 1}. Mend that row.")
        return _question(prompt, stem, texts, answer, where)
    key = str(row.get("answerKey") or "").strip()
    if key and key not in labels:
        raise DataError(f"{where} has the answerKey {key!r}; the choices are {', '.join(labels)}. Mend that row.")
    return _question(prompt, stem, texts, labels.index(key) if key else None, where)


def piqa(row: Row, where: str) -> Question:
    """A goal and two ways to reach it; `label` is 0 or 1, or -1 where it is not known.

    Raises:
        DataError: A column is missing, or the label is another one.
    """
    texts = [_text(row, name, where) for name in ("sol1", "sol2")]
    label = str(row.get("label", -1)).strip()
    if label not in ("0", "1", "-1"):
        raise DataError(f"{where} has the label {label!r}; it must be 0 or 1. Get its file of labels anew.")
    answer = None if label == "-1" else int(label)
    return _question("Question: {}\nAnswer:", _text(row, "goal", where), texts, answer, where)


def sciq(row: Row, where: str) -> Question:
    """A question with its right answer, three wrong ones, and a supporting text before it that may be empty.

    Rows that have `question` and `answer` alone become questions with one choice, which can be trained on but not
    scored.

    Raises:
        DataError: A column is missing.
    """
    if "answer" in row and "correct_answer" not in row:
        texts, support = [_text(row, "answer", where)], ""
    else:
        names = ("distractor1", "distractor2", "distractor3", "correct_answer")
        texts, support = [_text(row, name, where) for name in names], _text(row, "support", where)
    question = _question("\nQuestion: {}\nAnswer:", _text(row, "question", where), texts, len(texts) - 1, where)
    return Question(support.lstrip() + question.prompt, question.choices, question.answer)


def _question(prompt: str, stem: Any, texts: list[str], answer: int | None, where: str) -> Question:
    if not isinstance(stem, str) or not stem.strip():
        raise DataError(f"{where} has the question {stem!r}, where a text is expected. Mend or remove that row.")
    return Question(prompt.replace("{}", stem), tuple(texts), answer)


def _choices(given: Any, where: str) -> tuple[list[str], list[str]]:
    """The texts and the labels of choices in any of the three layouts."""
    if isinstance(given, dict):
        texts, labels = _take(given, "text", where), _take(given, "label", where)
    elif isinstance(given, list) and all(isinstance(choice, dict) for choice in given):
        texts = [_take(choice, "text", where) for choice in given]
        labels = [_take(choice, "label", where) for choice in given]
    else:
        texts, labels = given, list(ascii_uppercase)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where} has the choices {texts!r}, where a list of texts is expected. Mend that row.")
    return texts, [str(label) for label in labels][: len(texts)]


def _take(row: Row, name: str, where: str) -> Any:
    if name not in row:
        raise DataError(
            f"{where} has no column {name!r}; its columns are {', '.join(row)}. Is this a file of another task?"
        )
    return row[name]


def _text(row: Row, name: str, where: str) -> str:
    value = _take(row, name, where)
    if not isinstance(value, str):
        raise DataError(f"{where} has {value!r} in column {name!r}, where a text is expected. Mend that row.")
    return value
