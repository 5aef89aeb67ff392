"""Launches the kernels: a step and its inverse in one pass, on streams that lie in one piece."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arithmetic import Coupled, FixedPoint, norm
from ..residues import bits_for, packed_bytes

if TYPE_CHECKING:
    from ..couplings import Step, Streams

_GROUPS = 128
"""Groups of eight elements a program takes: 1024 elements."""
_HOW = {"num_warps": 4, "enable_fp_fusion": False}
VALUES = (torch.float32, torch.bfloat16, torch.float16)
"""What functions may return for a kernel to add it: a Triton kernel takes no numbers of 64 bits from Python."""


def takes(stream: Tensor, value: Tensor | None) -> bool:
    """Whether a kernel can take a step; the tensor code takes the others, to the same bits."""
    if not stream.is_contiguous() or not stream.numel():
        return False
    return value is None or (value.dtype in VALUES and value.device == stream.device)


def couple(step: Step, arithmetic: FixedPoint, streams: Streams, value: Tensor | None, signs: Tensor | None) -> Coupled:
    """Takes a step (`Step.forward`), with the checksum of the stream that it changes."""
    from .triton_kernels import couple_kernel

    target = streams[step.target]
    count, divisor = target.numel(), round(1 / step.factor)
    if value is None and divisor == 1 and not step.difference:
        return Coupled(target)
    value = _strided(value)
    bits, programs = bits_for(divisor), _programs(count)
    result = torch.empty_like(target)
    residue = target.new_empty(packed_bytes(count, bits), dtype=torch.uint8) if divisor > 1 else None
    checksums = target.new_empty(programs, dtype=torch.int64)
    added, by_token = value is not None, arithmetic.by_token and value is not None
    magnitudes = target.new_empty(programs, dtype=torch.int32) if added and not by_token else checksums
    totals = torch.empty_like(target, dtype=torch.float32) if by_token else checksums
    with _on(target.device):
        couple_kernel[(programs,)](
            target,
            streams[step.source],
            *_operands(step, arithmetic, target, value, signs),
            result,
            checksums if residue is None else residue,
            magnitudes,
            checksums,
            totals,
            count,
            packed_bytes(count, bits),
            *_numbers(step, target, value, signs),
            BY_TOKEN=by_token,
            **_flags(step, arithmetic, value, signs),
            **_HOW,
        )
    magnitude = None
    if by_token:
        magnitude = norm(totals, torch.inf, by_token=True) * arithmetic.step
    elif added:
        magnitude = magnitudes.amax().view(torch.float32) * arithmetic.step
    return Coupled(result, residue, magnitude, checksums.sum())


def uncouple(
    step: Step,
    arithmetic: FixedPoint,
    streams: Streams,
    value: Tensor | None,
    residue: Tensor | None,
    signs: Tensor | None,
    *,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    """Undoes a step (`Step.inverse`); returns the stream before it and its checksum."""
    from .triton_kernels import uncouple_kernel

    target, value = streams[step.target], _strided(value)
    count, bits = target.numel(), bits_for(round(1 / step.factor))
    result = target if in_place else torch.empty_like(target)
    checksums = target.new_empty(_programs(count), dtype=torch.int64)
    with _on(target.device):
        uncouple_kernel[(_programs(count),)](
            target,
            streams[step.source],
            *_operands(step, arithmetic, target, value, signs),
            result,
            checksums if residue is None else residue,
            checksums,
            count,
            packed_bytes(count, bits),
            *_numbers(step, target, value, signs),
            **_flags(step, arithmetic, value, signs),
            **_HOW,
        )
    return result, checksums.sum()


def decode(arithmetic: FixedPoint, stream: Tensor, dtype: torch.dtype) -> Tensor:
    """Turns a stream into a hidden state (`FixedPoint.decode`)."""
    from .triton_kernels import decode_kernel

    result = torch.empty_like(stream, dtype=dtype)
    automatic = isinstance(arithmetic.step, Tensor)
    with _on(stream.device):
        decode_kernel[(_programs(stream.numel()),)](
            stream,
            _bits(result),
            arithmetic.step,
            stream.numel(),
            GROUPS=_GROUPS,
            AUTOMATIC=automatic,
            BFLOAT16=dtype == torch.bfloat16,
            **_HOW,
        )
    return result


def _programs(count: int) -> int:
    return -(-count // (8 * _GROUPS))


def _operands(
    step: Step, arithmetic: FixedPoint, target: Tensor, value: Tensor | None, signs: Tensor | None
) -> tuple[Any, ...]:
    """What a step reads besides its streams; a kernel that does not read one of them gets some other tensor for it."""
    return (
        target if value is None else _bits(value),
        target if signs is None else signs.reshape(-1),
        arithmetic.step,
        arithmetic.steps_per_unit,
    )


def _numbers(step: Step, target: Tensor, value: Tensor | None, signs: Tensor | None) -> tuple[Any, ...]:
    per_sign = 1 if signs is None else target.numel() // signs.numel()
    rows, columns = 1, 1
    strides: tuple[int, ...] = (1, 1, 1)
    if value is not None and not value.is_contiguous():
        (_, rows, columns), strides = value.shape, value.stride()
    return per_sign, rows, columns, *strides, 1 + step.factor, step.factor


def _flags(step: Step, arithmetic: FixedPoint, value: Tensor | None, signs: Tensor | None) -> dict[str, Any]:
    divisor = round(1 / step.factor)
    return {
        "GROUPS": _GROUPS,
        "DIVISOR": divisor,
        "BITS": bits_for(divisor),
        "DIFFERENCE": step.difference,
        "SIGNED": step.difference and signs is not None,
        "ADDED": value is not None,
        "AUTOMATIC": isinstance(arithmetic.step, Tensor),
        "BFLOAT16": value is not None and value.dtype == torch.bfloat16,
        "STRIDED": value is not None and not value.is_contiguous(),
        "COMPENSATED": step.compensated and value is not None,
    }


def _strided(value: Tensor | None) -> Tensor | None:
    """The value in a form that the kernels can read: in one piece, or of three dimensions with any strides."""
    if value is None:
        return None
    value = value.detach()
    if value.is_contiguous():
        return value
    if value.dim() < 3:
        return value[(None,) * (3 - value.dim())]
    return value if value.dim() == 3 else value.contiguous()


def _bits(values: Tensor) -> Tensor:
    """bfloat16 as the integers of its bits; see `triton_kernels`."""
    return values.view(torch.int16) if values.dtype == torch.bfloat16 else values


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the streams."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
