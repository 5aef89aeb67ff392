"""Rows that language models are trained on: conversations, prompts and completions, preference pairs, plain text.

The columns are those of TRL (its page "Dataset formats"):

| form            | columns                                                                            |
|-----------------|------------------------------------------------------------------------------------|
| `conversations` | `messages`, or `conversations` as ShareGPT has them                                |
| `completions`   | `prompt` and `completion`, both texts or both lists of messages                    |
| `preferences`   | `chosen` and `rejected`, with `prompt` or with it at the beginning of both         |
| `text`          | `text`                                                                             |

A list of messages may be JSON in a text, as files of comma-separated values have it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from meft.errors import DataError

from .sources import Source

CONVERSATIONS, COMPLETIONS, PREFERENCES, PLAIN = "conversations", "completions", "preferences", "text"
FORMS = {
    CONVERSATIONS: (("messages",), ("conversations",)),
    COMPLETIONS: (("prompt", "completion"),),
    PREFERENCES: (("chosen", "rejected"),),
    PLAIN: (("text",),),
}
"""The columns that each form needs."""
CLASSES = "classes"
"""The form of rows with labels, which are `data.files`'."""
FORMS_IN_WORDS = "messages (conversations), prompt and completion, chosen and rejected, or text"
ROW = "row"
"""The column of the rows as JSON, in `TaskData.splits`."""

_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
Message = dict[str, Any]


def form_of(columns: Sequence[str]) -> str | None:
    """The form that rows with these columns have; None for another."""
    order = (PREFERENCES, CONVERSATIONS, COMPLETIONS, PLAIN)
    return next((form for form in order if any(set(needed) <= set(columns) for needed in FORMS[form])), None)


def rows_of(source: Source, form: str) -> Dataset:
    """Checks every row, and brings it into one form.

    Returns:
        Rows with one column, `row`, as JSON: `{"messages": [...]}`, `{"prompt": ..., "completion": ...}`,
        `{"prompt": ..., "chosen": ..., "rejected": ...}` or `{"text": ...}`, and `tools` where a row has some.

    Raises:
        DataError: A row is not as it should be; the message gives the line.
    """
    columns = source.columns
    if not any(set(names) <= set(columns) for names in FORMS[form]):
        usual = FORMS[form][0]
        raise DataError(
            f"{source.name} has no column {' and '.join(repr(name) for name in usual if name not in columns)}, which "
            f"{form} need; its columns are {', '.join(columns)}. Rename them with --columns {usual[0]}=NAME, or give "
            "rows of another form with --form."
        )
    read = _READERS[form]
    return Dataset.from_dict(
        {ROW: [json.dumps(read(row, source.where(n)), ensure_ascii=False) for n, row in source.rows]}
    )


def _conversation(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    name = "messages" if row.get("messages") is not None else "conversations"
    messages = messages_of(row.get(name), name, where)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where} has no message of the assistant, so there is nothing to learn from it. Remove it.")
    return _with_tools({"messages": messages}, row, where)


