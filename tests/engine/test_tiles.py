"""Blocks coupled by themselves, tiles of tokens, and streams rebuilt in place: the same numbers in less memory."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2ForImageClassification, MixtralConfig, MixtralForCausalLM

import meft
from meft.backbone.layers import tokenwise
from meft.backbone.plan import Plan
from meft.engine.arithmetic import FixedPoint, FloatArithmetic
from meft.engine.couplings import make_coupling
from meft.engine.engine import LayerCall, Tape, finish, run_layer
from meft.engine.tiles import packed_slab, slabs, tile_of, tiles
from meft.errors import ConfigError, UnsupportedModelError
from support.peft_helpers import assert_close, assert_equal, gradients, llama, neox

WIDTH = 8
IDS = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}


def test_tiles_cover_all_tokens_once() -> None:
    shape = torch.Size([2, 5, 3])
    assert tiles(shape, None) == tiles(shape, 10) == tiles(shape, 99) == [slice(0, 10)]
    assert tiles(shape, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    stream = torch.arange(30).view(2, 5, 3)
    pieces = [tile_of(stream, tile) for tile in tiles(shape, 4)]
    assert [piece.shape for piece in pieces] == [(1, 4, 3), (1, 4, 3), (1, 2, 3)]
    assert torch.equal(torch.cat(pieces, dim=1).view(2, 5, 3), stream)
    assert tile_of(stream, slice(0, 10)) is stream


@pytest.mark.parametrize("bits", range(1, 9))
def test_slabs_begin_at_whole_bytes_of_packed_residues(bits: int) -> None:
    stream = torch.empty(1_000_003)
    found = list(slabs(stream))
    assert len(found) > 1 and found[0].start == 0 and found[-1].stop == stream.numel()
    assert all(before.stop == after.start for before, after in pairwise(found))
    packed = torch.arange(-(-stream.numel() * bits // 8))
    assert torch.equal(torch.cat([packed_slab(packed, slab, bits) for slab in found]), packed)


@pytest.mark.parametrize("factor", [1, 1 / 4, 1 / 10])
@pytest.mark.parametrize("in_place", [False, True])
def test_coupling_in_slabs_is_exact_at_any_size(factor: float, in_place: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = FixedPoint(16)
    x = numbers.encode(100 * torch.randn(1_000_003, generator=generator))
    f = torch.randn(1_000_003, generator=generator)
    coupled = numbers.couple(x, f, factor)
    y = coupled.stream.clone()
    rebuilt = numbers.uncouple(y, f, factor, coupled.residue, in_place=in_place)
    assert torch.equal(rebuilt, x)
    assert (rebuilt.data_ptr() == y.data_ptr()) == in_place
    values = numbers.decode(coupled.stream, torch.float64)
    assert float(coupled.magnitude) == pytest.approx(float(values.abs().max()), rel=1e-5)


class Block(nn.Module):
    """A function of each token alone, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.calls: list[int] = []

    def forward(self, hidden: Tensor, outside: Any) -> Tensor:
        self.calls.append(hidden.shape[:-1].numel())
        return hidden + self.down(nn.functional.dropout(torch.tanh(self.up(hidden)), 0.3, self.training))


def run(
    blocks: list[Block],
    hidden: Tensor,
    coupling: str,
    *,
    reversible: bool = True,
    size: int | None = None,
    **options: Any,
) -> list[Tensor]:
    """One pass over layers of two blocks each (one for momentum by layers); the output, then all gradients."""
    steps = make_coupling(coupling, **options)
    hidden = hidden.clone().requires_grad_()
    tape = Tape(steps, FixedPoint(16) if hidden.dtype != torch.float64 else FloatArithmetic(), hidden)
    torch.manual_seed(0)
    count = len(steps.steps)
    for first in range(0, len(blocks), count):
        own = dict(zip("FG", blocks[first : first + count], strict=False))
        parameters = tuple(parameter for block in own.values() for parameter in block.parameters())
        run_layer(
            tape,
            LayerCall(own, parameters, modules=tuple(own.values()), tile_sizes={"G": size} if size else {}),
            reversible=reversible,
        )
    output = finish(tape)
    output.square().sum().backward()
    found = [output.detach(), hidden.grad, *(p.grad for block in blocks for p in block.parameters())]
    for block in blocks:
        block.zero_grad(set_to_none=True)
    return found


