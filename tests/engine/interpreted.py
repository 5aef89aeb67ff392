"""The kernels under Triton's interpreter, against the tensor code; `test_kernels` runs this in a process of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meft.engine.arithmetic import AutomaticGrid, FixedPoint
from meft.engine.couplings import Step, make_coupling
from meft.engine.engine import LayerCall, Tape, finish, run_layer
from meft.engine.kernels import fused
from meft.engine.kernels.proof import both, both_decoded, same_bits
from meft.errors import ConfigError, ReconstructionError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EDGES = {torch.int32: 2**31, torch.int64: 2**63}


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """What overflows, or is no number, is looked at like the rest."""
    with numpy.errstate(invalid="ignore", over="ignore"):
        yield


def special(dtype: torch.dtype, bits: float) -> Tensor:
    """Values at the ends of a float's range, around halves of the grid's step, and in the denormal numbers."""
    info = torch.finfo(dtype)
    unit = 2.0**-bits
    values = [0.0, -0.0, unit / 2, -unit / 2, 1.5 * unit, 2.5 * unit, -2.5 * unit, 0.49999997 * unit, 8388607.5 * unit]
    values += [info.max, info.min, info.tiny, -info.tiny, info.smallest_normal / 4, -info.smallest_normal / 2, 1.0]
    values += [torch.inf, -torch.inf, torch.nan, info.eps, 2.0**15, -(2.0**15), 65504.0, 16777216.0 * unit]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def streams(shape: tuple[int, ...], dtype: torch.dtype, magnitude: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2**magnitude), 2**magnitude - 1
    first, second = (torch.randint(low, high, shape, generator=generator, dtype=torch.int64) for _ in range(2))
    return first.to(dtype), second.to(dtype)


def check(
    step: Step,
    arithmetic: FixedPoint,
    pair: tuple[Tensor, Tensor],
    value: Any,
    signs: Any = None,
    in_place: bool = True,
) -> list[str]:
    """Names of what was compared; fails where a bit differs."""
    names = []
    for what, plain, kernel in both(step, arithmetic, pair, value, signs, in_place=in_place):
        assert same_bits(plain, kernel), (what, step, arithmetic.dtype, value if value is None else value.dtype)
        names.append(what)
    return names


def signs_of(samples: int, dims: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (samples, *[1] * (dims - 1)), dtype=torch.int8, generator=generator).mul_(2).sub_(1)


STEPS = [step for name in ("meft1", "meft2", "meft3") for step in make_coupling(name).steps]
STEPS += [
    step
    for how in ({}, {"compensated": True}, {"granularity": "block", "gamma": 0.1}, {"sign": "random"})
    for step in make_coupling("momentum", **how).steps
]


@pytest.mark.parametrize("width", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_step_of_every_coupling_has_the_same_bits(dtype: torch.dtype, width: torch.dtype) -> None:
    """On a grid that was chosen and on one that follows the input, in training and token by token."""
    value = torch.randn(2, 11, 13, generator=torch.Generator().manual_seed(1))
    for step, (automatic, by_token) in itertools.product(STEPS, ((False, False), (True, False), (True, True))):
        grid = AutomaticGrid() if automatic else FixedPoint(12)
        fitted = grid.fitted(value.to(dtype), training=width == torch.int32, by_token=by_token)
        pair = streams((2, 11, 13), fitted.dtype, 20, 2)
        drawn = None if step.sign == "fixed" else signs_of(2, 3, 3)
        names = check(step, fitted, pair, value.to(dtype), drawn)
        assert {"stream", "residue", "magnitude", "checksum", "inverse", "checksum of the inverse"} <= {*names}


shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple) | st.just((1031,)) | st.just((3, 1, 700))


@settings(deadline=None, max_examples=20)
@given(
    shapes,
    st.integers(1, 256),
    st.sampled_from(FLOATS),
    st.sampled_from(list(EDGES)),
    st.integers(4, 24),
    st.integers(1, 31),
    st.integers(0, 2**16),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@example((2050,), 256, torch.bfloat16, torch.int32, 16, 31, 0, True, False, False)
def test_any_shape_factor_and_grid(
    shape: tuple[int, ...],
    divisor: int,
    dtype: torch.dtype,
    width: torch.dtype,
    bits: int,
    magnitude: int,
    seed: int,
    difference: bool,
    compensated: bool,
    signed: bool,
) -> None:
    step = Step("F", 0, 1, 1 / divisor, difference=difference, compensated=compensated)
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0 ** (magnitude - bits)
    signs = signs_of(shape[0], len(shape), seed) if signed else None
    check(step, FixedPoint(bits, width), streams(shape, width, magnitude, seed), value.to(dtype), signs)


@pytest.mark.parametrize("width", list(EDGES), ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_at_the_ends_of_the_range(dtype: torch.dtype, width: torch.dtype) -> None:
    """Denormal numbers, halves, zeros of both signs, what overflows and what is no number, on streams at their ends."""
    edge = EDGES[width]
    ends = torch.tensor([0, 1, -1, edge - 1, -edge, 1 - edge, 7, -7], dtype=torch.int64).to(width)
    for bits, factor, compensated in ((4, 1.0, False), (16, 1 / 8, True), (24, 1 / 3, False), (16, 1.0, True)):
        values = special(dtype, bits)
        x = ends.repeat_interleave(len(values))
        value = values.repeat(len(ends))
        step = Step("F", 0, 1, factor, compensated=compensated)
        check(step, FixedPoint(bits, width), (x, x.flip(0).contiguous()), value)
        # By itself each, so that no larger magnitude hides one that is off.
        for index in range(0, len(value), 41):
            one = slice(index, index + 1)
            check(step, FixedPoint(bits, width), (x[one].clone(), x[one].clone()), value[one])


def test_hidden_states_round_to_even_in_every_dtype() -> None:
    stream = torch.cat([torch.arange(-70000, 70000, 37), torch.tensor([2**31 - 1, -(2**31)])]).to(torch.int32)
    for dtype, bits in itertools.product(FLOATS, (torch.tensor(126), torch.tensor(-100), 4, 24)):
        bits = bits.to(torch.int32) if isinstance(bits, Tensor) else bits
        assert same_bits(*both_decoded(FixedPoint(bits), stream, dtype)), (dtype, bits)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_with_any_strides_and_tiles_of_streams(dtype: torch.dtype) -> None:
    step, pair = Step("F", 0, 1, 1 / 10, difference=True), streams((4, 6, 10), torch.int32, 24, 0)
    whole = torch.randn(4, 6, 20, 2).to(dtype)
    for value in (
        whole[:, :, ::2, 0],
        whole[..., :10, 0].transpose(0, 1).contiguous().transpose(0, 1),
        whole[:1, :1, :1, 0].expand(4, 6, 10),
    ):
        check(step, FixedPoint(12), pair, value, in_place=False)
    tile = tuple(stream.view(24, 10)[5:17].view(1, 12, 10) for stream in pair)
    check(step, FixedPoint(12), tile, whole[:1, :, :, 0].reshape(1, 12, 10))
    flat = tuple(stream.view(24, 10) for stream in pair)
    check(step, FixedPoint(12), flat, torch.randn(10, 24).to(dtype).t())


def test_what_no_kernel_takes_runs_as_tensor_code() -> None:
    pair, step = streams((5, 4), torch.int32, 20, 0), Step("F", 0, 1, 1 / 4)
    assert not FixedPoint(12, fused=True).fuses(pair[0], torch.randn(5, 4, dtype=torch.float64))
    assert not FixedPoint(12, fused=True).fuses(pair[0].t(), None)
    assert not FixedPoint(12, fused=True).fuses(pair[0][:0], None)
    for one in (pair, tuple(stream.t() for stream in pair)):
        check(step, FixedPoint(12), one, torch.randn(one[0].shape, dtype=torch.float64))
    check(Step("G", 0, 1, 1.0), FixedPoint(12), pair, None)
    check(Step("G", 0, 1, 1 / 5), FixedPoint(12), pair, None)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, hidden: Tensor, outside: Any) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden))


def trained(kernels: str, how: dict[str, Any], size: int | None, *, spoil: bool = False) -> list[Tensor]:
    """The output and all gradients of a pass over three layers of two blocks."""
    torch.manual_seed(0)
    coupling, blocks = make_coupling(**how), [Block() for _ in range(6)]
    hidden = torch.randn(2, 9, 16).requires_grad_()
    tape = Tape(coupling, AutomaticGrid(kernels=kernels), hidden)
    for index in range(3):
        mine = blocks[2 * index : 2 * index + 2]
        functions = dict(zip(("F", "G"), mine, strict=True))
        parameters = tuple(p for block in mine for p in block.parameters())
        sizes = {} if size is None else {"F": size, "G": size}
        run_layer(tape, LayerCall(functions, parameters, tile_sizes=sizes), reversible=True)[0]
    output = finish(tape)
    if spoil:
        blocks[4].linear.weight.data += 1e-3
    output.square().sum().backward()
    return [
        output.detach(),
        hidden.grad,
        *(p.grad for block in blocks for p in block.parameters() if p.grad is not None),
    ]


@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize(
    "how",
    [
        {"name": "meft1"},
        {"name": "meft3", "lam": 0.25},
        {"name": "momentum", "sign": "random", "granularity": "block"},
        {"name": "momentum", "compensated": True},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_training_gives_the_same_bits_with_and_without(
    how: dict[str, Any], size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained("reference", how, size)
    calls = []
    for name in ("couple", "uncouple", "decode"):
        made = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, made=made, name=name, **k: (calls.append(name), made(*a, **k))[1])
    kernel = trained("triton", how, size)
    assert {"couple", "uncouple", "decode"} == set(calls)
    assert len(plain) == len(kernel) and all(map(torch.equal, plain, kernel))


def test_a_layer_that_changed_is_found_by_the_checksums_of_kernels() -> None:
    with pytest.raises(ReconstructionError, match="Layer 2 returned other values"):
        trained("triton", {"name": "momentum"}, None, spoil=True)


def test_kernels_that_are_asked_for_and_not_to_be_had() -> None:
    hidden = torch.randn(2, 3, 4, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r'kernels="triton" cannot be had for a hidden state of torch.float64 on cpu'):
        AutomaticGrid(kernels="triton").fitted(hidden, training=True)
    assert not AutomaticGrid().fitted(hidden, training=True).fused
