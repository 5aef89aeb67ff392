"""What a folder says is read as a claim: bounded, typed, and never a permission."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from meft.errors import CheckpointError
from meft.storage.claims import check_model_folder, read_json, read_object


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"is not valid JSON \(Expecting .*\). It was damaged after it was written."),
        ("", r"is not valid JSON \(Expecting value"),
        ("\ufeff{}", r"is not valid JSON"),
        ("[" * 5_000, r"is nested deeper than 64 levels, which no file of this kind is."),
        ("[" * 500_000, r"is nested deeper than 64 levels"),
        ("[" * 65 + "]" * 65, r"is nested deeper than 64 levels"),
        ('{"a": [{"b": "\\ud800"}]}', r"has text that is no Unicode \('\\ud800' alone is half a character\)"),
        ('{"\\udfff": 1}', r"has text that is no Unicode"),
        ("1" * 10_000, r"is not valid JSON \(Exceeds the limit"),
    ],
)
def test_what_is_no_json_of_ours(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"task.json {message}"):
        read_json(path)


def test_other_bytes_other_kinds_of_files_and_none(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match=r"a.json is not valid JSON \('utf-8' codec"):
        read_json(path)
    os.mkfifo(tmp_path / "fifo.json")
    for other in (tmp_path, tmp_path / "fifo.json"):
        with pytest.raises(CheckpointError, match=r"is no regular file"):
            read_json(other)
    with pytest.raises(CheckpointError, match=r"none.json cannot be read: No such file or directory"):
        read_json(tmp_path / "none.json")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    with pytest.raises(CheckpointError, match=r"loop.json cannot be read"):
        read_json(tmp_path / "loop.json")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(65 * 1024 * 1024)
    with pytest.raises(CheckpointError, match=r"has 68157440 bytes; at most 67108864 are read"):
        read_json(tmp_path / "a.json")


def test_at_the_limits_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[" * 64 + "]" * 64)
    assert read_json(path)
    path.write_text('{"loss": NaN, "text": "\\ud83d\\ude00"}')  # the Trainer writes such numbers
    assert read_object(path, {"loss": float})["text"] == "😀"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"holds a list, where an object is expected"),
        ({}, r"has no 'files'"),
        ({"files": [1]}, r"has \[1\] as 'files', where a dict is expected"),
        ({"files": {}, "steps": True}, r"has True as 'steps', where a int is expected"),
        ({"files": {}, "steps": "x" * 100}, r"has 'x{56}\.\.\. as 'steps'"),
    ],
)
def test_fields_have_types(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        read_object(path, {"files": dict, "steps": int})


FILES = ("config.json", "adapter_config.json", "generation_config.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content",
    [
        {"trust_remote_code": True},
        {"tokenizer_kwargs": {"trust_remote_code": "yes"}},
        {"inner": [{"deeper": {"trust_remote_code": 1}}]},
        {"attn_implementation": "kernels-community/flash-attn"},
        {"text_config": {"_attn_implementation": {"": "stranger/kernel"}}},
        {"experts_implementation": "stranger/kernel"},
    ],
)
def test_no_folder_grants_trust(name: str, content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"{name} (says trust_remote_code|has \w+=).*A folder cannot"):
        check_model_folder(tmp_path)
    check_model_folder(tmp_path, trusted=True)


def test_what_grants_nothing_passes(tmp_path: Path) -> None:
    content = {"trust_remote_code": False, "attn_implementation": "sdpa", "auto_map": {"AutoModel": "x.Y"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    check_model_folder(tmp_path)
    check_model_folder(tmp_path / "no folder")


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "none.safetensors", "a/../../x", 7])
def test_weights_lie_in_their_folder(place: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.safetensors").touch()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(CheckpointError, match=r"index.json (names .* which is no file in its folder|has 7 as 'a')"):
        check_model_folder(folder)
