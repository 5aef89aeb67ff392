"""Memory and time of steps on the CPU."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch
from peers import Peer
from shapes import Subject, loss_of
from torch import nn
from transformers import PreTrainedModel

from meft import measure
from meft.methods.registry import count_parameters

Progress = Callable[[str], None]
WARM_UP_TOKENS = 64


class Steps:
    """Forward and backward passes of one model, made trainable by one peer, on one batch.

    Args:
        subject: the model's and the batch's shape.
        base: the model, of which a copy is made.
        peer: how it is trained.
    """

    def __init__(self, subject: Subject, base: PreTrainedModel, peer: Peer) -> None:
        self.subject, self.peer = subject, peer
        with quiet():
            self.model: nn.Module = peer.build(copy.deepcopy(base), subject.task_type, subject.linear_layers).train()
        self.batch, self.direction = subject.inputs(), subject.direction()

    def __call__(self) -> None:
        with quiet():
            with self.peer.surroundings():
                loss = loss_of(self.subject, self.model, self.batch, self.direction)
            loss.backward()

    def warm_up(self) -> None:
        """Takes a step on few tokens: it allocates what later ones of any length find ready."""
        few = replace(self.subject, sequence=min(WARM_UP_TOKENS, self.subject.sequence)).inputs()
        self.batch, whole = few, self.batch
        self()
        self.batch = whole
        self.model.zero_grad()

    def memory(self) -> dict[str, Any]:
        """One row of results: the peak of a step, by cause."""
        self.warm_up()
        begun = time.perf_counter()
        report = measure(self, model=self.model)
        return {
            **asdict(self.subject),
            "trainable_parameters": count_parameters(self.model)[0],
            "activation_peak_bytes": report.activation_peak_bytes,
            "peak_bytes": report.peak_bytes,
            "gradient_bytes": report.gradient_bytes,
            "activation_causes": report.activation_causes,
            "seconds_under_the_profiler": round(time.perf_counter() - begun, 3),
        }

    def seconds(self) -> float:
        """Time of a step, with gradients that have to be made."""
        self.model.zero_grad()
        begun = time.perf_counter()
        self()
        return time.perf_counter() - begun


def memory_rows(
    subjects: Sequence[tuple[Subject, Sequence[str]]], peers: Mapping[str, Peer], progress: Progress
) -> list[dict[str, Any]]:
    """Measures each subject by each of its methods. Models of one shape are built once."""
    rows = []
    built: tuple[Any, PreTrainedModel] | None = None
    for subject, methods in subjects:
        key = replace(subject, sequence=0, batch=0)
        if built is None or built[0] != key:
            built = None  # two of them need not fit
            built = key, subject.build()
        for method in methods:
            progress(f"{title_of(subject)}: {method}")
            rows.append({"method": method, **Steps(subject, built[1], peers[method]).memory()})
    return rows


def times_of(
    subject: Subject, peers: Mapping[str, Peer], rounds: int, reference: str, progress: Progress
) -> dict[str, Any]:
    """Times of alternating steps, and medians over rounds of the ratios to `reference` within a round."""
    base = subject.build()
    steps = {name: Steps(subject, base, peer) for name, peer in peers.items()}
    for each in steps.values():
        each.warm_up()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for name in in_turn(list(steps), rounds):
        progress(f"{title_of(subject)}, time: {name}")
        seconds[name].append(steps[name].seconds())
    return {
        **asdict(subject),
        "rounds": rounds,
        "reference": reference,
        "seconds": seconds,
        "ratios": {name: ratio(seconds[name], seconds[reference]) for name in seconds},
    }


def in_turn(names: Sequence[str], rounds: int) -> Iterator[str]:
    """All names in every round, each time another one first: that finds other caches than what runs last."""
    for turn in range(rounds):
        start = turn % len(names)
        yield from (*names[start:], *names[:start])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round; a machine that changes its pace moves medians of times."""
    return median(mine / other for mine, other in zip(ours, theirs, strict=True))


def title_of(row: Subject | Mapping[str, Any]) -> str:
    """What a row of results was measured on, in words."""
    found = asdict(row) if isinstance(row, Subject) else row
    family = {"roberta": "RoBERTa", "llama": "Llama"}[found["family"]]
    head = "" if found["vocabulary"] is None else f", vocabulary {found['vocabulary']}"
    return f"{family} {found['layers']} x {found['width']}, {found['batch']} x {found['sequence']} tokens{head}"


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT reads a property by its deprecated name in every call; nothing else is kept silent."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def use_threads(threads: int) -> None:
    torch.set_num_threads(threads)