def _completion(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    prompt, completion = (_said(row, name, where) for name in ("prompt", "completion"))
    if isinstance(prompt, str) != isinstance(completion, str):
        raise DataError(f"{where} has a text and a list of messages as prompt and completion. Make both alike.")
    return _with_tools({"prompt": prompt, "completion": completion}, row, where)


def _preference(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    chosen, rejected = (_said(row, name, where) for name in ("chosen", "rejected"))
    prompt = None if row.get("prompt") in (None, "", []) else _said(row, "prompt", where)
    kinds = {isinstance(said, str) for said in (prompt, chosen, rejected) if said is not None}
    if len(kinds) > 1:
        raise DataError(f"{where} mixes texts and lists of messages in prompt, chosen and rejected. Make them alike.")
    if prompt is None:
        same = _shared(chosen, rejected)
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    elif not isinstance(prompt, str) and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        # Many sets have the prompt once more at the beginning of both.
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt:
        raise DataError(
            f"{where} has no prompt, and chosen and rejected begin differently. Give a column prompt, or put what was "
            "asked at the beginning of both."
        )
    if not chosen or not rejected or chosen == rejected:
        raise DataError(f"{where} prefers nothing: chosen and rejected are the same, or one is empty. Remove it.")
    return _with_tools({"prompt": prompt, "chosen": chosen, "rejected": rejected}, row, where)


def _plain(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where} has {_shown(text)} in column 'text', where a text is expected. Mend or remove it.")
    return {"text": text}


_READERS: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    CONVERSATIONS: _conversation,
    COMPLETIONS: _completion,
    PREFERENCES: _preference,
    PLAIN: _plain,
}


def messages_of(value: Any, column: str, where: str) -> list[Message]:
    """Messages with `role` and `content`, from these or from ShareGPT's `from` and `value`, or from JSON of either.

    Raises:
        DataError: They are none.
    """
    value = _unpacked(value)
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(
            f"{where} has {_shown(value)} in column {column!r}, where a list of messages is expected, such as "
            '[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]. Mend or remove it.'
        )
    return [_message(message, f"message {index} of {where[0].lower()}{where[1:]}") for index, message in
            enumerate(value, start=1)]  # fmt: skip


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{where[0].upper()}{where[1:]} is {_shown(message)}; it must have a role and a content.")
    found = {name: value for name, value in message.items() if value is not None}
    role = found.pop("role", None) or found.pop("from", None)
    content = found.pop("content", None)
    content = found.pop("value", None) if content is None else content
    known = _ROLES.get(str(role).lower())
    if known is None:
        raise DataError(
            f"{where[0].upper()}{where[1:]} has the role {_shown(role)}; it must be one of system, user, assistant and "
            "tool (or ShareGPT's human and gpt). Mend or remove it."
        )
    if isinstance(content, (list, tuple)):
        if any(not isinstance(part, Mapping) or not isinstance(part.get("text"), str) for part in content):
            raise DataError(f"{where[0].upper()}{where[1:]} holds more than text, which meft train cannot learn from.")
        content = "".join(part["text"] for part in content)
    if content is None and found.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise DataError(
            f"{where[0].upper()}{where[1:]} has {_shown(content)} as content, where a text is expected. Mend or remove "
            "it."
        )
    return {"role": known, "content": content, **found}


def _said(row: Mapping[str, Any], column: str, where: str) -> Any:
    """A text, or a list of messages."""
    value = row.get(column)
    unpacked = _unpacked(value)
    if isinstance(unpacked, (list, tuple)) and unpacked and isinstance(unpacked[0], Mapping):
        return messages_of(unpacked, column, where)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where} has {_shown(value)} in column {column!r}, where a text or a list of messages is expected. Mend "
            "or remove it."
        )
    return value


def _unpacked(value: Any) -> Any:
    """What JSON in a text says, where it is a list; else the value."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        return value
    return found if isinstance(found, list) else value


def _with_tools(found: dict[str, Any], row: Mapping[str, Any], where: str) -> dict[str, Any]:
    tools = _unpacked(row.get("tools"))
    if tools in (None, "", []):
        return found
    if not isinstance(tools, list):
        raise DataError(f"{where} has {_shown(tools)} in column 'tools', where a list is expected. Mend or remove it.")
    return {**found, "tools": tools}


def _shared(first: Any, second: Any) -> int:
    """How long the beginning is that two texts or lists share; of texts, up to the end of a word."""
    length = min(len(first), len(second))
    same = next((index for index in range(length) if first[index] != second[index]), length)
    if isinstance(first, str) and same:
        same = first.rfind(" ", 0, same) + 1 if not first[:same].endswith((" ", "\n")) else same
    return same


def _shown(value: Any, length: int = 60) -> str:
    shown = repr(value)
    return "nothing" if value is None else shown if len(shown) <= length else f"{shown[:length]}..."
