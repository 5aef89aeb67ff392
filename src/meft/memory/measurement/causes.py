"""What the memory of a step is for: every block that is live at a moment, put down to a cause.

A block's cause follows from the phase of the step in which it was allocated and the phase it is looked at in
(`marks` tells the phases): a tensor that a layer's forward pass made is the working set of that layer while
the pass runs, and saved by the layer once it is over.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass

from .marks import (
    BACKWARD,
    BACKWARD_END,
    FORWARD,
    FORWARD_END,
    GRADIENT,
    HOST,
    HOST_END,
    OPTIMIZER,
    OPTIMIZER_END,
    RESIDUE,
    REVERSIBLE,
    places,
)
from .timeline import Allocation, Timeline, peak_between

SAVED, STREAMS, RESIDUES, WORKING = "saved by layers", "streams", "residues", "working set of a layer"
HEAD, GRADIENTS, OPTIMIZER_STATE, OTHER = "loss head", "gradients", "optimizer", "other"
CAUSES = (SAVED, STREAMS, RESIDUES, WORKING, HEAD, GRADIENTS, OPTIMIZER_STATE, OTHER)
"""Every cause that memory above the start of a step is put down to.

saved by layers: made by the forward pass of an ordinary layer and kept for its backward pass.
streams: the hidden states between reversible layers, as they are stored, and gradients passed from layer to layer.
residues: what reversible layers keep to undo their divisions.
working set of a layer: made by the layer that is running, forward or backward, its recomputation included.
loss head: made between the last layer's forward pass and its backward pass: last norm, logits, loss.
gradients: of parameters. optimizer: its state, and what it makes while it steps.
other: the rest: embeddings, masks, position tables, whatever the step itself makes around the model.
"""

_LAYER_PHASES = (FORWARD, BACKWARD)


@dataclass(frozen=True)
class Phase:
    """A part of a step.

    Attributes:
        kind: "forward", "backward", "head", "optimizer" or "between".
        layer: which, as "stack.index", of a forward or backward phase.
        reversible: whether that layer rebuilds its activations.
        begin: the event that begins it; it lasts until the next phase.
    """

    kind: str
    layer: str
    reversible: bool
    begin: int


@dataclass(frozen=True)
class PhasePeak:
    """The most that is live at any moment of a phase.

    Attributes:
        phase: the phase.
        peak: the largest number of bytes, put down to causes.
        activations: the same without gradients of parameters and optimizer state, at the moment of their own peak.
        host: the largest number of bytes on the host.
    """

    phase: Phase
    peak: dict[str, int]
    activations: dict[str, int]
    host: int


class Attribution:
    """Puts the blocks of a timeline down to causes.

    Args:
        timeline: the recording.
        gradients: addresses of those surviving blocks that are gradients of parameters.
        state: addresses of those that are the optimizer's state.
    """

    def __init__(
        self, timeline: Timeline, gradients: Collection[int] = frozenset(), state: Collection[int] = frozenset()
    ) -> None:
        self.phases = phases_of(timeline)
        self.length = timeline.length
        self._begins = [phase.begin for phase in self.phases]
        hosted = _spans(timeline, HOST, HOST_END)
        self.blocks: list[Allocation] = []
        self.host_blocks: list[Allocation] = []
        for block in timeline.blocks:
            (self.host_blocks if _within(hosted, block.born) else self.blocks).append(block)
        self._apart = dict.fromkeys(self._marked(timeline, GRADIENT), GRADIENTS)
        for block in self.blocks:
            if block.died is None and (block.address in gradients or block.address in state):
                self._apart[block] = GRADIENTS if block.address in gradients else OPTIMIZER_STATE
        self.activation_blocks = [block for block in self.blocks if block not in self._apart]
        self._residues = self._marked(timeline, RESIDUE)

    def peak(self) -> dict[str, int]:
        """Bytes by cause at the first moment at which most are live."""
        return self._causes(self.blocks, peak_between(self.blocks, 0, None)[1])

    def activations(self) -> dict[str, int]:
        """The same with gradients of parameters and optimizer state left out of the sum."""
        return self._causes(self.activation_blocks, peak_between(self.activation_blocks, 0, None)[1])

    def host_peak(self) -> int:
        """The most bytes that were live on the host at once."""
        return peak_between(self.host_blocks, 0, None)[0]

    def phase_peaks(self) -> list[PhasePeak]:
        """The peak of every phase, in the order of the phases."""
        ends: list[int | None] = [*self._begins[1:], None]
        return [
            PhasePeak(
                phase,
                self._causes(self.blocks, peak_between(self.blocks, phase.begin, end)[1]),
                self._causes(self.activation_blocks, peak_between(self.activation_blocks, phase.begin, end)[1]),
                peak_between(self.host_blocks, phase.begin, end)[0],
            )
            for phase, end in zip(self.phases, ends, strict=True)
        ]

    def _causes(self, blocks: list[Allocation], moment: int) -> dict[str, int]:
        found = dict.fromkeys(CAUSES, 0)
        now = self._phase_at(moment)
        for block in blocks:
            if block.alive(moment):
                found[self._cause(block, now)] += block.size
        return found

    def _cause(self, block: Allocation, now: Phase) -> str:
        if block in self._apart:
            return self._apart[block]
        if block in self._residues:
            return RESIDUES
        made = self._phase_at(block.born)
        if made.kind == "head":
            return HEAD
        if made.kind == OPTIMIZER:
            return OPTIMIZER_STATE
        if made.kind not in _LAYER_PHASES:
            return OTHER
        if made is now:
            return WORKING
        return SAVED if made.kind == FORWARD and not made.reversible else STREAMS

    def _phase_at(self, moment: int) -> Phase:
        return self.phases[bisect_right(self._begins, moment) - 1]

    def _marked(self, timeline: Timeline, kind: str) -> set[Allocation]:
        """The blocks that were live at an address when a mark of this kind named it."""
        by_address: dict[int, list[Allocation]] = {}
        for block in self.blocks:
            by_address.setdefault(block.address, []).append(block)
        return {
            block
            for index, name in timeline.marks
            if name.startswith(kind)
            for address in places(name)
            for block in by_address.get(address, ())
            if block.alive(index)
        }


def phases_of(timeline: Timeline) -> list[Phase]:
    """The phases of a step, from its marks; the first begins with the recording."""
    phases = [Phase("between", "", False, 0)]
    reversible: dict[str, bool] = {}
    for index, name in timeline.marks:
        kind, *words = name.split()
        if name.startswith((RESIDUE, GRADIENT, HOST)):
            continue
        if name.startswith(BACKWARD_END):
            # Where the layer below was told first, its backward pass has begun.
            if (phases[-1].kind, phases[-1].layer) == (BACKWARD, words[-1]):
                phases.append(Phase("between", "", False, index))
        elif name in (FORWARD_END, OPTIMIZER_END):
            phases.append(Phase("between", "", False, index))
        elif kind == OPTIMIZER:
            phases.append(Phase(OPTIMIZER, "", False, index))
        else:
            layer = words[0]
            if kind == FORWARD:
                reversible[layer] = REVERSIBLE in words
            elif phases[-1].kind == "between" and _last_ended(phases) == FORWARD:
                # From the end of the last layer to the backward pass of that layer: norm, logits, loss and back.
                phases[-1] = Phase("head", "", False, phases[-1].begin)
            phases.append(Phase(kind, layer, reversible.get(layer, False), index))
    if phases[-1].kind == "between" and _last_ended(phases) == FORWARD:
        phases[-1] = Phase("head", "", False, phases[-1].begin)
    return phases


def _last_ended(phases: list[Phase]) -> str:
    return phases[-2].kind if len(phases) > 1 else ""


def _spans(timeline: Timeline, begin: str, end: str) -> list[tuple[int, int]]:
    starts = [index for index, name in timeline.marks if name == begin]
    ends = [index for index, name in timeline.marks if name == end]
    return list(zip(starts, ends, strict=True))


def _within(spans: list[tuple[int, int]], moment: int) -> bool:
    place = bisect_right(spans, (moment, moment)) - 1
    return place >= 0 and spans[place][0] <= moment < spans[place][1]
