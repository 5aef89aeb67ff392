"""What the memory of a step on CUDA is for, from the allocator's figures at every mark.

The allocator says how much is allocated now, and how much was at most since it was last asked; `marks` says
what the step is doing. Between two marks everything belongs to one phase, so whatever is added there is put down to it:
the working set of the layer that runs, the loss head, and so on. When a layer's forward pass ends, what is left of its
working set is what it saved; when its backward pass ends, that is taken back. The sum over all causes is the
allocator's own figure; how it is divided is exact to what comes and goes within one phase.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .causes import CAUSES, GRADIENTS, HEAD, OPTIMIZER_STATE, OTHER, RESIDUES, SAVED, STREAMS, WORKING, Phase, phases_of
from .marks import BACKWARD, FORWARD, GRADIENT, OPTIMIZER, RESIDUE, places
from .timeline import Timeline

_BUCKETS = {FORWARD: WORKING, BACKWARD: WORKING, "head": HEAD, OPTIMIZER: OPTIMIZER_STATE}


@dataclass(frozen=True)
class Reading:
    """The allocator's figures at a mark: bytes allocated then, and the most since the reading before."""

    mark: str
    allocated: int
    highest: int


class Readings:
    """Takes a reading at every mark; the first when made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.taken: list[Reading] = []
        self("")

    def __call__(self, mark: str) -> None:
        highest = torch.cuda.max_memory_allocated(self.device)
        self.taken.append(Reading(mark, torch.cuda.memory_allocated(self.device), highest))
        torch.cuda.reset_peak_memory_stats(self.device)


class Ledger:
    """Puts the allocator's figures down to causes.

    Args:
        readings: from the start of the step to its end.
        older: addresses of gradients that are older than the step.
    """

    def __init__(self, readings: Sequence[Reading], older: Collection[int] = ()) -> None:
        self.peak = dict.fromkeys(CAUSES, 0)
        self.activations = dict.fromkeys(CAUSES, 0)
        self._now = dict.fromkeys(CAUSES, 0)
        self._seen = set(older)
        self._added: dict[str, dict[str, int]] = {}
        self._residues = 0
        marks = [(index, reading.mark) for index, reading in enumerate(readings) if reading.mark]
        phases = {phase.begin: phase for phase in phases_of(Timeline([], marks, len(readings)))}
        phase = phases[0]
        for index, (before, reading) in enumerate(pairwise(readings), start=1):
            bucket = _BUCKETS.get(phase.kind, OTHER)
            self._look(bucket, reading.highest - before.allocated)
            self._now[bucket] += reading.allocated - before.allocated
            self._hear(reading.mark, bucket)
            if index in phases:
                self._close(phase)
                phase = phases[index]

    def _look(self, bucket: str, excess: int) -> None:
        """Notes the causes if this is the highest so far."""
        found = {**self._now, bucket: self._now[bucket] + excess}
        if sum(found.values()) > sum(self.peak.values()):
            self.peak = found
        rest = {**found, GRADIENTS: 0, OPTIMIZER_STATE: 0}
        if sum(rest.values()) > sum(self.activations.values()):
            self.activations = rest

    def _hear(self, mark: str, bucket: str) -> None:
        if mark.startswith(GRADIENT):
            for address, size in places(mark).items():
                if address not in self._seen:
                    self._seen.add(address)
                    self._now[bucket] -= size
                    self._now[GRADIENTS] += size
        elif mark.startswith(RESIDUE):
            self._residues += sum(places(mark).values())

    def _close(self, phase: Phase) -> None:
        """At the end of a layer's pass, puts what is left of its working set down to what it is."""
        left, self._now[WORKING] = self._now[WORKING], 0
        if phase.kind == FORWARD:
            kept = {RESIDUES: self._residues, STREAMS: left - self._residues} if phase.reversible else {SAVED: left}
            self._residues = 0
            for cause, size in kept.items():
                self._now[cause] += size
            self._added[phase.layer] = kept
        elif phase.kind == BACKWARD:
            for cause, size in self._added.pop(phase.layer, {}).items():
                self._now[cause] -= size
                left += size
            self._now[STREAMS] += left
