"""How streams are stored, scaled and inverted.

A coupling step is y = factor * x + f. `couple` computes it and returns what the inverse needs besides y and f;
`uncouple` inverts it. The couplings and the engine know nothing else about numbers, so another arithmetic slots in
without touching them.

`FloatArithmetic` keeps streams in the model's dtype and divides to invert: every inversion multiplies the rounding
error by 1/factor. `FixedPoint` keeps streams as integers X = round(x * 2**p). With factor = 1/m,

    r = X mod m                    (0 <= r < m: kept, packed)
    Y = X div m + Q(f)             (floor division; Q rounds to the grid)
    X = (Y - Q(f)) * m + r         (exact)

so that the inverse gives back every bit (Maclaurin et al. 2015, arXiv 1502.03492).

Which p fits depends on the model: a hidden state that enters with an rms of 0.1 may reach 10**5 within the stack.
`AutomaticGrid` takes it from the hidden state that enters, once a forward pass, on the device, and hands out the
`FixedPoint` of that pass; it has 32 bits where hidden states have 16, and 64 where they have more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from meft.errors import ConfigError

from .kernels.choice import fuses
from .residues import MAX_DIVISOR, bits_for, pack, unpack
from .tiles import packed_slab, slabs

MIN_FRACTION_BITS, MAX_FRACTION_BITS = 4, 24

# Binary places below the rms of what enters. bfloat16 has 8 bits and float16 has 11, so that 10 below the rms lose
# nothing there; 32-bit streams then hold 2**20 times the rms. More precise ones take 64 bits.
_BELOW_RMS = {torch.bfloat16: 10, torch.float16: 10, torch.float32: 24, torch.float64: 40}
_RANGE = {torch.int32: 31, torch.int64: 63}
_FLOAT_EXPONENTS = 126
"""Powers of two from 2**-126 to 2**126 are normal float32 numbers, and so are their inverses."""


@dataclass
class Coupled:
    """The outcome of one coupling step.

    Attributes:
        stream: the new stream y, stored as the arithmetic stores streams.
        residue: what the inverse needs besides y and f (packed remainders, uint8), or None.
        magnitude: max |y| in the units of the hidden state, float32 on the stream's device, or None where a stream
            cannot overflow: a zero-dimensional tensor, or (..., 1) for an arithmetic that looks at each token.
        checksum: of the stream before the step, where it was found in passing.
    """

    stream: Tensor
    residue: Tensor | None = None
    magnitude: Tensor | None = None
    checksum: Tensor | None = None


class Arithmetic(Protocol):
    """What the couplings and the engine ask of an arithmetic."""

    @property
    def exact(self) -> bool:
        """Whether `uncouple` gives back every bit."""

    def fitted(self, hidden: Tensor, *, training: bool, by_token: bool = False) -> Arithmetic:
        """The arithmetic of one forward pass.

        Args:
            hidden: what enters the stack.
            training: streams are to take no more memory than they must. In evaluation they have room for whatever the
                model computes, and hold the same numbers where they would fit in training.
            by_token: find the magnitude of each token, not of all.
        """

    @property
    def kernels(self) -> str:
        """Which code couples streams, one of `kernels.choice.KERNELS`."""

    @property
    def automatic(self) -> bool:
        """Whether streams fit all but any hidden state, so that nobody need wait to see whether they do."""

    def fuses(self, stream: Tensor, f: Tensor | None) -> bool:
        """Whether a kernel takes whole steps on such a stream, to which f is added, in the place of what follows."""

    @property
    def limit(self) -> Tensor | float:
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
    automatic: bool = True
    limit: float = math.inf
    kernels: str = "reference"

    def fitted(self, hidden: Tensor, *, training: bool, by_token: bool = False) -> FloatArithmetic:
        return self

    def fuses(self, stream: Tensor, f: Tensor | None) -> bool:
        return False

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
    """Streams as fixed-point numbers with `fraction_bits` binary places; inversion is exact.

    Of 32 bits, the range is +-2**(31 - fraction_bits), the step 2**-fraction_bits: +-32768 and 1.5e-5 for 16.

    Attributes:
        fraction_bits: an integer, or one in a zero-dimensional int32 tensor on the streams' device.
        dtype: of the streams, int32 or int64.
        automatic: whether the binary places were taken from the input.
        by_token: whether magnitudes are found for each token.
        kernels: which code couples streams, one of `kernels.choice.KERNELS`.
        fused: whether it is the kernels, in this forward pass.
    """

    fraction_bits: int | Tensor = 16
    dtype: torch.dtype = torch.int32
    automatic: bool = False
    by_token: bool = False
    exact: bool = True
    kernels: str = "auto"
    fused: bool = False

    def fitted(self, hidden: Tensor, *, training: bool, by_token: bool = False) -> FixedPoint:
        dtype = torch.int32 if training else torch.int64
        return replace(self, dtype=dtype, by_token=by_token, fused=self._fused(hidden))

    def _fused(self, hidden: Tensor) -> bool:
        return fuses(self.kernels, hidden)

    def fuses(self, stream: Tensor, f: Tensor | None) -> bool:
        if not self.fused:
            return False
        from .kernels.fused import takes

        return takes(stream, f)

    @cached_property
    def limit(self) -> Tensor | float:
        return _power_of_two(_RANGE[self.dtype] - self.fraction_bits)

    @cached_property
    def step(self) -> Tensor | float:
        """The distance of two neighbouring numbers of a stream, in the units of the hidden state."""
        return _power_of_two(-self.fraction_bits)

    @cached_property
    def steps_per_unit(self) -> Tensor | float:
        """The inverse of `step`, as exact as it."""
        return _power_of_two(self.fraction_bits)

    def encode(self, hidden: Tensor) -> Tensor:
        return self._quantise(hidden).contiguous()

    def decode(self, stream: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype != torch.float64 and self.fuses(stream, None):
            from .kernels.fused import decode

            return decode(self, stream, dtype)
        return stream.to(_working_dtype(dtype)).mul_(self.step).to(dtype)

    def couple(self, x: Tensor, f: Tensor | None, factor: float) -> Coupled:
        divisor = _divisor(factor)
        if f is None and divisor == 1:
            return Coupled(x)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        x_flat, y_flat, f_flat = x.reshape(-1), y.view(-1), None if f is None else f.detach().reshape(-1)
        residues, peaks = [], []
        sums = torch.empty_like(y, dtype=torch.float32) if self.by_token else None
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
            total = scaled.to(units.dtype).add_(units)
            if sums is None:
                lowest, highest = total.aminmax()
                peaks += [lowest.neg(), highest]
            else:
                sums.view(-1)[slab] = total
            torch.add(scaled, units.round_().to(self.dtype), out=y_flat[slab])
        if f is None:
            return Coupled(y, _joined(residues))
        if sums is not None and sums.numel():
            largest = norm(sums, math.inf, by_token=True)
        else:
            largest = torch.stack(peaks).amax() if peaks else y.new_zeros(())
        # The largest of nothing but zeros may have either sign.
        return Coupled(y, _joined(residues), largest.to(torch.float32).abs() * self.step)

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
        named = "auto" if self.automatic else self.fraction_bits
        held = f"The largest magnitude is {magnitude:.6g}; fraction_bits={named!r} holds magnitudes below {reach:g}."
        if not math.isfinite(magnitude):
            return (
                f"{held} The model itself overflows its dtype, or diverges: lower the learning rate, or use bfloat16 "
                "or float32."
            )
        grown = f" (up to {expected:.3g} is expected in the layers above)" if expected > magnitude else ""
        # Streams of 32 bits: a fixed grid has no others in training. `reach` knows what is halved.
        held_by_one = reach * self.steps_per_unit if isinstance(self.steps_per_unit, float) else 2.0**30
        bits = min(math.ceil(math.log2(held_by_one / expected)) - 1, MAX_FRACTION_BITS)
        if not self.automatic:
            held += ' fraction_bits="auto", the default, follows the model.'
        if bits >= MIN_FRACTION_BITS:
            return f"{held} fraction_bits={bits} would fit{grown}. Smaller factors keep hidden states smaller."
        return (
            f"{held} No fraction_bits from {MIN_FRACTION_BITS} would fit{grown}: use smaller factors, "
            'coupling="momentum", fewer coupled layers, or arithmetic="float".'
        )

    def _quantise(self, values: Tensor) -> Tensor:
        return self._units(values).round_().to(self.dtype)

    def _units(self, values: Tensor) -> Tensor:
        """Values in units of the grid, not rounded yet."""
        return values.detach().to(_working_dtype(values.dtype)) * self.steps_per_unit


@dataclass(frozen=True)
class AutomaticGrid(FixedPoint):
    """Takes the binary places of a forward pass from the rms of what enters: 2**(floor(log2(rms)) - s) is the step.

    s is 10 for hidden states of 16 bits, 24 for float32 and 40 for float64, and streams have 32 bits for the first and
    64 for the others. The step is a power of two and a function of the input alone, computed on its device without a
    synchronisation. An input without elements, of zeros, or with elements that are not finite counts as one of rms 1;
    where tokens are looked at one by one, elements that are not finite count as zeros.
    """

    automatic: bool = True

    def fitted(self, hidden: Tensor, *, training: bool, by_token: bool = False) -> FixedPoint:
        exponent = _exponent(hidden)
        if by_token and hidden.numel():
            finite = norm(hidden, math.inf) < math.inf
            exponent = torch.where(finite, exponent, _exponent(hidden.detach().nan_to_num(0.0, 0.0, 0.0)))
        dtype = torch.int32 if training and hidden.element_size() == 2 else torch.int64
        return FixedPoint(
            _BELOW_RMS[hidden.dtype] - exponent,
            dtype,
            automatic=True,
            by_token=by_token,
            kernels=self.kernels,
            fused=self._fused(hidden),
        )


def _exponent(hidden: Tensor) -> Tensor:
    """floor(log2(rms)) of a tensor as a zero-dimensional int32 tensor; 0 where there is no such number."""
    values = hidden.detach()
    if not values.numel():
        return torch.zeros((), dtype=torch.int32, device=values.device)
    largest, rms = norm(values, math.inf), norm(values) * values.numel() ** -0.5
    # Squares of very large and very small values leave float32; the largest value tells as much there.
    rms = torch.where((rms > 1e-18) & (rms < 1e18), rms, largest)
    # The exponent as IEEE 754 stores it: exact on every device, which logarithms are not.
    exponent = (rms.view(torch.int32) >> 23) - 127
    usable = (largest > 0) & (largest < math.inf)
    bound = _FLOAT_EXPONENTS - max(_BELOW_RMS.values())
    return torch.where(usable, exponent, 0).clamp(-bound, bound)


def norm(values: Tensor, order: float = 2.0, *, by_token: bool = False) -> Tensor:
    """A norm in float32, without a copy of the elements: the largest magnitude where the order is infinite.

    That of all elements, or with `by_token` those of the vectors along the last dimension, which is kept.
    """
    wide, dim = None if values.dtype == torch.float64 else torch.float32, -1 if by_token else None
    found = torch.linalg.vector_norm(values.detach(), order, dim=dim, keepdim=by_token, dtype=wide)
    return found.to(torch.float32)


def _power_of_two(exponent: int | Tensor) -> float | Tensor:
    """2**exponent, exactly; a tensor of exponents gives one of float32, and 2**126 for what is larger."""
    if isinstance(exponent, Tensor):
        return ((exponent.clamp(max=_FLOAT_EXPONENTS) + 127) << 23).view(torch.float32)
    return 2.0**exponent


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
    if x.dtype == torch.int64:
        quotient = torch.div(x, divisor, rounding_mode="floor")
        return quotient, pack(x.sub(quotient, alpha=divisor), bits)
    # A first quotient in float32 is off by a few hundred at most, so that its remainder is small enough for a second
    # one to be exact; the division of integers takes several times as long, and float64 is not everywhere.
    quotient = x.to(torch.float32).div_(divisor).floor_().to(torch.int32)
    remainder = x.sub(quotient, alpha=divisor)
    rest = remainder.to(torch.float32).div_(divisor).floor_().to(torch.int32)
    return quotient.add_(rest), pack(remainder.sub_(rest, alpha=divisor), bits)


def _joined(residues: list[Tensor]) -> Tensor | None:
    if not residues:
        return None
    return residues[0] if len(residues) == 1 else torch.cat(residues)