@pytest.fixture
def blocks() -> list[Block]:
    torch.manual_seed(1)
    return [Block() for _ in range(6)]


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(2))


def test_momentum_by_blocks_is_momentum_with_every_block_a_layer(blocks: list[Block], hidden: Tensor) -> None:
    by_blocks = run(blocks, hidden, "momentum", granularity="block")
    by_layers = run(blocks, hidden, "momentum")
    assert all(torch.equal(a, b) for a, b in zip(by_blocks, by_layers, strict=True))


@pytest.mark.parametrize("coupling, options", [("momentum", {"granularity": "block"}), ("meft3", {})])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_tiles_rebuild_what_cached_tiles_keep(
    blocks: list[Block], hidden: Tensor, coupling: str, options: dict[str, Any], size: int
) -> None:
    fast = run(blocks, hidden, coupling, size=size, **options)
    calls = blocks[1].calls[:]
    slow = run(blocks, hidden, coupling, size=size, reversible=False, **options)
    assert torch.equal(fast[0], slow[0])
    torch.testing.assert_close(fast, slow, rtol=2e-5, atol=1e-6)
    once = [len(range(10)[tile]) for tile in tiles(hidden.shape, size)]
    assert calls == once + once and set(blocks[0].calls) == {10}


@pytest.mark.parametrize("coupling, options", [("momentum", {"granularity": "block", "gamma": 1 / 4}), ("meft3", {})])
def test_tiles_change_nothing_but_the_order_of_sums(
    blocks: list[Block], hidden: Tensor, coupling: str, options: dict[str, Any]
) -> None:
    for block in blocks:
        block.eval().double()
    tiled = run(blocks, hidden.double(), coupling, size=3, **options)
    whole = run(blocks, hidden.double(), coupling, **options)
    torch.testing.assert_close(tiled, whole, rtol=1e-9, atol=1e-9)


