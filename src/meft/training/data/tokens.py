"""From conversations, completions, pairs and texts to token ids: which of them are learnt, and where rows are cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from meft.errors import ConfigError, DataError

from .chats import COMPLETIONS, CONVERSATIONS, PLAIN, PREFERENCES, ROW

IGNORED = -100
IDS, LABELS = "input_ids", "labels"
PROMPT, CHOSEN, REJECTED = "prompt_ids", "chosen_ids", "rejected_ids"
"""The columns that TRL's DPOTrainer takes."""
_CUT, _EMPTY = "cut", "empty"
_GENERATION = "generation %}"


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuses conversations for a tokenizer that does not know how to write them.

    Raises:
        ConfigError: It has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"The rows are conversations, but the tokenizer of {name} has no chat template, so it is not known how "
            "they are written. Give a model trained on chats (named -Instruct or -it), its tokenizer by "
            "--tokenizer_name, a template by --chat_template FILE.jinja, or rows of prompt and completion as texts."
        )


def encode_rows(
    rows: Dataset,
    form: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    answers_only: bool,
    workers: int | None = None,
    title: str = "",
) -> tuple[Dataset, int, int]:
    """Turns rows as `rows_of` makes them into token ids.

    Args:
        rows: The rows.
        form: What they are.
        tokenizer: The model's, with a chat template where there are conversations.
        max_length: The most tokens that a row may have; what is beyond is cut off at its end.
        answers_only: Learn the completions, or what the assistant says, and not what it answers.
        workers: Processes to tokenize with; None for this one alone.
        title: What the progress bar says, the name of the split.

    Returns:
        The rows, with columns `input_ids` and `labels`, or for pairs those of TRL's DPOTrainer; how many were cut; and
        how many were left out, since nothing to be learnt was left of them.

    Raises:
        ConfigError: The chat template does not show where the answers stand.
    """
    encode = _ENCODERS[form](tokenizer, answers_only)

    def encode_row(row: dict[str, Any]) -> dict[str, Any]:
        found = encode(json.loads(row[ROW]))
        return _cut_pair(found, max_length) if form == PREFERENCES else _cut(found, max_length)

    coded = rows.map(
        encode_row,
        remove_columns=rows.column_names,
        num_proc=workers,
        desc=f"Tokenizing {title}".strip(),
        # Hashing a tokenizer is slow and warns; rows in memory are not cached anyway.
        new_fingerprint=f"{rows._fingerprint}-{form}-{max_length}-{answers_only}",
    )
    kept = [index for index, empty in enumerate(coded[_EMPTY]) if not empty]
    cut = sum(coded[_CUT][index] for index in kept)
    return coded.select(kept).remove_columns([_CUT, _EMPTY]), cut, len(coded) - len(kept)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
    """The token ids of a conversation as the chat template writes it.

    Raises:
        DataError: The template refuses the conversation.
    """
    try:
        found: Any = tokenizer.apply_chat_template(
            list(map(dict, messages)), tokenize=True, return_dict=True, **options
        )
        return list(found[IDS])
    except Exception as error:  # a template may raise anything of its own
        raise DataError(
            f"The chat template refuses a conversation that begins with {_begin(messages)}: {error} Mend or remove it."
        ) from error


# Encoders: from a row to (ids, learnt) or, of a pair, to TRL's columns ------------------------------------------------


def _conversations(tokenizer: PreTrainedTokenizerBase, answers_only: bool) -> Callable[[dict[str, Any]], Any]:
    marked = answers_only and _GENERATION in str(tokenizer.chat_template)

    def encode(row: dict[str, Any]) -> tuple[list[int], list[bool]]:
        messages, options = row["messages"], _options(row)
        if marked:
            found: Any = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
            )
            return list(found[IDS]), [bool(bit) for bit in found["assistant_masks"]]
        ids = render(tokenizer, messages, **options)
        if not answers_only:
            return ids, [True] * len(ids)
        learnt = [False] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = render(tokenizer, messages[:index], add_generation_prompt=True, **options) if index else []
                after = render(tokenizer, messages[: index + 1], **options)
                _check_beginning(ids, before, after, messages)
                learnt[len(before) : len(after)] = [True] * (len(after) - len(before))
        return ids, learnt

    return encode


