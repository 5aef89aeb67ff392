from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from meft.errors import CheckpointError
from meft.storage import files
from meft.storage.files import (
    check_safetensors,
    publish_files,
    publish_folder,
    publish_new_folder,
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


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is forced to disk and what is renamed, in order, by name."""
    seen: list[tuple[str, str]] = []
    names: dict[int, str] = {}
    real_open, real_sync, real_replace, real_rename = os.open, os.fsync, os.replace, os.rename

    def open_(path: object, *rest: int) -> int:
        descriptor = real_open(path, *rest)  # type: ignore[arg-type]
        names[descriptor] = Path(str(path)).name
        return descriptor

    def sync(descriptor: int) -> None:
        seen.append(("disk", names[descriptor]))
        real_sync(descriptor)

    def renamed(rename):  # type: ignore[no-untyped-def]
        def call(source: Path, place: Path) -> None:
            seen.append(("rename", Path(place).name))
            rename(source, place)

        return call

    monkeypatch.setattr(files.os, "open", open_)
    monkeypatch.setattr(files.os, "fsync", sync)
    monkeypatch.setattr(files.os, "replace", renamed(real_replace))
    monkeypatch.setattr(files.os, "rename", renamed(real_rename))
    return seen


def test_a_file_is_on_the_disk_before_it_takes_its_place_and_the_rename_afterwards(tmp_path: Path, events) -> None:
    write_json(tmp_path / "run.json", {})
    assert events == [("disk", ".saving-run.json"), ("rename", "run.json"), ("disk", tmp_path.name)]


@pytest.mark.parametrize("publish", [publish_folder, publish_new_folder], ids=["a folder", "a new folder"])
def test_every_file_of_a_folder_is_on_the_disk_before_the_folder_appears(tmp_path: Path, events, publish) -> None:
    with staged(tmp_path, "x") as staging:
        (staging / "deeper").mkdir()
        for name in ("weights", "deeper/state"):
            (staging / name).write_text("all of it")
        publish(staging, tmp_path / "model")
    before = events[: events.index(("rename", "model"))]
    assert sorted(before) == [("disk", name) for name in (".saving-x", "deeper", "state", "weights")]
    assert events[-1] == ("disk", tmp_path.name)


def test_files_are_on_the_disk_before_the_first_of_them_appears(tmp_path: Path, events) -> None:
    with staged(tmp_path, "x") as staging:
        for name in ("config.json", "weights"):
            (staging / name).write_text("all of it")
        publish_files(staging, tmp_path, last=("config.json",))
    first = events.index(("rename", "weights"))
    assert {("disk", "config.json"), ("disk", "weights")} <= set(events[:first])
    assert events[-1] == ("disk", tmp_path.name)


def test_what_a_killed_write_left_is_not_in_the_next(tmp_path: Path) -> None:
    (tmp_path / ".saving-model").mkdir()
    (tmp_path / ".saving-model" / "half").touch()
    with staged(tmp_path, "model") as staging:
        (staging / "whole").touch()
        publish_folder(staging, tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["whole"]


def test_a_replaced_folder_is_there_until_the_new_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "checkpoint-1"
    place.mkdir()
    (place / "old").write_text("all there was")
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if target == place:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), staged(tmp_path, "x") as staging:
        (staging / "new").touch()
        publish_folder(staging, place)
    assert (tmp_path / ".removing-checkpoint-1" / "old").read_text() == "all there was"


def test_a_file_that_is_longer_than_its_header_says_is_refused(weights: Path) -> None:
    whole = weights.read_bytes()
    weights.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match=f"is damaged: {len(whole) + 1} bytes, its header promises {len(whole)}"):
        check_safetensors(weights)
