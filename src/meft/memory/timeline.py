"""What one step allocates on the CPU, block by block, in the order in which it happened.

PyTorch's profiler reports every allocation and release of its CPU allocator with its address, its size (as requested:
this allocator does not round) and its time. Pairing them by address gives blocks with a birth and a death, from which
any peak follows by summation: of all blocks, or of those that remain when some have been set apart.

Only blocks born while recording count. The profiler knows the size of an older block only if an earlier recording
happened to see it, so crediting releases of older blocks would make the figure depend on what was recorded before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch._C._profiler import _ExtraFields_Allocation, _ProfilerEvent


@dataclass(frozen=True)
class Block:
    """One allocation: where it lies, its size in bytes, and the events (counted from 0) between which it lives.

    `died` is None for a block that outlives the recording.
    """

    address: int
    size: int
    born: int
    died: int | None


def record_cpu(step: Callable[[], Any]) -> tuple[Any, list[Block]]:
    """Runs `step()` under the profiler and returns its result with the blocks it allocated on the CPU.

    The result is still held when recording ends, so what it refers to counts as outliving the step. Blocks allocated
    by threads that the step starts itself are not seen; those of autograd's own threads are.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet_profiler(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = step()
    return result, _pair(_allocation_events(profile))


def peak_bytes(blocks: Iterable[Block]) -> int:
    """The largest number of bytes that `blocks` hold at the same moment (0 for no blocks)."""
    changes: list[tuple[int, int]] = []
    for block in blocks:
        changes.append((block.born, block.size))
        if block.died is not None:
            changes.append((block.died, -block.size))
    return max(accumulate(size for _, size in sorted(changes)), default=0)


def surviving(blocks: Iterable[Block]) -> list[Block]:
    """The blocks that outlive the recording."""
    return [block for block in blocks if block.died is None]


def _allocation_events(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """The (address, signed size) of every allocation and release on the CPU, in order of time."""
    # The profiler's event tree is the only view of these events that carries addresses.
    pending: list[_ProfilerEvent] = list(profile.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    events: list[tuple[int, int, int]] = []
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        fields = event.extra_fields
        if isinstance(fields, _ExtraFields_Allocation) and fields.device.type == "cpu":
            events.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    events.sort(key=lambda event: event[0])
    return [(address, size) for _, address, size in events]


def _pair(events: Iterable[tuple[int, int]]) -> list[Block]:
    blocks: list[Block] = []
    live: dict[int, tuple[int, int]] = {}
    for index, (address, size) in enumerate(events):
        # An allocation at a live address means that the release was not reported: it ends the older block as well.
        if address in live:
            old_size, born = live.pop(address)
            blocks.append(Block(address, old_size, born, index))
        if size > 0:
            live[address] = (size, index)
    blocks.extend(Block(address, size, born, None) for address, (size, born) in live.items())
    return blocks


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
