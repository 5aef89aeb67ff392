"""Residues on the host: copied out during the forward pass, and back ahead of their use.

Where there is an accelerator with streams, copies run beside the computation, on a stream of their own from pinned
memory: `put` waits for nothing, and `take` starts the copy of the step below before it hands out that of the step
asked for, so two steps' residues lie on the device at most, however many layers there are. On a processor the device
is the host; the same copies are made, so that what lies where can be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_AROUND: ContextVar[Callable[[], AbstractContextManager[None]]] = ContextVar("meft_host_memory", default=nullcontext)


@contextmanager
def host_memory_within(around: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Enters `around()` whenever memory on the host is allocated within; for whoever counts memory."""
    token = _AROUND.set(around)
    try:
        yield
    finally:
        _AROUND.reset(token)


@dataclass
class _Parcel:
    """The residues of one step: those on the host, and the copies on the device once they are on their way."""

    level: int
    hosts: tuple[Tensor, ...]
    copies: tuple[Tensor, ...] | None = None


class HostStore:
    """The residues of one forward pass through one stack.

    Args:
        device: where they are made and used.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._parcels: list[_Parcel] = []
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._stream: Any = None
        if self._module is not None and hasattr(self._module, "Stream") and hasattr(self._module, "stream"):
            self._stream = self._module.Stream(device)

    def put(self, level: int, residues: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Copies the residues of the step below a level to the host; returns the copies, for the step to save."""
        with _AROUND.get()():
            hosts = tuple(torch.empty(part.shape, dtype=part.dtype, pin_memory=self._pinned) for part in residues)
        if self._stream is not None:
            self._stream.wait_stream(self._module.current_stream(self.device))
        with self._beside():
            for host, part in zip(hosts, residues, strict=True):
                host.copy_(part, non_blocking=self._pinned)
        if self._stream is not None:
            for part in residues:
                part.record_stream(self._stream)
        if hosts:
            self._parcels.append(_Parcel(level, hosts))
        return hosts

    def take(self, level: int, hosts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Hands out the residues of the step below a level on the device, and fetches those of the step below it.

        Args:
            level: as in `put`.
            hosts: what `put` returned, as autograd saved it.
        """
        if not hosts:
            return ()
        while self._parcels and self._parcels[-1].level > level:
            self._parcels.pop()
        own = self._parcels.pop() if self._parcels and self._parcels[-1].level == level else None
        if own is None or not _same(own.hosts, hosts):
            # Checkpointing around the stack ran the forward pass again and saved others.
            own = _Parcel(level, tuple(hosts))
        copies = own.copies or self._fetched(own)
        if self._stream is not None:
            self._module.current_stream(self.device).wait_stream(self._stream)
            for copy in copies:
                copy.record_stream(self._module.current_stream(self.device))
        if self._parcels:
            self._parcels[-1].copies = self._fetched(self._parcels[-1])
        return copies

    @property
    def _pinned(self) -> bool:
        return self._stream is not None

    def _fetched(self, parcel: _Parcel) -> tuple[Tensor, ...]:
        with self._beside():
            return tuple(host.to(self.device, non_blocking=self._pinned, copy=True) for host in parcel.hosts)

    def _beside(self) -> AbstractContextManager[None]:
        return nullcontext() if self._stream is None else self._module.stream(self._stream)


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(
        mine.untyped_storage()._cdata == other.untyped_storage()._cdata
        for mine, other in zip(ours, theirs, strict=True)
    )