OPTIONS = [
    {"coupling": "momentum", "granularity": "block", "tile_size": None},
    {"coupling": "momentum", "granularity": "block", "tile_size": 5},
    {"coupling": "meft3", "tile_size": 5},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_by_blocks_and_tiles(options: dict[str, Any], dtype: torch.dtype) -> None:
    found = {}
    for backward in ("reversible", "cached"):
        model = meft.make_reversible(llama().to(dtype).train(), backward=backward, **options)
        found[backward] = gradients(model, BATCH)
        assert meft.verify(model, BATCH).bitwise if backward == "reversible" else True
    assert_close(found["reversible"], found["cached"], relative=1e-6 if dtype == torch.float32 else 1e-2)


def test_a_momentum_adapter_is_the_same_by_layers_and_by_blocks() -> None:
    """The same parameters under the same names: a saved adapter runs either way."""
    names = []
    for granularity in ("layer", "block"):
        torch.manual_seed(0)
        config = meft.MeftConfig(coupling="momentum", granularity=granularity, tile_size=5)
        model = get_peft_model(llama(), config).train()
        assert meft.verify(model, BATCH).bitwise
        assert all(gradient.abs().sum() > 0 for name, gradient in gradients(model, BATCH).items() if "down" not in name)
        names.append([name for name, p in model.named_parameters() if p.requires_grad])
    assert names[0] == names[1] and names[0]


def peak(**options: Any) -> int:
    """Bytes at the peak of a step of a wide feed-forward under LoRA-like training."""
    model = llama(intermediate_size=2048, num_hidden_layers=4)
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    meft.make_reversible(model.train(), **options)
    ids = torch.randint(3, 40, (1, 24))

    def step() -> None:
        model.model(ids).last_hidden_state.sum().backward()

    step()
    model.zero_grad(set_to_none=True)
    return meft.measure(step, model=model).activation_peak_bytes


def test_memory_by_blocks_and_tiles() -> None:
    layers, blocks = peak(), peak(granularity="block", tile_size=None)
    halves, quarters = (peak(granularity="block", tile_size=size) for size in (12, 6))
    wide = 24 * 2048 * 4  # bytes of one activation of the feed-forward
    assert blocks < layers
    # At least three wide activations are alive in its backward pass; half the tokens take half of them.
    assert blocks - halves >= 3 * wide // 2
    assert halves - quarters >= 3 * wide // 4


def test_streams_are_rebuilt_in_place() -> None:
    hidden = torch.randn(1, 1 << 14, WIDTH, requires_grad=True)
    tape = Tape(make_coupling("meft1", lam=1 / 4, beta=1 / 4), FixedPoint(16), hidden)
    for _ in range(2):
        run_layer(
            tape, LayerCall({"F": lambda x, outside: x.tanh(), "G": lambda x, outside: x.tanh()}), reversible=True
        )
    output = finish(tape)
    before = {stream.data_ptr() for stream in tape.kept}
    seen: list[set[int]] = []
    leave = tape.leave_inputs

    def watch(level: int, streams: Any, anchor: Any, *, last: bool) -> None:
        seen.append({stream.data_ptr() for stream in streams})
        leave(level, streams, anchor, last=last)

    tape.leave_inputs = watch  # type: ignore[method-assign]
    output.sum().backward()
    assert len(seen) == 4 and all(pointers == before for pointers in seen[:-1])


def test_streams_that_others_keep_are_not_overwritten() -> None:
    model = meft.make_reversible(llama().train(), anchor_every=1)
    anchored = gradients(model, BATCH)
    assert_equal(anchored, gradients(meft.make_reversible(llama().train()), BATCH))


def test_whole_samples_are_dropped_only_whole() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    config = Dinov2Config(mlp_ratio=2, drop_path_rate=0.5, **sizes)
    torch.manual_seed(0)
    model = Dinov2ForImageClassification(config).train()
    images = {"pixel_values": torch.randn(4, 3, 28, 28), "labels": torch.tensor([0, 1, 0, 1])}
    whole = meft.make_reversible(model, granularity="block", tile_size=None)
    expected = gradients(whole, images)
    meft.restore(model)
    assert_equal(gradients(meft.make_reversible(model, granularity="block", tile_size=3), images), expected)


def test_auto_takes_a_quarter_of_long_sequences() -> None:
    plan = Plan.make(coupling="meft3")
    assert [plan.tile(tokens) for tokens in (1, 1023, 1024, 2049)] == [None, None, 256, 513]
    assert Plan.make(coupling="meft3", tile_size=7).tile(2049) == 7
    assert Plan.make(coupling="meft3", tile_size=None).tile(2049) is None


class Limited(nn.Linear):
    expert_capacity = 4


class Chunked(nn.Linear):
    chunk_size_feed_forward = 2


@pytest.mark.parametrize(
    "module, alone",
    [
        (nn.Linear(4, 4), True),
        (nn.Conv1d(4, 4, 1), True),
        (nn.Conv1d(4, 4, 3), False),
        (nn.BatchNorm1d(4), False),
        (Limited(4, 4), False),
    ],
)
def test_feed_forwards_that_mix_tokens_are_not_cut(module: nn.Module, alone: bool) -> None:
    assert tokenwise(nn.Sequential(nn.Linear(4, 4), module)) == alone
    assert not tokenwise(Chunked(4, 4))


def test_recorded_routers_are_not_cut_into_tiles() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=40, num_hidden_layers=2, num_local_experts=4, output_router_logits=True, **sizes)
    torch.manual_seed(0)
    model = meft.make_reversible(MixtralForCausalLM(config).train(), granularity="block", tile_size=5)
    output = model(**BATCH)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(24, 4)] * 2
    output.loss.backward()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"coupling": "meft1", "granularity": "block"}, r"granularity='block' does not go with coupling='meft1'"),
        ({"granularity": "half"}, r"granularity='half' does not go with coupling='momentum'\. Valid: \"layer\""),
        ({"tile_size": 0}, r"tile_size=0 is out of range\. Valid: an integer, at least 1"),
        ({"tile_size": "big"}, r"tile_size='big' is a str\. Valid: an integer, at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        meft.make_reversible(llama(), **options)
    with pytest.raises(ConfigError, match=message):
        meft.MeftConfig(**{"coupling": "momentum", **options})


def test_parallel_layers_have_no_blocks() -> None:
    with pytest.raises(UnsupportedModelError, match="granularity"):
        meft.make_reversible(neox(), granularity="block")
