"""The kernels: a coupling step, its inverse, and the decoding of a stream, each in one pass over its elements.

They compute what the plain tensor code of `couplings` and `arithmetic` computes, to the last bit. What could make a bit
differ on an accelerator, and why it does not:

- Contraction. A compiler may turn a * b + c into one operation that rounds once. Every launch forbids it
  (`enable_fp_fusion=False`). But for the compensated step it could not even matter: all products there are with powers
  of two, which are exact as long as they are no denormal numbers, and these vanish in the sum.
- Rounding to integers. Triton has none of its own that the interpreter knows, so a number of less than 2**23 is rounded
  as `_nearest` does it, by sums alone, to even; larger ones are integers already.
- Division of integers. Triton's rounds to zero, the coupling's down; what lies between is made good on the remainder,
  which is right whichever way a division rounds.
- 16-bit floats. bfloat16 is read and written as the upper half of a float32, by shifts of integers, rounded to even:
  so are its denormal numbers, on every device and in the interpreter.
- Order. Magnitudes are the largest of bit patterns, as integers, which a NaN leads; checksums wrap around in 64 bits.
  Neither depends on the order in which programs run, and no atomic operation is needed.

Elements are counted in 64 bits. Each program takes `GROUPS` groups of eight neighbours, whose remainders take up as
many whole bytes as one of them has bits, so that no two programs write to the same byte.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _elements(GROUPS: tl.constexpr):
    """The groups of a program, (groups, 1), and the elements in them, (groups, 8)."""
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    return groups, groups * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _nearest(units):
    """Rounds to the nearest integer, halves to even."""
    large = tl.where(units < 0, -8388608.0, 8388608.0)
    return tl.where(tl.abs(units) < 8388608.0, (units + large) - large, units)


@triton.jit
def _units(
    value,
    source,
    elements,
    inside,
    rows,
    columns,
    stride0,
    stride1,
    stride2,
    step,
    steps_per_unit,
    own,
    share,
    BFLOAT16: tl.constexpr,
    STRIDED: tl.constexpr,
    COMPENSATED: tl.constexpr,
):
    """What a step adds, in units of the grid, not rounded yet; each operation rounds by itself."""
    places = elements
    if STRIDED:
        row = elements // columns
        places = (row // rows) * stride0 + (row % rows) * stride1 + (elements % columns) * stride2
    found = tl.load(value + places, mask=inside, other=0)
    wide = (found.to(tl.int32) << 16).to(tl.float32, bitcast=True) if BFLOAT16 else found.to(tl.float32)
    if COMPENSATED:
        wide = wide * own - (source.to(tl.float32) * step) * share
    return wide * steps_per_unit


@triton.jit
def couple_kernel(
    target,
    source,
    value,
    signs,
    step,
    steps_per_unit,
    result,
    residue,
    magnitudes,
    checksums,
    totals,
    count,
    packed_bytes,
    per_sign,
    rows,
    columns,
    stride0,
    stride1,
    stride2,
    own,
    share,
    GROUPS: tl.constexpr,
    DIVISOR: tl.constexpr,
    BITS: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    SIGNED: tl.constexpr,
    ADDED: tl.constexpr,
    AUTOMATIC: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    BFLOAT16: tl.constexpr,
    STRIDED: tl.constexpr,
    COMPENSATED: tl.constexpr,
):
    """Computes (target - source) * signs // DIVISOR + value, with what the inverse and the checks need.

    A program leaves the largest magnitude of its sums (the bits of a float32) and the sum of its target's elements;
    with BY_TOKEN the sums themselves.
    """
    groups, elements = _elements(GROUPS)
    inside = elements < count
    x = tl.load(target + elements, mask=inside, other=0)
    other = x
    tl.store(checksums + tl.program_id(0), tl.sum(x.to(tl.int64)))
    if DIFFERENCE or COMPENSATED:
        other = tl.load(source + elements, mask=inside, other=0)
    if DIFFERENCE:
        x = x - other
    if SIGNED:
        x = x * tl.load(signs + elements // per_sign, mask=inside, other=0).to(x.dtype)
    if DIVISOR > 1:
        if DIVISOR == 1 << BITS:
            remainder = x & (DIVISOR - 1)
            x = x >> BITS
        else:
            quotient = x // DIVISOR
            remainder = x - quotient * DIVISOR
            below = remainder < 0
            x = quotient - below.to(x.dtype)
            remainder = tl.where(below, remainder + DIVISOR, remainder)
        slots = tl.arange(0, 8)[None, :].to(tl.int64)
        # The bits of a group do not overlap, so that their sum is their union.
        word = tl.sum(remainder.to(tl.int64) << (slots * BITS), axis=1, keep_dims=True)
        places = groups * BITS + slots
        tl.store(
            residue + places, ((word >> (slots * 8)) & 255).to(tl.uint8), mask=(slots < BITS) & (places < packed_bytes)
        )
    if ADDED:
        if AUTOMATIC:
            step = tl.load(step)
            steps_per_unit = tl.load(steps_per_unit)
        units = _units(
            value,
            other,
            elements,
            inside,
            rows,
            columns,
            stride0,
            stride1,
            stride2,
            step,
            steps_per_unit,
            own,
            share,
            BFLOAT16,
            STRIDED,
            COMPENSATED,
        )
        # The float sum does not wrap around, so it tells what the integer sum should have been.
        total = x.to(tl.float32) + units
        if BY_TOKEN:
            tl.store(totals + elements, total, mask=inside)
        else:
            magnitude = total.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            tl.store(magnitudes + tl.program_id(0), tl.max(magnitude))
        x = x + _nearest(units).to(x.dtype)
    tl.store(result + elements, x, mask=inside)


@triton.jit
def uncouple_kernel(
    target,
    source,
    value,
    signs,
    step,
    steps_per_unit,
    result,
    residue,
    checksums,
    count,
    packed_bytes,
    per_sign,
    rows,
    columns,
    stride0,
    stride1,
    stride2,
    own,
    share,
    GROUPS: tl.constexpr,
    DIVISOR: tl.constexpr,
    BITS: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    SIGNED: tl.constexpr,
    ADDED: tl.constexpr,
    AUTOMATIC: tl.constexpr,
    BFLOAT16: tl.constexpr,
    STRIDED: tl.constexpr,
    COMPENSATED: tl.constexpr,
):
    """Undoes `couple_kernel`; `result` may be `target`. A program leaves the sum of the elements that it rebuilt."""
    groups, elements = _elements(GROUPS)
    inside = elements < count
    x = tl.load(target + elements, mask=inside, other=0)
    other = x
    if DIFFERENCE or COMPENSATED:
        other = tl.load(source + elements, mask=inside, other=0)
    if ADDED:
        if AUTOMATIC:
            step = tl.load(step)
            steps_per_unit = tl.load(steps_per_unit)
        units = _units(
            value,
            other,
            elements,
            inside,
            rows,
            columns,
            stride0,
            stride1,
            stride2,
            step,
            steps_per_unit,
            own,
            share,
            BFLOAT16,
            STRIDED,
            COMPENSATED,
        )
        x = x - _nearest(units).to(x.dtype)
    if DIVISOR > 1:
        slots = tl.arange(0, 8)[None, :].to(tl.int64)
        places = groups * BITS + slots
        packed = tl.load(residue + places, mask=(slots < BITS) & (places < packed_bytes), other=0)
        word = tl.sum(packed.to(tl.int64) << (slots * 8), axis=1, keep_dims=True)
        lost = (word >> (slots * BITS)) & ((1 << BITS) - 1)
        x = x * DIVISOR + lost.to(x.dtype)
    if SIGNED:
        x = x * tl.load(signs + elements // per_sign, mask=inside, other=0).to(x.dtype)
    if DIFFERENCE:
        x = x + other
    x = tl.where(inside, x, 0)
    tl.store(checksums + tl.program_id(0), tl.sum(x.to(tl.int64)))
    tl.store(result + elements, x, mask=inside)


@triton.jit
def decode_kernel(stream, result, step, count, GROUPS: tl.constexpr, AUTOMATIC: tl.constexpr, BFLOAT16: tl.constexpr):
    """Computes stream * step in the dtype of the result."""
    _, elements = _elements(GROUPS)
    inside = elements < count
    if AUTOMATIC:
        step = tl.load(step)
    value = tl.load(stream + elements, mask=inside, other=0).to(tl.float32) * step
    if BFLOAT16:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(result + elements, bits.to(tl.int16), mask=inside)
    else:
        tl.store(result + elements, value.to(result.dtype.element_ty), mask=inside)
