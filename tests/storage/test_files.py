from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from meft.errors import CheckpointError
from meft.storage.files import (
    check_safetensors,
    publish_files,
    publish_folder,
    read_json,
    remove_leftovers,
    staged,
    write_json,
)
from support.tiny import hidden_files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match=r"nan"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}


def test_damaged_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"a": ')
    with pytest.raises(
        CheckpointError, match=r"run.json is not valid JSON \(.*\). It was damaged after it was written."
    ):
        read_json(tmp_path / "run.json")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    place = tmp_path / "checkpoint-1"
    with staged(tmp_path, "checkpoint-1") as staging:
        inner = staging / "checkpoint-1"
        inner.mkdir()
        (inner / "a").write_text("new")
        assert not place.exists()
        publish_folder(inner, place)
    assert (place / "a").read_text() == "new"
    assert hidden_files(tmp_path) == []


def test_an_unusable_folder_is_replaced(tmp_path: Path) -> None:
    place = tmp_path / "checkpoint-1"
    place.mkdir()
    (place / "old").touch()
    with staged(tmp_path, "x") as staging:
        (staging / "new").touch()
        publish_folder(staging, place)
    assert [path.name for path in place.iterdir()] == ["new"]
    assert hidden_files(tmp_path) == []


def test_an_error_while_staging_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"disk full"), staged(tmp_path, "x") as staging:
        (staging / "a").touch()
        raise RuntimeError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_what_makes_a_folder_loadable_is_published_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = __import__("os").replace
    monkeypatch.setattr("meft.storage.files.os.replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    with staged(tmp_path, "final") as staging:
        for name in ("config.json", "a", "z"):
            (staging / name).touch()
        publish_files(staging, tmp_path, last=("config.json",))
    assert order == ["a", "z", "config.json"]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".saving-a", ".removing-b", "checkpoint-1", ".other"):
        (tmp_path / name).mkdir()
    (tmp_path / ".saving-results.json").touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other", "checkpoint-1"]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(10), "b": torch.ones(5)}, path, metadata={"format": "pt"})
    return path


def test_a_whole_file_passes(weights: Path) -> None:
    check_safetensors(weights)


@pytest.mark.parametrize("kept", [0.99, 0.8])
def test_a_truncated_file_is_refused(weights: Path, kept: float) -> None:
    whole = weights.read_bytes()
    size = int(len(whole) * kept)
    weights.write_bytes(whole[:size])
    message = (
        rf"{weights} is truncated: {size} bytes, its header promises {len(whole)}. Copy or download it again, or use"
    )
    with pytest.raises(CheckpointError, match=message):
        check_safetensors(weights)


def test_a_file_cut_in_its_header_is_refused(weights: Path) -> None:
    whole = weights.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    weights.write_bytes(whole[:20])
    with pytest.raises(
        CheckpointError, match=rf"is truncated: 20 bytes, of which its header alone should take {header}"
    ):
        check_safetensors(weights)
    weights.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is truncated: 0 bytes"):
        check_safetensors(weights)


def test_other_files_are_refused(weights: Path) -> None:
    weights.write_bytes((4).to_bytes(8, "little") + b"what" + b"ever")
    with pytest.raises(CheckpointError, match=r"is not a safetensors file: its header cannot be read"):
        check_safetensors(weights)
    weights.write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(CheckpointError, match=r"is not a safetensors file"):
        check_safetensors(weights)


def test_json_is_written_for_people_to_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "é"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "name": "é"\n}\n'
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"name": "é"}
