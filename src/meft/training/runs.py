"""The output folder of a run: whose it is, and whether it may be gone on with.

`run.json` is written when a run begins and names its arguments; `results.json` is written last and makes it finished.
A folder is never written to unless it is new, or holds an unfinished run of the same arguments on the same rows, or one
that failed before its first checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from meft.backbone.layers import ReversibleLayer
from meft.errors import BusyFolderError, OutputFolderError, first_line
from meft.options import FUNCTION, PLACES, options_of
from meft.storage.claims import read_object, require
from meft.storage.files import write_json
from meft.storage.outputs import check_output_folder, writing
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
# These do not change what was learnt so far, so that a run may go on with others, and says so: what errors advise when
# memory or the range of the streams does not suffice, and how often is saved and evaluated.
_GONE_ON_WITH = {
    *("fraction_bits", "arithmetic", "drift_tolerance", "anchor_every", "residues"),
    *("backward", "cached_layers", "tile_size", "fused_loss", "gradient_checkpointing"),
    *("gradient_checkpointing_kwargs", "activation_checkpointing", "torch_empty_cache_steps"),
    *("per_device_eval_batch_size", "eval_accumulation_steps"),
    *("save_strategy", "save_steps", "save_only_model", "eval_strategy", "eval_steps", "eval_delay"),
}
# The rows of a step are the product of these; how it is divided is a matter of memory.
_ROWS_OF_A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")


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
    check_output_folder(folder)
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
    passed_over = {*_WITHOUT_EFFECT, *_GONE_ON_WITH}
    if _rows_of_a_step(before) == _rows_of_a_step(arguments):
        passed_over |= set(_ROWS_OF_A_STEP)
    return _in_words(before, arguments, [name for name in before if name not in passed_over])


def gone_on_with(folder: Path, arguments: Mapping[str, Any]) -> list[str]:
    """What an unfinished run goes on with that it did not begin with, in words."""
    run = read_run(folder)
    before = run["arguments"]
    if _nothing_learnt(folder, run):
        return _in_words(before, arguments, [name for name in before if name not in _WITHOUT_EFFECT])
    return _in_words(before, arguments, [name for name in before if name in {*_GONE_ON_WITH, *_ROWS_OF_A_STEP}])


def check_rows(folder: Path, digests: Mapping[str, str], sources: Mapping[str, str], *, overwrite: bool) -> State:
    """Says whether an unfinished run may go on with rows, by their digests.

    Returns:
        `"resume"` for the rows that it began with, `"replace"` for others where the run may be moved aside.

    Raises:
        OutputFolderError: They are others, and the run must stay.
    """
    run = read_run(folder)
    began: Mapping[str, Any] = run.get("rows", {})
    changed = [split for split in digests if split in began and began[split] != digests[split]]
    if not changed or _nothing_learnt(folder, run):
        return "resume"
    if overwrite:
        return "replace"
    which = " and ".join(f"the {split} rows ({sources.get(split, 'of the task')})" for split in changed)
    raise OutputFolderError(
        f"output_dir is {str(folder)!r}, which holds an unfinished run on other data: {which} are not those that it "
        f"began with ({run['started']}). Nothing was changed. Put the data back as it was, choose another "
        "--output_dir, or give --overwrite_run to move that run aside."
    )


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
    run = read_run(folder)
    if _nothing_learnt(folder, run):
        return {}
    found = run["settings"] if "settings" in run else saved_before(method) if method in PLACES else None
    require(folder / RUN_FILE, "settings", found, (dict, type(None)))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in (found or {}).items()}


@contextmanager
def claimed(
    folder: Path,
    state: State,
    arguments: Mapping[str, Any],
    command: str,
    settings: Mapping[str, Any] | None = None,
    rows: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Makes the folder this run's for as long as the block runs, and yields the content of `run.json`.

    Args:
        folder: The output folder.
        state: What `inspect_folder` said of it.
        arguments: Of the run.
        command: The command line.
        settings: What the method took where its options left it open.
        rows: Digests of the rows by split.

    Raises:
        BusyFolderError: Another process is at work in the folder.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if state == "replace":
            with _locked(folder):
                os.replace(folder, _aside(folder))
            folder.mkdir()
    with _locked(folder):
        if state == "resume":
            run = read_run(folder)
            changed = gone_on_with(folder, arguments)
            if _nothing_learnt(folder, run):
                del run["failed"]
                run["rows"], run["settings"] = dict(rows or {}), settings
                write_json(folder / RUN_FILE, run)
            if changed:
                run["changed"] = [*run.get("changed", []), {"when": now(), "what": changed}]
                run["arguments"], run["settings"] = dict(arguments), settings
                write_json(folder / RUN_FILE, run)
        else:
            run = {"command": command, "started": now(), "arguments": dict(arguments), "settings": settings}
            run["rows"] = dict(rows or {})
            write_json(folder / RUN_FILE, run)
        try:
            yield run
        except Exception as error:
            if not _checkpoints(folder):
                write_json(folder / RUN_FILE, {**run, "failed": first_line(error)})
            raise


def _why_not(folder: Path, names: list[str], arguments: Mapping[str, Any], resume: str) -> str | None:
    run = read_run(folder)
    if RESULTS_FILE in names:
        return f"a finished run (started {run['started']})"
    changed = differences(run["arguments"], arguments)
    if changed and not _nothing_learnt(folder, run):
        return f"an unfinished run of other arguments ({'; '.join(changed)})"
    if resume == "never":
        return f"an unfinished run (started {run['started']}), and --resume is never"
    return None


def read_run(folder: Path) -> dict[str, Any]:
    """The content of `run.json`.

    Raises:
        CheckpointError: It cannot be read, or a field of it is of another type than is written there.
    """
    path = folder / RUN_FILE
    run = read_object(path, {"arguments": dict, "started": str})
    require(path, "rows", run.get("rows", {}), dict)
    require(path, "changed", run.get("changed", []), list)
    return run


def _nothing_learnt(folder: Path, run: Mapping[str, Any]) -> bool:
    """Whether a run ended in an error before its first checkpoint, so that it may begin anew in any way."""
    return "failed" in run and not _checkpoints(folder)


def _checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))


def _in_words(before: Mapping[str, Any], arguments: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    differing = [name for name in names if name in arguments and before[name] != arguments[name]]
    return [f"{name} was {before[name]!r} and is {arguments[name]!r}" for name in differing]


def _rows_of_a_step(arguments: Mapping[str, Any]) -> int | None:
    """Rows of a step on one process; None where the arguments do not say."""
    rows, times = (arguments.get(name) for name in _ROWS_OF_A_STEP)
    return rows * times if isinstance(rows, int) and isinstance(times, int) else None


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
