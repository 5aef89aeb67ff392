"""JSON files that come with a folder, read as what they are: claims of whoever made the folder.

Example:
    >>> read_object(folder / "checkpoint.json", {"resumable": bool, "files": dict})["resumable"]
    True

One reader for all of them: a regular file, of a bounded size and depth, in text that can be written again, and an
object whose fields have the types that they are used as. What a folder says is a value, never a permission: that code
which comes with a model may run is said in the call alone (SECURITY.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from meft.errors import CheckpointError

LARGEST, DEEPEST = 64 * 1024 * 1024, 64
"""Bytes of a file and levels of nesting; what Transformers, PEFT and the Trainer write stays far below."""

_OF_MODELS = (
    *("config.json", "adapter_config.json", "generation_config.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "preprocessor_config.json", "processor_config.json"),
)
_INDEX = "model.safetensors.index.json"
_REMEDY = "Copy or download it again."
# Names of these keys make Transformers look for code on the hub where their values have a slash.
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def read_json(path: Path) -> Any:
    """Reads a JSON file that anybody may have written.

    Raises:
        CheckpointError: It is no regular file or cannot be read, is no JSON, is larger or nested deeper than any that
            is meant, or has text with half a character, which cannot be written again.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no regular file. {_REMEDY}")
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise CheckpointError(f"{path} has {size} bytes; at most {LARGEST} are read of a JSON file. {_REMEDY}")
        found = json.loads(path.read_text(encoding="utf-8"))
        for text in _strings(found, path):
            text.encode()
    except RecursionError as error:
        raise _too_deep(path) from error
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{path} has text that is no Unicode ({error.object[error.start]!r} alone is half a character). {_REMEDY}"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). It was damaged after it was written.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. {_REMEDY}") from error
    return found


def read_object(path: Path, fields: Mapping[str, type | tuple[type, ...]] | None = None) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
        path: The file.
        fields: The types of the fields that it must have; others are left to whoever reads them.

    Raises:
        CheckpointError: As of `read_json`, or it is no object, or a field is missing or has another type.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, where an object is expected. {_REMEDY}")
    for name, kind in (fields or {}).items():
        if name not in found:
            raise CheckpointError(f"{path} has no {name!r}. {_REMEDY}")
        require(path, name, found[name], kind)
    return found


def require(path: Path, name: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    """Returns the value of a field that has one of the types; True is no number.

    Raises:
        CheckpointError: It has another type.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        valid = " or ".join("null" if each is type(None) else each.__name__ for each in kinds)
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise CheckpointError(f"{path} has {shown} as {name!r}, where a {valid} is expected. {_REMEDY}")
    return value


def check_model_folder(folder: Path, *, trusted: bool = False) -> None:
    """Looks at every JSON file by which a folder describes a model, before anybody acts on one.

    Args:
        folder: Of a model or an adapter; names on the hub, which are no folders, are left to their files' readers.
        trusted: Whether the caller lets code run that comes with the model.

    Raises:
        CheckpointError: A file is no JSON object, or says that code is to be trusted or fetched.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not (path.is_file() or path.is_dir()) and not path.name.startswith("."):
            what = "a link to nothing" if path.is_symlink() else "a pipe or a device"
            raise CheckpointError(f"{folder} could not be loaded: {path} is {what}, and no file. {_REMEDY}")
    for name in _OF_MODELS if folder.is_dir() else ():
        path = folder / name
        if path.is_symlink() or path.exists():
            try:
                found = read_object(path)
            except CheckpointError as error:
                broken = isinstance(error.__cause__, json.JSONDecodeError)
                said = f"{path} is not a valid JSON file ({error.__cause__}). {_REMEDY}" if broken else error
                raise CheckpointError(f"{folder} could not be loaded: {said}") from error
            if not trusted:
                _refuse_trust(path, found)
    if (folder / _INDEX).is_file():
        shards = read_object(folder / _INDEX, {"weight_map": dict})["weight_map"]
        for weight, shard in shards.items():
            require(folder / _INDEX, weight, shard, str)
            place = PurePosixPath(shard.replace("\\", "/"))
            if place.is_absolute() or ".." in place.parts or not (folder / shard).is_file():
                raise CheckpointError(
                    f"{folder / _INDEX} names {shard!r}, which is no file in its folder, as the place of {weight}. "
                    f"{_REMEDY}"
                )


def _refuse_trust(path: Path, value: Any) -> None:
    values: list[Any] = [value]
    while values:
        value = values.pop()
        if isinstance(value, list):
            values += value
        if not isinstance(value, dict):
            continue
        values += value.values()
        if value.get("trust_remote_code"):
            raise CheckpointError(
                f"{path} says trust_remote_code={value['trust_remote_code']!r}. A folder cannot grant trust: take the "
                "line out, or say trust_remote_code in the call if you trust the code."
            )
        for name in _KERNELS:
            if "/" in str(value.get(name, "")):
                raise CheckpointError(
                    f"{path} has {name}={value[name]!r}, which is code on the hub. A folder cannot choose code: take "
                    "the line out, and say attn_implementation in the call if you trust it."
                )


def _strings(value: Any, path: Path) -> Iterator[str]:
    """Every text in a value, keys included; one that is nested too deeply is refused on the way."""
    values: list[tuple[Any, int]] = [(value, 1)]
    while values:
        value, depth = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            if depth > DEEPEST:
                raise _too_deep(path)
            if isinstance(value, dict):
                yield from value
                value = list(value.values())
            values += [(entry, depth + 1) for entry in value]


def _too_deep(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is nested deeper than {DEEPEST} levels, which no file of this kind is. {_REMEDY}")
