"""Where a step's time goes, and tokens a second at equal batch and at equal memory."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from statistics import median
from typing import Any
from unittest.mock import patch

from measuring import Progress, Steps, in_turn, ratio, title_of
from peers import Peer
from shapes import Subject
from transformers import PreTrainedModel

from meft.backbone.layers import ReversibleLayer
from meft.engine import engine
from meft.engine.arithmetic import FixedPoint
from meft.engine.couplings import Step
from meft.engine.replay import Snapshot

REST = "the rest: model, loss, autograd"
# What the engine does, by the functions that do it.
WORK: dict[str, tuple[tuple[Any, str], ...]] = {
    "running blocks, twice": ((engine, "_run"),),
    "gradients of blocks": ((engine._Tiled, "add"),),
    "coupling and its inverse": ((Step, "forward"), (Step, "inverse"), (engine._Tiled, "finish")),
    "decoding streams": ((FixedPoint, "decode"),),
    "describing layers": ((ReversibleLayer, "_layer"),),
    "snapshots": ((Snapshot, "take"), (Snapshot, "settled")),
    "checks": ((engine, "check_backward"), (engine, "check_leaves")),
}
LARGEST_BATCH = 64


class Clock:
    """Seconds of the processor by kind of work; what is called inside another kind's work counts for itself."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Times the functions of `WORK` within, and the rest."""
        with ExitStack() as stack:
            for label, places in WORK.items():
                for owner, name in places:
                    stack.enter_context(patch.object(owner, name, self.timed(label, getattr(owner, name))))
            begun = time.process_time()
            yield
            whole = time.process_time() - begun
        self.seconds[REST] = whole - sum(self.seconds.values())

    def timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            begun = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.process_time() - begun
                self.seconds[label] += spent - self._inside.pop()
                if self._inside:
                    self._inside[-1] += spent

        return call


def profile_of(
    subject: Subject, peers: Mapping[str, Peer], rounds: int, reference: str, progress: Progress
) -> dict[str, Any]:
    """Steps of all peers in turn: seconds of the clock and of the processor, and where the latter go."""
    base = subject.build()
    steps = {name: Steps(subject, base, peer) for name, peer in peers.items()}
    for each in steps.values():
        each.warm_up()
    clock: dict[str, list[float]] = {name: [] for name in steps}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    work: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for name in in_turn(list(steps), rounds):
        progress(f"{title_of(subject)}, profile: {name}")
        begun = time.process_time()
        clock[name].append(steps[name].seconds())
        processor[name].append(time.process_time() - begun)
        work[name].append(_work(steps[name]))
    return {
        **asdict(subject),
        "rounds": rounds,
        "reference": reference,
        "seconds": clock,
        "processor_seconds": processor,
        "ratios": {name: ratio(clock[name], clock[reference]) for name in steps},
        "processor_ratios": {name: ratio(processor[name], processor[reference]) for name in steps},
        "work": {
            name: {label: median(turn[label] for turn in work[name]) for label in (*WORK, REST)} for name in steps
        },
    }


def _work(steps: Steps) -> dict[str, float]:
    clock = Clock()
    steps.model.zero_grad()
    with clock.running():
        steps()
    return {label: clock.seconds[label] for label in (*WORK, REST)}


def at_equal_memory(
    subject: Subject, peers: Mapping[str, Peer], rounds: int, reference: str, progress: Progress
) -> dict[str, Any]:
    """Tokens a second of every peer at the largest batch whose activations fit where the reference's batch does.

    The budget is the peak of the reference at `subject.batch` sequences.
    """
    base = subject.build()
    budget = _peak(subject, base, peers[reference])
    batches, steps = {}, {}
    for name, peer in peers.items():
        progress(f"{title_of(subject)}, largest batch: {name}")
        batches[name] = subject.batch if name == reference else _largest(subject, base, peer, budget)
        steps[name] = Steps(replace(subject, batch=batches[name]), base, peer)
        steps[name].warm_up()
    tokens: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, each in steps.items():
            progress(f"{title_of(subject)}, equal memory: {name}")
            tokens[name].append(batches[name] * subject.sequence / each.seconds())
    return {
        **asdict(subject),
        "rounds": rounds,
        "reference": reference,
        "budget_bytes": budget,
        "batches": batches,
        "tokens_a_second": tokens,
        "ratios": {name: ratio(tokens[name], tokens[reference]) for name in steps},
    }


def _peak(subject: Subject, base: PreTrainedModel, peer: Peer) -> int:
    return int(Steps(subject, base, peer).memory()["activation_peak_bytes"])


def _largest(subject: Subject, base: PreTrainedModel, peer: Peer, budget: int) -> int:
    """The largest batch that fits, from the growth between two batches, and looked at."""
    one, two = (_peak(replace(subject, batch=batch), base, peer) for batch in (subject.batch, 2 * subject.batch))
    batch = subject.batch + int((budget - one) / ((two - one) / subject.batch))
    batch = max(1, min(batch, LARGEST_BATCH))
    while batch > 1 and _peak(replace(subject, batch=batch), base, peer) > budget:
        batch -= 1
    return batch
