"""Runs a recipe: every run in a folder of its own, what is finished never again, the table anew after each."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from meft.errors import BusyFolderError, ConfigError, MeftError, OutputFolderError
from meft.parsing import as_words, parse
from meft.storage.files import read_json
from meft.training import RESULTS_FILE, TRAIN_TYPES, train
from meft.training.arguments import flat
from meft.training.kinds import check_options
from meft.training.kinds.base import Say, say_nothing
from meft.training.runs import differences

from .recipe import Choice, Point, Recipe

_UNSAFE = str.maketrans({character: "-" for character in '/\\:*?"<>| '})
# What is counted of rows that were not used as they are.
LOST = {"truncated_rows": "cut", "skipped_rows": "left out"}
DEPLOYED = "deployed_"
_WAIT = 10.0  # seconds between looks at a run that another process is at


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        point: Its value on every axis, those that are chosen among included.
        seed: Its seed.
        folder: Its own folder.
        arguments: What `meft train` is called with, but for seed and folder.
    """

    point: Point
    seed: int
    folder: Path
    arguments: Mapping[str, Any]

    @property
    def title(self) -> str:
        return " ".join([*self.point.values(), f"seed {self.seed}"])

    def words(self) -> list[str]:
        """The words after `meft train`."""
        own = {"seed": self.seed, "output_dir": str(self.folder)}
        return as_words({**self.arguments, **own}, TRAIN_TYPES, self.title)

    def results(self) -> dict[str, Any] | None:
        """What the finished run found; `None` before it is finished."""
        path = self.folder / RESULTS_FILE
        return read_json(path) if path.is_file() else None


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to.

    Attributes:
        finished: Results by run, those that were only looked at to choose included.
        final: The runs that make the table: every combination of the grid with its chosen values, and every seed.
        chosen: The chosen values by group of `choose.per`.
        failed: The error of each run that failed.
    """

    finished: dict[str, tuple[Run, dict[str, Any]]]
    final: Sequence[Run]
    chosen: Mapping[tuple[str, ...], Point]
    failed: Mapping[str, str]

    def complete(self) -> bool:
        return all(run.title in self.finished for run in self.final)


class Sweep:
    """The runs of a recipe under one folder.

    Args:
        recipe: What is run.
        folder: Where the runs lie, `<folder>/<value>/<value>/.../seed-<seed>`.
        say: Called with each sentence meant for the user.

    Raises:
        ConfigError: Some run's arguments are not valid; it names the run. Nothing has been run then.
    """

    def __init__(self, recipe: Recipe, folder: Path, say: Say = print) -> None:
        self.recipe, self.folder, self.say = recipe, folder, say
        self._failed: dict[str, str] = {}
        self._found: dict[str, dict[str, Any]] = {}
        for run in self.possible():
            self._check(run)

    def possible(self) -> list[Run]:
        """Every run that may come to be run: a choice among values counts with all of them on the first seed."""
        first, *others = self.recipe.seeds
        runs = [run for point in self.recipe.points() for run in self._candidates(point, first)]
        # Other seeds take one of the candidates: which one does not change whether the arguments are valid.
        return runs + [next(iter(self._candidates(point, seed))) for seed in others for point in self.recipe.points()]

    def planned(self) -> int:
        """How many runs there are in all."""
        points, choice = self.recipe.points(), self.recipe.choice
        if choice is None:
            return len(points) * len(self.recipe.seeds)
        looked_at = [point for point in points if choice.looks_at(point)]
        return len(points) * len(self.recipe.seeds) + len(looked_at) * (len(choice.candidates()) - 1)

    def run(self, finished_one: Callable[[], None], *, command: str = "") -> Outcome:
        """Runs what is not finished: first what a choice looks at, then, with what was chosen, everything else.

        Args:
            finished_one: Called after every run that was not finished before.
            command: The command line, for the records of the runs.
        """
        self._run_all(self.looked_at(), finished_one, command)
        chosen = self._choose()
        for group, values in chosen.items():
            self.say(f"Chosen for {' '.join(group) or 'all'}: {_listed(values)}.")
        # Seed by seed: stopped early, there is a table of fewer seeds instead of one of fewer methods.
        final = sorted(self._final(chosen), key=lambda run: self.recipe.seeds.index(run.seed))
        self._run_all(final, finished_one, command)
        return self.outcome()

    def outcome(self) -> Outcome:
        """What the folder holds now."""
        chosen = self._choose()
        final = self._final(chosen)
        runs = {run.title: run for run in (*self.looked_at(), *final)}
        found = {title: (run, results) for title, run in runs.items() if (results := self._finished(run)) is not None}
        return Outcome(found, final, chosen, dict(self._failed))

    def _run_all(self, runs: Sequence[Run], finished_one: Callable[[], None], command: str) -> None:
        waiting = list(runs)
        while waiting:
            busy = []
            for run in waiting:
                if self._finished(run) is not None:
                    continue
                if self._train(run, command):
                    finished_one()
                else:
                    busy.append(run)
            if len(busy) == len(waiting):
                time.sleep(_WAIT)
            waiting = busy

    def looked_at(self) -> list[Run]:
        """The runs that a choice looks at."""
        choice = self.recipe.choice
        if choice is None:
            return []
        first = self.recipe.seeds[0]
        points = [point for point in self.recipe.points() if choice.looks_at(point)]
        return [run for point in points for run in self._candidates(point, first)]

    def _candidates(self, point: Point, seed: int) -> list[Run]:
        choice = self.recipe.choice
        if choice is None:
            return [self._make(point, seed)]
        return [self._make({**point, **values}, seed) for values in choice.candidates()]

    def _final(self, chosen: Mapping[tuple[str, ...], Point]) -> list[Run]:
        choice, found = self.recipe.choice, []
        for point in self.recipe.points():
            if choice is not None and choice.group(point) not in chosen:
                continue
            values = chosen[choice.group(point)] if choice is not None else {}
            found += [self._make({**point, **values}, seed) for seed in self.recipe.seeds]
        return found

    def _choose(self) -> dict[tuple[str, ...], Point]:
        """The candidate of the highest mean score in each group all of whose runs are done; the first of equals."""
        choice = self.recipe.choice
        if choice is None:
            return {}
        groups: dict[tuple[str, ...], list[Point]] = {}
        for point in self.recipe.points():
            if choice.looks_at(point):
                groups.setdefault(choice.group(point), []).append(point)
        return {group: best for group, points in groups.items() if (best := self._best(choice, points)) is not None}

    def _best(self, choice: Choice, points: Sequence[Point]) -> Point | None:
        scores: list[tuple[float, Point]] = []
        for values in choice.candidates():
            runs = [self._make({**point, **values}, self.recipe.seeds[0]) for point in points]
            results = [self._finished(run) for run in runs]
            if any(found is None and run.title not in self._failed for run, found in zip(runs, results, strict=True)):
                return None
            found = [-math.inf if one is None else _ranked(score_of(one, self.recipe.metric)) for one in results]
            scores.append((fmean(found), values))
        best = max(scores, key=lambda entry: entry[0])
        return best[1] if best[0] > -math.inf else None

    def _make(self, point: Point, seed: int) -> Run:
        chosen_on = self.recipe.choice.among if self.recipe.choice else {}
        parts = [value.translate(_UNSAFE) for axis, value in point.items() if axis not in chosen_on]
        if chosen_on:
            parts.append(",".join(f"{axis}={point[axis]}" for axis in chosen_on).translate(_UNSAFE))
        folder = self.folder.joinpath(*parts, f"seed-{seed}")
        return Run(point, seed, folder, self.recipe.arguments_of(point))

    def _check(self, run: Run) -> None:
        try:
            arguments = parse(TRAIN_TYPES, run.words(), command="sweep")
            arguments[2].way()
            arguments[1].check_source(("train", "validation"))
            check_options(arguments[1])
        except ConfigError as error:
            raise ConfigError(f"The run {run.title} of recipe {self.recipe.name} cannot be run: {error}") from error

    def _finished(self, run: Run) -> dict[str, Any] | None:
        """The results of a finished run of the same arguments.

        Raises:
            OutputFolderError: The folder holds the results of other arguments.
        """
        if run.title in self._found:
            return self._found[run.title]
        found = run.results()
        if found is None:
            return None
        arguments = parse(TRAIN_TYPES, run.words(), command="sweep")
        asked = flat(*arguments)
        # What is left out is chosen by the training, and recorded.
        chosen = {name: found["arguments"][name] for name in arguments[-1].left_out if name in asked}
        changed = differences(found["arguments"], asked | chosen)
        if changed:
            raise OutputFolderError(
                f"{run.folder} holds a finished run of other arguments ({'; '.join(changed)}). Nothing was "
                "changed. Take the recipe's former values, give another --output_dir, or move that folder aside."
            )
        self._found[run.title] = found
        return found

    def _train(self, run: Run, command: str) -> bool:
        """Trains; `False` when another process is at this run. A failure is noted, and tried again next time."""
        self._failed.pop(run.title, None)
        start = time.monotonic()
        try:
            arguments = parse(TRAIN_TYPES, run.words(), command="sweep")
            with redirect_stdout(sys.stderr):  # the Trainer prints its log there, and the table alone is the output
                found = train(*arguments, command=command, say=say_nothing)
        except BusyFolderError:
            return False
        except (OutputFolderError, ConfigError):
            raise
        except (MeftError, torch.OutOfMemoryError) as error:
            self._failed[run.title] = f"{type(error).__name__}: {error}"
            self.say(f"Failed: {run.title}: {error}")
            return True
        finally:
            _forget()
        if not self.recipe.keep_models:
            _remove_models(run.folder)
        score = score_of(found, self.recipe.metric)
        shown = "undefined" if score is None else f"{score:.4f}"
        self.say(f"{run.title}: {shown} ({'; '.join([f'{time.monotonic() - start:.0f} s', *lost_rows(found)])})")
        return True


def score_of(results: Mapping[str, Any], metric: str | None = None) -> float | None:
    """The score of a run: one metric, averaged over the two validation sets of MNLI.

    Args:
        results: What `results.json` holds.
        metric: The metric's name; `None` for the first, which is the task's main one. `deployed_accuracy` is the
            accuracy on the plain model, of what was trained on a reversible backbone.

    Returns:
        The score, `None` where it is undefined.

    Raises:
        ConfigError: The run has no such metric.
    """
    scores = {name: value for name, value in results["metrics"].items() if not name.endswith("loss")}
    name = metric or next(iter(scores)).removeprefix("matched_").removeprefix("mismatched_")
    if name.startswith(DEPLOYED):
        # What is not coupled is deployed as it was trained.
        deployed = results.get("deployed_metrics") or results["metrics"]
        return score_of({**results, "metrics": deployed}, name.removeprefix(DEPLOYED))
    found = [value for key, value in scores.items() if key in (name, f"matched_{name}", f"mismatched_{name}")]
    if not found:
        raise ConfigError(
            f"metric is {name!r}; the runs on {results['task']} have {', '.join(scores)}. Name one of these in the "
            "recipe, or leave metric out for each task's first."
        )
    return None if None in found else fmean(found)


def lost_rows(found: Mapping[str, Any]) -> list[str]:
    """What a run says of rows that were cut or left out, in words: "3 train rows were cut"."""
    return [
        f"{count} {split} rows were {what}"
        for name, what in LOST.items()
        for split, count in (found.get(name) or {}).items()
        if count
    ]


def _ranked(score: float | None) -> float:
    """An undefined score, of a model that predicts one class, ranks below every other that is not a failure."""
    return -1e9 if score is None else score


def _listed(values: Point) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in values.items())


def _forget() -> None:
    """Models hold cycles; without this two of them would share the device's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _remove_models(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.unlink()
