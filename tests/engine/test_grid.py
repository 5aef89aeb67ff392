"""The grid of the streams follows the hidden state that enters."""

from __future__ import annotations

import math

import pytest
import torch

from meft.engine.arithmetic import AutomaticGrid, FixedPoint

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BELOW = {torch.bfloat16: 10, torch.float16: 10, torch.float32: 24, torch.float64: 40}


def fitted(hidden: torch.Tensor, training: bool = True) -> FixedPoint:
    return AutomaticGrid().fitted(hidden, training=training)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [1e-3, 0.115, 1.0, 1.03, 700.0])
def test_the_step_is_a_power_of_two_below_the_rms(dtype: torch.dtype, rms: float) -> None:
    hidden = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden = (hidden * rms / hidden.square().mean().sqrt()).to(dtype)
    found = hidden.double().square().mean().sqrt().item()
    assert int(fitted(hidden).fraction_bits) == BELOW[dtype] - math.floor(math.log2(found))


@pytest.mark.parametrize("dtype", DTYPES)
def test_streams_are_wide_where_hidden_states_are(dtype: torch.dtype) -> None:
    hidden = torch.ones(2, 4, dtype=dtype)
    narrow = dtype in (torch.bfloat16, torch.float16)
    assert fitted(hidden).encode(hidden).dtype == (torch.int32 if narrow else torch.int64)
    assert fitted(hidden, training=False).encode(hidden).dtype == torch.int64


@pytest.mark.parametrize("values", [[], [0.0, -0.0], [math.inf, 1.0], [math.nan, 1.0], [-math.inf, math.nan]], ids=str)
def test_inputs_without_a_size_count_as_one(values: list[float]) -> None:
    assert int(fitted(torch.tensor([values])).fraction_bits) == 24


@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e-25, 1e25])
def test_extreme_inputs_are_held(value: float) -> None:
    hidden = torch.tensor([[value, -value]])
    arithmetic = fitted(hidden)
    stream = arithmetic.encode(hidden)
    assert torch.equal(stream[:, 0], -stream[:, 1]) and (value < 1e-30 or stream.abs().min() >= 2**23)
    assert torch.equal(arithmetic.decode(stream, torch.float32), hidden) or value < 1e-30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divisor", [1, 3, 4, 10, 16, 255, 256])
def test_every_bit_comes_back(dtype: torch.dtype, divisor: int) -> None:
    generator = torch.Generator().manual_seed(divisor)
    hidden = torch.randn(4, 33, 8, generator=generator).to(dtype)
    value = (torch.randn(4, 33, 8, generator=generator) * 1000).to(dtype)
    arithmetic = fitted(hidden)
    stream = arithmetic.encode(hidden)
    coupled = arithmetic.couple(stream, value, 1 / divisor)
    assert torch.equal(arithmetic.uncouple(coupled.stream, value, 1 / divisor, coupled.residue), stream)


@pytest.mark.parametrize("divisor", [3, 5, 10, 100, 255])
def test_division_is_the_floor_at_the_ends_of_the_range(divisor: int) -> None:
    ends = torch.tensor([-(2**31), -(2**31) + 1, -divisor, -1, 0, 1, divisor - 1, divisor, 2**31 - 2, 2**31 - 1])
    drawn = torch.randint(-(2**31), 2**31, (4000,), generator=torch.Generator().manual_seed(divisor))
    multiples = drawn // divisor * divisor
    numbers = torch.cat([ends, drawn, multiples, multiples - 1]).clamp(-(2**31), 2**31 - 1)
    arithmetic = FixedPoint(16)
    coupled = arithmetic.couple(numbers.to(torch.int32), None, 1 / divisor)
    assert torch.equal(coupled.stream.long(), torch.div(numbers, divisor, rounding_mode="floor"))
    assert torch.equal(arithmetic.uncouple(coupled.stream, None, 1 / divisor, coupled.residue).long(), numbers)


def test_bits_that_do_not_fit_are_not_rounded_twice() -> None:
    """Sixty-four bits hold what float32 does, with 24 binary places below the rms."""
    hidden = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    arithmetic = fitted(hidden)
    large = hidden * 2.0**18
    assert torch.equal(arithmetic.decode(arithmetic.encode(large), torch.float32), large)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_is_not_finite_does_not_move_the_grid_of_the_others(dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype) / 100
    spoiled = hidden.clone()
    spoiled[0, 0, 0], spoiled[1, 2, 3] = math.inf, math.nan
    grids = [AutomaticGrid().fitted(x, training=False, by_token=True) for x in (hidden, spoiled)]
    assert abs(int(grids[0].fraction_bits) - int(grids[1].fraction_bits)) <= 1
    assert torch.equal(torch.as_tensor(grids[0].fraction_bits), torch.as_tensor(fitted(hidden).fraction_bits))


@pytest.mark.parametrize("shape", [(3, 5, 16), (0, 5, 16), (1, 1, 4), (7,), (2, 300_000)])
@pytest.mark.parametrize("divisor", [1, 10, 16])
def test_magnitudes_of_tokens_are_those_of_the_streams(shape: tuple[int, ...], divisor: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, value = (torch.randn(shape, generator=generator) for _ in range(2))
    whole = AutomaticGrid().fitted(hidden, training=True)
    single = AutomaticGrid().fitted(hidden, training=False, by_token=True)
    one, other = (grid.couple(grid.encode(hidden), value, 1 / divisor) for grid in (whole, single))
    assert torch.equal(one.stream, other.stream) and one.magnitude is not None and other.magnitude is not None
    if hidden.numel():
        tokens = single.decode(other.stream, torch.float32).abs().amax(-1, keepdim=True)
        torch.testing.assert_close(other.magnitude, tokens)
        assert torch.equal(other.magnitude.amax(), one.magnitude)


def test_the_number_advised_is_one_that_can_be_set() -> None:
    tiny = AutomaticGrid().fitted(torch.full((2, 4), 1e-6), training=True)
    assert "fraction_bits=24 would fit" in tiny.overflow_advice(0.5, 0.5, 0.25)
    assert "the default" not in tiny.overflow_advice(0.5, 0.5, 0.25)
    huge = FixedPoint(16).overflow_advice(1e10, 1e10, 32768)
    assert 'fraction_bits="auto", the default, follows the model. No fraction_bits from 4 would fit' in huge


@pytest.mark.parametrize("exponent", [-150, -127, -86, 0, 86, 126])
def test_steps_are_powers_of_two_with_exact_inverses(exponent: int) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        arithmetic = fitted(torch.full((1, 4), 2.0**exponent, dtype=torch.float64).to(dtype))
        step, inverse = (float(torch.as_tensor(x)) for x in (arithmetic.step, arithmetic.steps_per_unit))
        assert math.frexp(step)[0] == 0.5 and step * inverse == 1 and math.isfinite(float(arithmetic.limit))