def _check_beginning(ids: list[int], before: list[int], after: list[int], messages: Sequence[Any]) -> None:
    if ids[: len(before)] != before or ids[: len(after)] != after:
        raise ConfigError(
            f"The chat template writes an answer in the conversation that begins with {_begin(messages)} in another "
            "way once more messages follow, so it cannot be told which tokens are answers. Give "
            "--no_completion_only_loss to learn whole conversations, or rows of prompt and completion with one answer "
            "each."
        )


def _completions(tokenizer: PreTrainedTokenizerBase, answers_only: bool) -> Callable[[dict[str, Any]], Any]:
    def encode(row: dict[str, Any]) -> tuple[list[int], list[bool]]:
        start, whole = _continued(tokenizer, row, "completion")
        common = _common(start, whole)
        return whole, [index >= common or not answers_only for index in range(len(whole))]

    return encode


def _texts(tokenizer: PreTrainedTokenizerBase, answers_only: bool) -> Callable[[dict[str, Any]], Any]:
    def encode(row: dict[str, Any]) -> tuple[list[int], list[bool]]:
        ids = list(tokenizer(_ended(tokenizer, row["text"]))[IDS])
        return ids, [True] * len(ids)

    return encode


def _pairs(tokenizer: PreTrainedTokenizerBase, answers_only: bool) -> Callable[[dict[str, Any]], Any]:
    def encode(row: dict[str, Any]) -> dict[str, Any]:
        (start, chosen), (_, rejected) = (_continued(tokenizer, row, name) for name in ("chosen", "rejected"))
        common = min(_common(start, chosen), _common(start, rejected))
        return {PROMPT: start[:common], CHOSEN: chosen[common:], REJECTED: rejected[common:]}

    return encode


_ENCODERS = {CONVERSATIONS: _conversations, COMPLETIONS: _completions, PREFERENCES: _pairs, PLAIN: _texts}


def _continued(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], name: str) -> tuple[list[int], list[int]]:
    """The token ids of a prompt, and of the prompt with what follows it."""
    prompt, rest = row["prompt"], row[name]
    if isinstance(prompt, str):
        return list(tokenizer(prompt)[IDS]), list(tokenizer(prompt + _ended(tokenizer, rest))[IDS])
    start = render(tokenizer, prompt, add_generation_prompt=True, **_options(row))
    return start, render(tokenizer, [*prompt, *rest], **_options(row))


def _ended(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text with the token that ends it, so that the model learns to stop."""
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + str(end)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _options(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"tools": row["tools"]} if "tools" in row else {}


def _cut(found: tuple[list[int], list[bool]], most: int) -> dict[str, Any]:
    ids, learnt = found
    labels = [token if learn else IGNORED for token, learn in zip(ids, learnt, strict=True)][:most]
    # The first token is predicted by none.
    empty = all(label == IGNORED for label in labels[1:])
    return {IDS: ids[:most], LABELS: labels, _CUT: len(ids) > most, _EMPTY: empty}


def _cut_pair(found: dict[str, Any], most: int) -> dict[str, Any]:
    room = most - len(found[PROMPT])
    cut = max(len(found[CHOSEN]), len(found[REJECTED])) > room
    empty = room < 1 or not found[CHOSEN] or not found[REJECTED]
    kept = {name: found[name][: max(0, room)] for name in (CHOSEN, REJECTED)}
    return {**found, **kept, _CUT: cut, _EMPTY: empty or kept[CHOSEN] == kept[REJECTED]}


def _begin(messages: Sequence[Mapping[str, Any]], length: int = 60) -> str:
    text = str(messages[0].get("content", "")) if messages else ""
    return repr(text if len(text) <= length else f"{text[:length]}...")
