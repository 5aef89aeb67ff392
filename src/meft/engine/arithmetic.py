"""How streams are stored, scaled and inverted.

A coupling step is y = factor * x + f. `couple` computes it and returns what the inverse needs besides y and f;
`uncouple` inverts it. The couplings and the engine know nothing else about numbers, so another arithmetic slots in
without touching them.

`FloatArithmetic` keeps streams in the model's dtype and divides to invert: every inversion multiplies the rounding
error by 1/factor. `FixedPoint` keeps streams as int32 numbers X = round(x * 2**p). With factor = 1/m,

    r = X mod m                    (0 <= r < m: kept, packed)
    Y = X div m + Q(f)             (floor division; Q rounds to the grid)
    X = (Y - Q(f)) * m + r         (exact)

so that the inverse gives back every bit (Maclaurin et al. 2015, arXiv 1502.03492).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from meft.errors import ConfigError

from .residues import MAX_DIVISOR, bits_for, pack, unpack
from .tiles import packed_slab, slabs

INT32_LIMIT = 2**31
MIN_FRACTION_BITS, MAX_FRACTION_BITS = 4, 24


@dataclass
class Coupled:
    """The outcome of one coupling step.

    Attributes:
        stream: the new stream y, stored as the arithmetic stores streams.
        residue: what the inverse needs besides y and f (packed remainders, uint8), or None.
        magnitude: max |y| in the units of the hidden state, a zero-dimensional tensor on the stream's device, or None
            where a stream cannot overflow.
    """

    stream: Tensor
    residue: Tensor | None = None
    magnitude: Tensor | None = None


class Arithmetic(Protocol):
    """What the couplings and the engine ask of an arithmetic."""

    @property
    def exact(self) -> bool:
        """Whether `uncouple` gives back every bit."""

    @property
    def limit(self) -> float:
        """Magnitude of a hidden state that a stream can no longer hold."""

    def encode(self, hidden: Tensor) -> Tensor:
        """Turns a hidden state (float) into a stream."""

    def decode(self, stream: Tensor, dtype: torch.dtype) -> Tensor:
        """Turns a stream into a hidden state of the given float dtype."""

    def couple(self, x: Tensor, f: Tensor | None, factor: float) -> Coupled:
        """Computes y = factor * x + f; f is None for zero."""

    def uncouple(
        self, y: Tensor, f: Tensor | None, factor: float, residue: Tensor | None, *, in_place: bool = False
    ) -> Tensor:
        """Computes x = (y - f) / factor, in y's memory where that is allowed and possible."""

    def check_factor(self, name: str, factor: float) -> None:
        """Raises ConfigError if this arithmetic cannot scale by `factor`."""

    def overflow_advice(self, magnitude: float, expected: float, reach: float) -> str:
        """Says what to do about a magnitude that is not below `reach`, where up to `expected` is to come."""


@dataclass(frozen=True)
class FloatArithmetic:
    """Streams in the model's dtype; inversion by division, inexact."""

    exact: bool = False
    limit: float = math.inf

    def encode(self, hidden: Tensor) -> Tensor:
        return hidden

    def decode(self, stream: Tensor, dtype: torch.dtype) -> Tensor:
        return stream.to(dtype)

    def couple(self, x: Tensor, f: Tensor | None, factor: float) -> Coupled:
        y = x if factor == 1 else factor * x
        return Coupled(y if f is None else y + f.to(x.dtype))

    def uncouple(
        self, y: Tensor, f: Tensor | None, factor: float, residue: Tensor | None, *, in_place: bool = False
    ) -> Tensor:
        x = y if f is None else y - f.to(y.dtype)
        return x if factor == 1 else x / factor

    def check_factor(self, name: str, factor: float) -> None:
        if not math.isfinite(factor) or factor == 0:
            raise ConfigError(
                f"{name}={factor!r} cannot be inverted: the inverse divides by it. Valid is any finite number other "
                f"than 0; the paper uses 0.1 and 1. Set {name} to one of these."
            )

    def overflow_advice(self, magnitude: float, expected: float, reach: float) -> str:
        return "Float streams do not overflow."


