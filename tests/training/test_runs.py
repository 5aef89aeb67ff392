from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from meft.errors import OutputFolderError
from meft.storage.files import read_json, write_json
from meft.training.runs import claimed, inspect_folder
from support.tiny import hold_a_claim

ARGUMENTS = {"method": "lora", "learning_rate": 0.1, "output_dir": "a", "logging_steps": 5}


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    with claimed(run, "new", ARGUMENTS, "meft train"):
        pass
    return run


@pytest.fixture
def finished(unfinished: Path) -> Path:
    write_json(unfinished / "results.json", {})
    return unfinished


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_missing_and_empty_folders_are_new(tmp_path: Path) -> None:
    assert inspect_folder(tmp_path / "none", ARGUMENTS) == "new"
    assert inspect_folder(tmp_path, ARGUMENTS) == "new"
    (tmp_path / ".lock").touch()
    (tmp_path / ".saving-run.json").touch()
    assert inspect_folder(tmp_path, ARGUMENTS) == "new"


def test_an_unfinished_run_of_the_same_arguments_is_gone_on_with(unfinished: Path) -> None:
    assert inspect_folder(unfinished, ARGUMENTS) == "resume"
    assert inspect_folder(unfinished, ARGUMENTS, overwrite=True) == "resume"
    without_effect = {"output_dir": "/elsewhere/a", "logging_steps": 1, "of_a_newer_version": True}
    assert inspect_folder(unfinished, ARGUMENTS | without_effect) == "resume"


def refused(folder: Path, arguments: dict[str, Any], message: str, **options: Any) -> None:
    before = content(folder)
    with pytest.raises(OutputFolderError, match=message) as caught:
        inspect_folder(folder, arguments, **options)
    assert isinstance(caught.value, FileExistsError)
    assert content(folder) == before


def test_other_arguments_are_refused(unfinished: Path) -> None:
    refused(
        unfinished,
        ARGUMENTS | {"method": "full", "learning_rate": 0.2},
        r"run', which holds an unfinished run of other arguments \(method was 'lora' and is 'full'; learning_rate was "
        r"0.1 and is 0.2\). Nothing was changed. Choose another --output_dir, or give --overwrite_run to move that run "
        "aside.",
    )


def test_a_finished_run_is_refused(finished: Path) -> None:
    refused(finished, ARGUMENTS, r"which holds a finished run \(started 20.*\). Nothing was changed.")


def test_resume_never(unfinished: Path) -> None:
    refused(
        unfinished, ARGUMENTS, r"which holds an unfinished run \(started .*\), and --resume is never", resume="never"
    )


def test_other_files_are_refused_even_to_overwrite(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    message = (
        r"which holds files that are no run of meft \(thesis.tex\). Nothing was changed. Choose another --output_dir."
    )
    refused(tmp_path, ARGUMENTS, message, overwrite=True)
    refused(tmp_path / "thesis.tex", ARGUMENTS, "thesis.tex', which is a file. Choose another --output_dir.")


def test_overwriting_moves_aside_and_deletes_nothing(finished: Path) -> None:
    before = content(finished)
    assert inspect_folder(finished, ARGUMENTS, overwrite=True) == "replace"
    with claimed(finished, "replace", ARGUMENTS | {"method": "full"}, "again") as run:
        assert run["command"] == "again"
    aside = next(path for path in finished.parent.iterdir() if path.name.startswith("run.replaced-20"))
    assert {path.replace(str(aside), str(finished)): data for path, data in content(aside).items()} == before
    assert not (finished / "results.json").exists()
    assert read_json(finished / "run.json")["arguments"]["method"] == "full"


def test_a_resumed_run_keeps_its_beginning(unfinished: Path) -> None:
    began = read_json(unfinished / "run.json")
    with claimed(unfinished, "resume", ARGUMENTS, "another command") as run:
        assert run == began
    assert read_json(unfinished / "run.json") == began


def test_two_processes_cannot_train_in_one_folder(unfinished: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    holding, release = processes.Event(), processes.Event()
    other = processes.Process(target=hold_a_claim, args=(unfinished, holding, release))
    other.start()
    try:
        assert holding.wait(60)
        with (
            pytest.raises(
                OutputFolderError, match=r"where another process is training right now. Wait for it or choose"
            ),
            claimed(unfinished, "resume", ARGUMENTS, ""),
        ):
            pass
    finally:
        other.kill()  # the lock must go with the process, however it ends
        other.join()
    with claimed(unfinished, "resume", ARGUMENTS, ""):
        pass
