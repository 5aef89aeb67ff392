"""Steps on tensors without values, against real ones and against PyTorch's own tracker."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from meft.memory import measure
from meft.memory.estimation.fake import make_fake, offloaded, record_fake
from meft.memory.measurement.causes import Attribution
from meft.memory.measurement.timeline import peak_bytes


class Sums(nn.Module):
    """Adds up gradients, larger than anything else, of what several branches read."""

    def __init__(self, width: int, *, views: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(3))
        self.views = views

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = (inputs * 2).relu()
        if self.views:
            hidden = hidden.view(2, -1, inputs.shape[-1])
        first, second, third = (branch(hidden) for branch in self.branches)
        return first + second * third


class Mixed(nn.Module):
    """Adds a float32 branch to a bfloat16 one, and keeps little of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(width, width, dtype=torch.bfloat16), nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.narrow(inputs.bfloat16()) * 2 + self.wide(inputs) * 3).mean(dim=1)


def plain(width: int) -> nn.Module:
    layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3 * width), nn.GELU(), nn.LayerNorm(3 * width)]
    return nn.Sequential(*layers)


def peaks(build: Callable[[], nn.Module], rows: int, width: int) -> tuple[int, int]:
    """The peak of a real step, and of the same on tensors without values."""
    model, inputs = build(), torch.randn(rows, width)
    inputs.requires_grad_()
    real = measure(lambda: model(inputs).square().mean().backward()).peak_bytes
    with torch.device("meta"):
        fake = build()
    mode = FakeTensorMode()
    make_fake(fake, mode)
    with mode:
        given = torch.empty(rows, width, requires_grad=True)
        timeline = record_fake(
            lambda: fake(given).square().mean().backward(), [given, *fake.parameters(), *fake.buffers()]
        )
    return real, peak_bytes(timeline.blocks)


@pytest.mark.parametrize(
    "build",
    [lambda: plain(64), lambda: Sums(64, views=False), lambda: Sums(64, views=True), lambda: Mixed(64)],
    ids=["plain", "sums", "sums of views", "mixed"],
)
def test_the_peak_is_that_of_a_real_step(build: Callable[[], nn.Module]) -> None:
    real, fake = peaks(build, rows=512, width=64)

    assert fake == pytest.approx(real, rel=0.001)


def test_it_agrees_with_the_tracker_of_pytorch() -> None:
    with torch.device("meta"):
        model = plain(64)
    mode = FakeTensorMode()
    make_fake(model, mode)
    tracker = MemTracker()
    with mode:
        inputs = torch.empty(512, 64)
        tracker.track_external(model, inputs)
        older = [*model.parameters(), inputs]

        def step() -> None:
            model(inputs).square().mean().backward()

        ours = peak_bytes(record_fake(step, older).blocks)
        model.zero_grad()
        with tracker:
            step()
    theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]

    assert ours == theirs - sum(tensor.nbytes for tensor in older)


def test_parameters_that_are_shared_stay_shared() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    model["second"].weight = model["first"].weight
    model["first"].weight.requires_grad_(False)
    make_fake(model, FakeTensorMode())

    assert model["second"].weight is model["first"].weight
    assert not model["first"].weight.requires_grad
    assert model["first"].bias.requires_grad and model["first"].bias is not model["second"].bias


def test_what_is_offloaded_lies_on_the_host_and_comes_back() -> None:
    model, inputs = plain(64), torch.randn(512, 64)

    def step() -> None:
        with offloaded():
            loss = model(inputs).square().mean()
        loss.backward()

    step()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    kept = measure(lambda: model(inputs).square().mean().backward(), model=model)
    away = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    offload = measure(step, model=model)

    assert all(torch.equal(one, other) for one, other in zip(expected, away, strict=True))
    assert offload.activation_peak_bytes < kept.activation_peak_bytes
    assert offload.peak_bytes == sum(offload.causes.values())


def test_a_value_may_only_be_read_where_any_would_do() -> None:
    number = torch.ones((), device="meta")

    assert Attribution(record_fake(lambda: number.item(), [number], numbers=True)).blocks == []
    with pytest.raises(RuntimeError, match="item"):
        record_fake(lambda: number.item(), [number])


class Attended(nn.Module):
    """Attention alone, whose scores are taken in blocks."""

    def __init__(self, width: int, tokens: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, 2, tokens, width, dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(*self.weight.unbind(), is_causal=True).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [40, 200, 1000])
def test_the_blocks_of_attention_are_counted(tokens: int, dtype: torch.dtype) -> None:
    real, fake = peaks(lambda: Attended(8, tokens, dtype), 1, 8)
    assert fake == pytest.approx(real, rel=0.01)