@dataclass(frozen=True)
class FixedPoint:
    """Streams as int32 fixed-point numbers with `fraction_bits` binary places; inversion is exact.

    The range is +-2**(31 - fraction_bits), the step 2**-fraction_bits: +-32768 and 1.5e-5 for 16.
    """

    fraction_bits: int = 16
    exact: bool = True

    @property
    def limit(self) -> float:
        return float(INT32_LIMIT >> self.fraction_bits)

    def encode(self, hidden: Tensor) -> Tensor:
        return self._quantise(hidden).contiguous()

    def decode(self, stream: Tensor, dtype: torch.dtype) -> Tensor:
        return stream.to(_working_dtype(dtype)).mul_(2.0**-self.fraction_bits).to(dtype)

    def couple(self, x: Tensor, f: Tensor | None, factor: float) -> Coupled:
        divisor = _divisor(factor)
        if f is None and divisor == 1:
            return Coupled(x)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        x_flat, y_flat, f_flat = x.reshape(-1), y.view(-1), None if f is None else f.detach().reshape(-1)
        residues, peaks = [], []
        for slab in slabs(x):
            scaled = x_flat[slab]
            if divisor != 1:
                scaled, residue = _divide(scaled, divisor)
                residues.append(residue)
            if f_flat is None:
                y_flat[slab] = scaled
                continue
            units = self._units(f_flat[slab])
            # The float sum does not wrap around, so it tells what the integer sum should have been.
            lowest, highest = scaled.to(units.dtype).add_(units).aminmax()
            peaks += [lowest.neg(), highest]
            torch.add(scaled, units.round_().to(torch.int32), out=y_flat[slab])
        if f is None:
            return Coupled(y, _joined(residues))
        largest = torch.stack(peaks).amax() if peaks else y.new_zeros(())
        return Coupled(y, _joined(residues), largest.to(torch.float32) * 2.0**-self.fraction_bits)

    def uncouple(
        self, y: Tensor, f: Tensor | None, factor: float, residue: Tensor | None, *, in_place: bool = False
    ) -> Tensor:
        divisor, bits = _divisor(factor), bits_for(_divisor(factor))
        if f is None and residue is None:
            return y
        x = y if in_place else torch.empty_like(y, memory_format=torch.contiguous_format)
        # `view`, so that a stream that is not contiguous cannot be missed in place.
        x_flat, y_flat, f_flat = x.view(-1), y.reshape(-1), None if f is None else f.detach().reshape(-1)
        for slab in slabs(y):
            scaled = y_flat[slab]
            if f_flat is not None:
                scaled = torch.sub(scaled, self._quantise(f_flat[slab]), out=x_flat[slab])
            if residue is not None:
                lost = unpack(packed_slab(residue, slab, bits), bits, scaled.shape)
                torch.add(lost, scaled, alpha=divisor, out=x_flat[slab])
        return x

    def check_factor(self, name: str, factor: float) -> None:
        inverse = 1 / factor if math.isfinite(factor) and factor > 0 else math.nan
        if math.isnan(inverse) or not 1 - 1e-6 <= inverse < MAX_DIVISOR + 1e-6:
            raise ConfigError(
                f"{name}={factor!r} cannot be used in exact arithmetic: it must be 1/m with m an integer from 1 to "
                f'{MAX_DIVISOR}. Use 1/{MAX_DIVISOR} <= {name} <= 1, or arithmetic="float".'
            )
        if abs(inverse - round(inverse)) > 1e-6 * inverse:
            below, above = math.floor(inverse), math.ceil(inverse)
            raise ConfigError(
                f"{name}={factor!r} has no integer inverse (1/{name} = {inverse:.6g}), so exact arithmetic cannot "
                f"divide by it. The nearest that can be used are {name}=1/{below} ({1 / below:.6g}) and "
                f'{name}=1/{above} ({1 / above:.6g}); or choose arithmetic="float".'
            )

    def overflow_advice(self, magnitude: float, expected: float, reach: float) -> str:
        held = (
            f"The largest magnitude is {magnitude:.6g}; fraction_bits={self.fraction_bits} holds magnitudes below "
            f"{reach:g}."
        )
        if not math.isfinite(magnitude):
            return (
                f"{held} The model itself overflows its dtype, or diverges: lower the learning rate, or use bfloat16 "
                "or float32."
            )
        grown = f" (up to {expected:.3g} is expected in the layers above)" if expected > magnitude else ""
        bits = self.fraction_bits - max(0, math.floor(math.log2(expected / reach)) + 1)
        if bits < MIN_FRACTION_BITS:
            return (
                f"{held} No fraction_bits from {MIN_FRACTION_BITS} would fit{grown}: use smaller factors, "
                'coupling="momentum", fewer coupled layers, or arithmetic="float".'
            )
        return f"{held} fraction_bits={bits} would fit{grown}; smaller factors keep hidden states smaller."

    def _quantise(self, values: Tensor) -> Tensor:
        return self._units(values).round_().to(torch.int32)

    def _units(self, values: Tensor) -> Tensor:
        """Values in units of the grid, not rounded yet."""
        return values.detach().to(_working_dtype(values.dtype)) * 2.0**self.fraction_bits


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 cannot hold grid units and bfloat16 not their sums; float32 and float64 can."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _divisor(factor: float) -> int:
    return round(1 / factor)


def _divide(x: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Floor-divides by `divisor`; returns the quotients and the packed remainders."""
    bits = bits_for(divisor)
    if divisor == 1 << bits:
        return x >> bits, pack(x & (divisor - 1), bits)
    # Exact, since a quotient of 32-bit integers is nearer to another integer than float64 rounds only if it is one; the
    # division of integers takes several times as long.
    quotient = x.to(torch.float64).div_(divisor).floor_().to(torch.int32)
    return quotient, pack(x.sub(quotient, alpha=divisor), bits)


def _joined(residues: list[Tensor]) -> Tensor | None:
    if not residues:
        return None
    return residues[0] if len(residues) == 1 else torch.cat(residues)
