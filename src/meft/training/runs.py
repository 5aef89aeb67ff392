"""The output folder of a run: whose it is, and whether it may be gone on with.

`run.json` is written when a run begins and names its arguments; `results.json` is written last and makes it finished.
A folder is never written to unless it is new, or holds an unfinished run of the same arguments.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from meft.backbone.layers import ReversibleLayer
from meft.errors import BusyFolderError, OutputFolderError
from meft.options import FUNCTION, PLACES, options_of
from meft.storage.files import read_json, write_json
from meft.storage.results import now
from meft.tuner.config import SETTINGS, MeftConfig, saved_before

RUN_FILE, RESULTS_FILE, _LOCK_FILE = "run.json", "results.json", ".lock"
State = Literal["new", "resume", "replace"]

# These change what is shown, kept or measured, but not what is computed, so a resumed run may have others.
_WITHOUT_EFFECT = {
    "output_dir",
    "resume",
    "resume_from_checkpoint",
    "overwrite_run",
    "measure_steps",
    "cache_dir",
    "preprocessing_num_workers",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "disable_tqdm",
    "log_level",
    "log_level_replica",
    "logging_dir",
    "logging_first_step",
    "logging_steps",
    "logging_strategy",
    "report_to",
    "run_name",
    "project",
    "local_rank",
    "push_to_hub",
    "hub_token",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "hub_always_push",
    "hub_revision",
    "save_total_limit",
    "skip_memory_metrics",
    "do_train",
    "do_eval",
    "do_predict",
}


def inspect_folder(
    folder: Path, arguments: Mapping[str, Any], *, resume: Literal["auto", "never"] = "auto", overwrite: bool = False
) -> State:
    """Says what may be done with the output folder, without touching it.

    Returns:
        `"new"` for a folder that is missing or empty, `"resume"` when it holds an unfinished run of the same
        arguments, `"replace"` when it holds another run that may be moved aside.

    Raises:
        OutputFolderError: It holds something that must stay.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputFolderError(f"output_dir is {str(folder)!r}, which is a file. Choose another --output_dir.")
    names = sorted(path.name for path in folder.iterdir() if path.name != _LOCK_FILE) if folder.is_dir() else []
    if not names:
        return "new"
    if RUN_FILE not in names:
        if all(name.startswith(".") for name in names):
            return "new"  # left by a run that was killed while it wrote run.json
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise OutputFolderError(
            f"output_dir is {str(folder)!r}, which holds files that are no run of meft ({listed}). Nothing was "
            "changed. Choose another --output_dir."
        )
    reason = _why_not(folder, names, arguments, resume)
    if reason is None:
        return "resume"
    if overwrite:
        return "replace"
    raise OutputFolderError(
        f"output_dir is {str(folder)!r}, which holds {reason}. Nothing was changed. Choose another --output_dir, or "
        "give --overwrite_run to move that run aside."
    )


def differences(before: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    """What differs between the arguments of two runs and changes what they compute, in words.

    An argument that only one of them has, from another version of Transformers, says nothing about the run.
    """
    common = [name for name in before if name in arguments and name not in _WITHOUT_EFFECT]
    differing = [name for name in common if before[name] != arguments[name]]
    return [f"{name} was {before[name]!r} and is {arguments[name]!r}" for name in differing]


def settings_of(model: Any) -> dict[str, Any] | None:
    """What a MEFT adapter or a reversible backbone took where its options left it open; None for a model without."""
    configs = getattr(model, "peft_config", None)
    config = configs.get("default") if isinstance(configs, dict) else None
    if isinstance(config, MeftConfig):
        return {name: getattr(config, name) for name in SETTINGS}
    for layer in model.modules():
        if isinstance(layer, ReversibleLayer) and (placement := layer.placement()) is not None:
            taken, known = placement.reversible_stack.plan.options(), options_of(FUNCTION)
            return {
                name: taken[name]
                for name in SETTINGS
                if name in known and known[name].means_something(taken["coupling"])
            }
    return None


def begun_with(folder: Path, method: str) -> dict[str, Any]:
    """The settings that an unfinished run began with, so that it goes on with them after defaults have changed.

    Runs of version 0.1.0 did not say; they had that version's.
    """
    run = read_json(folder / RUN_FILE)
    found = run["settings"] if "settings" in run else saved_before(method) if method in PLACES else None
    return {name: tuple(value) if isinstance(value, list) else value for name, value in (found or {}).items()}


@contextmanager
def claimed(
    folder: Path, state: State, arguments: Mapping[str, Any], command: str, settings: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Makes the folder this run's for as long as the block runs, and yields the content of `run.json`.

    Raises:
        BusyFolderError: Another process is at work in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if state == "replace":
        with _locked(folder):
            os.replace(folder, _aside(folder))
        folder.mkdir()
    with _locked(folder):
        if state == "resume":
            run = read_json(folder / RUN_FILE)
        else:
            run = {"command": command, "started": now(), "arguments": dict(arguments), "settings": settings}
            write_json(folder / RUN_FILE, run)
        yield run


def _why_not(folder: Path, names: list[str], arguments: Mapping[str, Any], resume: str) -> str | None:
    run = read_json(folder / RUN_FILE)
    if RESULTS_FILE in names:
        return f"a finished run (started {run['started']})"
    changed = differences(run["arguments"], arguments)
    if changed:
        return f"an unfinished run of other arguments ({'; '.join(changed)})"
    if resume == "never":
        return f"an unfinished run (started {run['started']}), and --resume is never"
    return None


def _aside(folder: Path) -> Path:
    stem = f"{folder.name}.replaced-{datetime.now():%Y%m%d-%H%M%S}"
    names = (folder.with_name(stem + suffix) for suffix in ("", *(f"-{index}" for index in range(1, 100))))
    return next(name for name in names if not name.exists())


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock that the system releases when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    with (folder / _LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyFolderError(
                f"output_dir is {str(folder)!r}, where another process is training right now. Wait for it or choose "
                "another --output_dir."
            ) from None
        yield
