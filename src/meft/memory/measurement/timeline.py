"""What one step allocates, block by block, in the order in which it happened.

PyTorch's profiler reports every allocation and release of its CPU allocator with its address, its size (as requested:
this allocator does not round) and its time. Pairing them by address gives blocks with a birth and a death, from which
any peak follows by summation: of all blocks, or of those that remain when some have been set apart. Marks
(`meft.memory.measurement.marks`) stand among the events, in the same order of time.

Only blocks born while recording count. The profiler knows the size of an older block only if an earlier recording
happened to see it, so crediting releases of older blocks would make the figure depend on what was recorded before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch._C._profiler import _ExtraFields_Allocation, _ProfilerEvent

from .marks import marks_go_to

_MARK = "meft::"


@dataclass(frozen=True)
class Allocation:
    """One allocation: where it lies, its size in bytes, and the events (counted from 0) between which it lives.

    `died` is None for a block that outlives the recording.
    """

    address: int
    size: int
    born: int
    died: int | None

    def alive(self, moment: int) -> bool:
        """Whether the block exists after event `moment`."""
        return self.born <= moment and (self.died is None or moment < self.died)


@dataclass(frozen=True)
class Timeline:
    """The blocks of a recording, the marks in it as (event, name), and the number of its events."""

    blocks: list[Allocation] = field(repr=False)
    marks: list[tuple[int, str]] = field(repr=False)
    length: int


def record_cpu(step: Callable[[], Any]) -> tuple[Any, Timeline]:
    """Runs `step()` under the profiler and returns its result with what it allocated on the CPU.

    The result is still held when recording ends, so what it refers to counts as outliving the step. Blocks allocated
    by threads that the step starts itself are not seen; those of autograd's own threads are.
    """
    with recording_cpu() as recorded:
        result = step()
    return result, recorded[0]


@contextmanager
def recording_cpu() -> Iterator[list[Timeline]]:
    """Records what is allocated on the CPU within; the list that is yielded holds the timeline afterwards."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    recorded: list[Timeline] = []
    with _quiet_profiler(), profiler as profile, marks_go_to(_write_mark):
        yield recorded
    recorded.append(build_timeline(_events(profile)))


def build_timeline(events: Iterable[tuple[int, int] | str]) -> Timeline:
    """Pairs events in order of time: (address, size), negative for a release, or the name of a mark."""
    blocks: list[Allocation] = []
    marks: list[tuple[int, str]] = []
    live: dict[int, tuple[int, int]] = {}
    index = -1
    for index, event in enumerate(events):
        if isinstance(event, str):
            marks.append((index, event))
            continue
        address, size = event
        # An allocation at a live address means that the release was not reported: it ends the older block as well.
        if address in live:
            old_size, born = live.pop(address)
            blocks.append(Allocation(address, old_size, born, index))
        if size > 0:
            live[address] = (size, index)
    blocks.extend(Allocation(address, size, born, None) for address, (size, born) in live.items())
    return Timeline(blocks, marks, index + 1)


def peak_bytes(blocks: Iterable[Allocation]) -> int:
    """The largest number of bytes that `blocks` hold at the same moment (0 for no blocks)."""
    return peak_between(blocks, 0, None)[0]


def peak_between(blocks: Iterable[Allocation], begin: int, end: int | None) -> tuple[int, int]:
    """The largest number of bytes live from event `begin` to before event `end` (None: the last), and when first.

    What was live when event `begin` came counts as well.
    """
    changes: list[tuple[int, int]] = []
    for block in blocks:
        changes.append((block.born, block.size))
        if block.died is not None:
            changes.append((block.died, -block.size))
    changes.sort()
    best, moment = 0, begin
    for (event, _), level in zip(changes, accumulate(size for _, size in changes), strict=True):
        if end is not None and event >= end:
            break
        if event <= begin or level > best:
            best, moment = level, max(event, begin)
    return best, moment


def surviving(blocks: Iterable[Allocation]) -> list[Allocation]:
    """The blocks that outlive the recording."""
    return [block for block in blocks if block.died is None]


def _write_mark(name: str) -> None:
    with torch.profiler.record_function(_MARK + name):
        pass


def _events(profile: torch.profiler.profile) -> Iterator[tuple[int, int] | str]:
    """The (address, signed size) of every allocation and release on the CPU and every mark, in order of time."""
    # The profiler's event tree is the only view of these events that carries addresses.
    pending: list[_ProfilerEvent] = list(profile.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    found: list[tuple[int, tuple[int, int] | str]] = []
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        fields = event.extra_fields
        if isinstance(fields, _ExtraFields_Allocation):
            if fields.device.type == "cpu":
                found.append((event.start_time_ns, (fields.ptr, fields.alloc_size)))
        elif event.name.startswith(_MARK):
            found.append((event.start_time_ns, event.name.removeprefix(_MARK)))
    found.sort(key=lambda pair: pair[0])
    return (event for _, event in found)


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keeps the profiler's tracing library from announcing every start and stop on standard error.

    It reads its log level from the environment when first used in a process; a level that the user set stays.
    """
    name, above_all = "KINETO_LOG_LEVEL", "6"
    if name in os.environ:
        yield
        return
    os.environ[name] = above_all
    try:
        yield
    finally:
        del os.environ[name]
