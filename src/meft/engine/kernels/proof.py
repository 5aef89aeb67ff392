"""Kernels against the tensor code, bit by bit, on a device: what must hold before they are taken there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..arithmetic import AutomaticGrid, FixedPoint
from ..couplings import Step, Streams

_STEPS = (
    Step("F", 0, 1, 1 / 32, difference=True, compensated=True),
    Step("F", 1, 0, 1 / 10, difference=True, sign="random"),
    Step("G", 1, 0, 1.0),
)
_SHAPE = (3, 37, 24)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def differences(device: torch.device) -> Iterator[str]:
    """Says in what a kernel's bits differ from those of the tensor code, for a few steps of every kind."""
    generator = torch.Generator().manual_seed(0)
    hidden, value = (torch.randn(_SHAPE, generator=generator) for _ in range(2))
    signs = torch.tensor([1, -1, 1], dtype=torch.int8, device=device).view(3, 1, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        entering = hidden.to(device, dtype)
        grid = AutomaticGrid(kernels="reference").fitted(entering, training=True)
        streams = (grid.encode(entering * 3), grid.encode(entering))
        if not same_bits(*both_decoded(grid, streams[0], dtype)):
            yield f"hidden state in {dtype}"
        for step in _STEPS:
            drawn = signs if step.sign == "random" else None
            for what, plain, fused in both(step, grid, streams, value.to(device, dtype), drawn):
                if not same_bits(plain, fused):
                    yield f"{what} of a step with factor {step.factor:g}, {dtype}"


def both(
    step: Step,
    arithmetic: FixedPoint,
    streams: Streams,
    value: Tensor | None,
    signs: Tensor | None = None,
    *,
    in_place: bool = True,
) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Takes and undoes a step; yields the name of each outcome, what the tensor code made of it, and the kernels."""
    plain, fused = replace(arithmetic, fused=False), replace(arithmetic, fused=True)
    after, wanted = step.forward(plain, streams, value, signs)
    after = step.with_target(after, after[step.target].clone())
    _, found = step.forward(fused, streams, value, signs)
    yield "stream", wanted.stream, found.stream
    yield "residue", wanted.residue, found.residue
    yield "magnitude", wanted.magnitude, found.magnitude
    if found.checksum is not None:
        yield "checksum", streams[step.target].sum(dtype=torch.int64), found.checksum
    rebuilt = step.inverse(plain, after, value, wanted.residue, signs)[step.target]
    sums: list[Tensor] = []
    before = step.inverse(fused, after, value, wanted.residue, signs, in_place=in_place, checksums=sums)
    yield "inverse", rebuilt, before[step.target]
    yield from (("checksum of the inverse", rebuilt.sum(dtype=torch.int64), one) for one in sums)


def both_decoded(arithmetic: FixedPoint, stream: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A stream as a hidden state, by the tensor code and by the kernel."""
    plain, fused = (replace(arithmetic, fused=flag).decode(stream, dtype) for flag in (False, True))
    return plain, fused


def same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors agree in dtype, shape and every bit; one NaN is like another."""
    if one is None or other is None:
        return one is other
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    integers = _INTEGERS[one.element_size()]
    return bool(((one.view(integers) == other.view(integers)) | (one.isnan() & other.isnan())).all())
