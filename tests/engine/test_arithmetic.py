from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meft.engine.arithmetic import FixedPoint, FloatArithmetic
from meft.engine.couplings import COUPLINGS, Step, make_coupling
from meft.engine.residues import bits_for, packed_bytes
from meft.errors import ConfigError

shapes = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)
EDGE = 2**31 - 1


def streams_of(shape: tuple[int, ...], bound: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-bound - 1, bound + 1, shape, generator=generator, dtype=torch.int64)
    return values.clamp(-bound, bound).to(torch.int32)


@settings(deadline=None)
@given(shapes, st.integers(1, 256), st.integers(4, 24), st.integers(0, 30), st.integers(0, 2**16), st.booleans())
@example((3,), 10, 16, 30, 0, False)
def test_uncouple_inverts_couple_bit_for_bit(
    shape: tuple[int, ...], divisor: int, fraction_bits: int, magnitude: int, seed: int, transposed: bool
) -> None:
    arithmetic = FixedPoint(fraction_bits)
    x = streams_of(shape, 2**magnitude, seed)
    x = x.transpose(0, -1) if transposed else x
    f = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) * 2.0 ** (magnitude - fraction_bits)
    coupled = arithmetic.couple(x, f, 1 / divisor)
    assert torch.equal(arithmetic.uncouple(coupled.stream, f, 1 / divisor, coupled.residue), x)
    kept = 0 if coupled.residue is None else coupled.residue.nbytes
    assert kept == packed_bytes(x.numel(), bits_for(divisor))


@settings(deadline=None)
@given(st.sampled_from(COUPLINGS), st.integers(2, 256), shapes, st.integers(0, 2**16))
def test_every_step_of_every_coupling_inverts_bit_for_bit(name: str, divisor: int, shape: tuple, seed: int) -> None:
    arithmetic = FixedPoint(12)
    factors = {"gamma": 1 / divisor} if name == "momentum" else {"lam": 1 / divisor, "beta": 1 / divisor}
    start = (streams_of(shape, 2**28, seed), streams_of(shape, 2**28, seed + 1))
    for step in make_coupling(name, **factors).steps:
        f = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        after, coupled = step.forward(arithmetic, start, f)
        before = step.inverse(arithmetic, after, f, coupled.residue)
        assert all(torch.equal(a, b) for a, b in zip(before, start, strict=True))


@pytest.mark.parametrize("divisor", [2, 3, 10, 256])
@pytest.mark.parametrize("value", [EDGE, -EDGE, -EDGE - 1, 0, 1, -1])
def test_the_edge_of_the_range_inverts(divisor: int, value: int) -> None:
    arithmetic, x = FixedPoint(16), torch.full((7,), value, dtype=torch.int32)
    f = torch.tensor([0.0, 1.0, -1.0, 1e-5, -1e-5, 100.25, -3.7])
    coupled = arithmetic.couple(x, f, 1 / divisor)
    assert torch.equal(arithmetic.uncouple(coupled.stream, f, 1 / divisor, coupled.residue), x)


def test_division_is_floor_division_and_the_remainder_is_never_negative() -> None:
    arithmetic = FixedPoint(16)
    x = torch.tensor([-11, -10, -1, 0, 9, 10], dtype=torch.int32)
    coupled = arithmetic.couple(x, torch.zeros(6), 0.1)
    assert coupled.stream.tolist() == [-2, -1, -1, 0, 0, 1]
    assert coupled.residue is not None
    assert coupled.residue.tolist() == [9 | 0 << 4, 9 | 0 << 4, 9 | 0 << 4]


def test_a_factor_of_one_loses_nothing_and_keeps_nothing() -> None:
    coupled = FixedPoint(16).couple(torch.tensor([3, -5], dtype=torch.int32), torch.tensor([1.0, 0.5]), 1.0)
    assert coupled.residue is None
    assert coupled.stream.tolist() == [3 + 2**16, -5 + 2**15]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_encode_then_decode_keeps_what_the_grid_holds(dtype: torch.dtype) -> None:
    arithmetic = FixedPoint(16)
    hidden = torch.tensor([0.0, 1.0, -2.5, 100.0, 2.0**-14, -300.0], dtype=dtype)
    assert torch.equal(arithmetic.decode(arithmetic.encode(hidden), dtype), hidden)


def test_float_streams_are_the_hidden_state_itself_and_invert_roughly() -> None:
    arithmetic = FloatArithmetic()
    x, f = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    assert arithmetic.encode(x) is x
    coupled = arithmetic.couple(x, f, 0.1)
    assert coupled.residue is None and coupled.magnitude is None
    assert torch.equal(coupled.stream, 0.1 * x + f)
    torch.testing.assert_close(arithmetic.uncouple(coupled.stream, f, 0.1, None), x)


def test_the_magnitude_tells_of_an_overflow_that_the_integers_hide() -> None:
    arithmetic = FixedPoint(16)
    x = arithmetic.encode(torch.tensor([30000.0]))
    coupled = arithmetic.couple(x, torch.tensor([10000.0]), 1.0)
    assert coupled.magnitude is not None and float(coupled.magnitude) == pytest.approx(40000.0)
    assert arithmetic.limit == 32768


@pytest.mark.parametrize(
    ("magnitude", "expected", "bits"),
    [(40000.0, 40000.0, 15), (32768.0, 32768.0, 15), (65536.0, 65536.0, 14), (40000.0, 5e6, 8), (40000.0, 2.0**26, 4)],
)
def test_the_advice_names_the_fraction_bits_that_fit(magnitude: float, expected: float, bits: int) -> None:
    advice = FixedPoint(16).overflow_advice(magnitude, expected, FixedPoint(16).limit)
    assert f"fraction_bits={bits} would fit" in advice
    assert f"The largest magnitude is {magnitude:.6g}; fraction_bits=16 holds magnitudes below 32768" in advice
    assert FixedPoint(bits).limit > expected >= FixedPoint(bits + 1).limit


def test_the_advice_knows_when_nothing_fits_and_when_nothing_is_finite() -> None:
    assert 'use smaller factors, coupling="momentum"' in FixedPoint(16).overflow_advice(40000.0, 2.0**27, 32768)
    assert "is nan; " in FixedPoint(16).overflow_advice(math.nan, math.nan, 32768)
    assert "is inf; " in FixedPoint(16).overflow_advice(math.inf, math.inf, 32768)


@pytest.mark.parametrize("factor", [1, 0.5, 1 / 3, 0.1, 0.25, 1 / 7, 1 / 256])
def test_exact_arithmetic_takes_inverses_of_integers(factor: float) -> None:
    FixedPoint(16).check_factor("lam", factor)


@pytest.mark.parametrize(
    ("factor", "below", "above"), [(0.3, "1/3 (0.333333)", "1/4 (0.25)"), (0.15, "1/6 (0.166667)", "1/7 (0.142857)")]
)
def test_other_factors_are_refused_with_the_nearest_two(factor: float, below: str, above: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FixedPoint(16).check_factor("gamma", factor)
    assert f"gamma={factor}" in str(caught.value)
    assert f"gamma={below}" in str(caught.value) and f"gamma={above}" in str(caught.value)


@pytest.mark.parametrize("factor", [0, -0.1, 2.0, 1 / 257, math.nan, math.inf])
def test_factors_out_of_range_are_refused(factor: float) -> None:
    with pytest.raises(ConfigError, match="an integer from 1 to 256"):
        FixedPoint(16).check_factor("lam", factor)


@pytest.mark.parametrize("factor", [0, math.nan, math.inf])
def test_float_arithmetic_refuses_what_it_cannot_divide_by(factor: float) -> None:
    with pytest.raises(ConfigError, match="cannot be inverted"):
        FloatArithmetic().check_factor("beta", factor)


def test_a_step_without_its_function_only_scales() -> None:
    step = Step("G", 1, 0, 0.5)
    streams, coupled = step.forward(FloatArithmetic(), (torch.ones(2), torch.full((2,), 4.0)), None)
    assert streams[1].tolist() == [2.0, 2.0]
    assert step.inverse(FloatArithmetic(), streams, None, coupled.residue)[1].tolist() == [4.0, 4.0]
