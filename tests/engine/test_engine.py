"""The engine on plain torch layers: counts, gradients, and what it refuses."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from meft.engine.arithmetic import Arithmetic, FixedPoint, FloatArithmetic
from meft.engine.couplings import COUPLINGS, make_coupling
from meft.engine.engine import LayerCall, Tape, finish, observed_by, run_layer
from meft.engine.tape import relative_deviation
from meft.errors import (
    ConsumedTapeError,
    DoubleBackwardError,
    DriftWarning,
    ModifiedTensorError,
    ReconstructionError,
    StreamOverflowError,
)

WIDTH, TOKENS, DEPTH = 16, 6, 5
EXACT = FixedPoint(16)


class Block(nn.Module):
    """A layer with dropout, a residual, and an optional outside tensor, as in cross-attention."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, outside: tuple[Tensor, ...] = ()) -> Tensor:
        inner = self.dropout(torch.tanh(self.down(hidden)))
        return hidden + self.up(inner) + sum(tensor.mean() * inner.mean() for tensor in outside)


def blocks(depth: int = DEPTH, dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    torch.manual_seed(1)
    return nn.ModuleList([Block(dropout) for _ in range(2 * depth)]).to(dtype)


def forward(
    stack: nn.ModuleList,
    hidden: Tensor,
    coupling: str = "meft1",
    arithmetic: Arithmetic = EXACT,
    reversible: Callable[[int], bool] = lambda index: True,
    outside: tuple[Tensor, ...] = (),
    **options: object,
) -> Tensor:
    """Runs a stack in which layer i has F = block 2i and G = block 2i + 1."""
    gamma = 1 / 4 if coupling == "momentum" else None
    tape = Tape(make_coupling(coupling, gamma=gamma), arithmetic, hidden, **options)
    for index in range(len(stack) // 2):
        f, g = stack[2 * index], stack[2 * index + 1]
        pair = nn.ModuleList([f] if coupling == "momentum" else [f, g])
        parameters = tuple(parameter for parameter in pair.parameters() if parameter.requires_grad)
        layer = LayerCall({"F": f, "G": g}, parameters, outside, tuple(pair.modules()))
        run_layer(tape, layer, reversible=reversible(index))
    return finish(tape)


def gradients(stack: nn.ModuleList, *inputs: Tensor, **options: object) -> list[Tensor]:
    """Gradients of one step with a fixed seed: of every input, and of every parameter that gets one."""
    stack.zero_grad()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    torch.manual_seed(2)
    forward(stack, leaves[0], outside=tuple(leaves[1:]), **options).square().sum().backward()
    return [*(leaf.grad for leaf in leaves), *(p.grad for p in stack.parameters() if p.grad is not None)]


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(2, TOKENS, WIDTH)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_exact_gradients_are_the_cached_ones(coupling: str, dtype: torch.dtype, hidden: Tensor) -> None:
    stack, hidden = blocks(dtype=dtype), hidden.to(dtype)
    fast = gradients(stack, hidden, coupling=coupling)
    slow = gradients(stack, hidden, coupling=coupling, reversible=lambda index: False)
    assert len(fast) == len(slow) == 1 + len(list(stack.parameters())) // (2 if coupling == "momentum" else 1)
    # The two streams' gradients of the input are added up in another order; everything else has the same bits.
    assert relative_deviation(slow[0], fast[0]) < (1e-6 if dtype.itemsize > 2 else 2e-2)
    assert all(torch.equal(a, b) for a, b in zip(fast[1:], slow[1:], strict=True))


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_outside_tensors_get_their_gradients(coupling: str, hidden: Tensor) -> None:
    outside = torch.randn(3, 4)
    fast = gradients(blocks(), hidden, outside, coupling=coupling)
    slow = gradients(blocks(), hidden, outside, coupling=coupling, reversible=lambda index: False)
    assert float(fast[1].abs().sum()) > 0
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_gradients_against_finite_differences(coupling: str) -> None:
    stack = blocks(depth=2, dropout=0.0, dtype=torch.float64)
    leaves = [torch.randn(1, 2, WIDTH).double().requires_grad_(), torch.randn(2, 2).double().requires_grad_()]

    def loss() -> Tensor:
        return forward(stack, leaves[0], coupling, FloatArithmetic(), outside=(leaves[1],)).square().sum()

    loss().backward()
    for tensor in (*leaves, *stack.parameters()):
        if tensor.grad is None:
            continue
        direction, before, step = torch.randn_like(tensor), tensor.detach().clone(), 1e-5
        with torch.no_grad():
            upper = float(tensor.copy_(before + step * direction) is not None and loss())
            lower = float(tensor.copy_(before - step * direction) is not None and loss())
            tensor.copy_(before)
        assert (upper - lower) / (2 * step) == pytest.approx(float((tensor.grad * direction).sum()), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("arithmetic", [EXACT, FloatArithmetic()])
def test_a_mix_of_reversible_and_cached_layers(arithmetic: Arithmetic, hidden: Tensor) -> None:
    stack = blocks(dtype=torch.float64)
    mixed = gradients(stack, hidden.double(), arithmetic=arithmetic, reversible=lambda index: index < 3)
    slow = gradients(stack, hidden.double(), arithmetic=arithmetic, reversible=lambda index: False)
    torch.testing.assert_close(mixed, slow, rtol=1e-7, atol=1e-9)


class Graph:
    """What the graph behind an output keeps."""

    def __init__(self, output: Tensor) -> None:
        self.nodes, waiting = set(), [output.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in self.nodes:
                self.nodes.add(node)
                waiting += [after for after, _ in node.next_functions]
        self.steps = [node for node in self.nodes if node.name() == "_ReversibleStepBackward"]

    def saved_bytes(self) -> list[int]:
        """What the nodes of each layer save, from the lowest to the highest."""
        layers: dict[int, int] = {}
        for node in sorted(self.steps, key=lambda node: node.level):
            layer = node.tape.layer_of(node.level)
            layers[layer] = layers.get(layer, 0) + sum(tensor.nbytes for tensor in node.saved_tensors)
        return list(layers.values())


@pytest.mark.parametrize(
    ("coupling", "arithmetic", "bits"),
    [
        ("meft1", EXACT, 4),
        ("meft2", EXACT, 4),
        ("meft3", EXACT, 8),
        ("momentum", EXACT, 2),
        ("meft3", FloatArithmetic(), 0),
        ("momentum", FloatArithmetic(), 0),
    ],
)
def test_a_layer_saves_its_residues_to_the_byte_and_nothing_else(
    coupling: str, arithmetic: Arithmetic, bits: int, hidden: Tensor
) -> None:
    hidden = torch.randn(1, 3, WIDTH + 1)[..., :WIDTH]
    graph = Graph(forward(blocks(), hidden.requires_grad_(), coupling, arithmetic))
    assert graph.saved_bytes() == [(hidden.numel() * bits + 7) // 8] * DEPTH


def test_packed_residues_are_counted_a_division() -> None:
    hidden = torch.randn(1, 1, WIDTH, requires_grad=True)
    stack = blocks()
    tape = Tape(make_coupling("meft3", lam=1 / 8, beta=1 / 3), EXACT, hidden)
    output, *_ = run_layer(
        tape, LayerCall({"F": stack[0], "G": stack[1]}, tuple(stack[:2].parameters())), reversible=True
    )
    assert Graph(output).saved_bytes() == [WIDTH * 3 // 8 + WIDTH * 2 // 8]


def test_every_layers_activations_are_gone_after_the_forward_pass(hidden: Tensor) -> None:
    stack, seen = blocks(), []

    def watch(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen.append(weakref.ref(output))

    handles = [block.down.register_forward_hook(watch) for block in stack]
    output = forward(stack, hidden)
    gc.collect()
    assert len(seen) == len(stack)
    assert [reference() for reference in seen] == [None] * len(seen)
    assert output.requires_grad
    for handle in handles:
        handle.remove()


def test_no_node_and_nothing_kept_under_no_grad_or_without_anything_to_train(hidden: Tensor) -> None:
    with torch.no_grad():
        assert not forward(blocks(), hidden).requires_grad
    assert not forward(blocks().requires_grad_(False), hidden).requires_grad
    graph = Graph(forward(blocks(), hidden, reversible=lambda index: False))
    assert not graph.steps


def flops_of(step: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def test_backward_recomputes_exactly_one_forward_and_none_below_the_lowest_trainable_layer(hidden: Tensor) -> None:
    one = 2 * 2 * TOKENS * WIDTH * 2 * WIDTH  # a linear layer, in floating-point operations
    stack = blocks(dropout=0.0)
    stack[:4].requires_grad_(False)  # two of five layers
    outputs: list[Tensor] = []
    assert flops_of(lambda: outputs.append(forward(stack, hidden))) == 5 * 4 * one
    # Recomputed: 3 layers of 4 linear layers. Gradients: of weights and of inputs, but not of the input of the lowest
    # trainable block, whose stream nobody differentiates.
    assert flops_of(lambda: outputs[0].sum().backward()) == 3 * 4 * one + 2 * 3 * 4 * one - one


def test_the_recomputation_runs_each_block_once_and_draws_the_same_numbers(hidden: Tensor) -> None:
    stack, calls = blocks(), []
    for block in stack:
        block.dropout.register_forward_hook(lambda module, args, output: calls.append(output.detach().clone()))
    output = forward(stack, hidden)
    before = torch.get_rng_state()
    output.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    up, down = calls[: len(stack)], calls[len(stack) :]
    assert len(down) == len(stack)
    assert all(torch.equal(a, b) for a, b in zip(up, reversed(down), strict=True))


def test_two_forward_passes_alive_at_once(hidden: Tensor) -> None:
    stack, other = blocks(dropout=0.0), torch.randn(2, TOKENS, WIDTH)
    first, second = forward(stack, hidden), forward(stack, other)
    (first.sum() + 2 * second.sum()).backward()
    together = [parameter.grad for parameter in stack.parameters()]
    stack.zero_grad()
    first, second = forward(stack, hidden), forward(stack, other)
    first.sum().backward()
    (2 * second.sum()).backward()
    torch.testing.assert_close(together, [parameter.grad for parameter in stack.parameters()], rtol=1e-5, atol=1e-6)


def test_gradients_accumulate_over_steps(hidden: Tensor) -> None:
    stack = blocks(dropout=0.0)
    forward(stack, hidden).sum().backward()
    once = [parameter.grad.clone() for parameter in stack.parameters()]
    forward(stack, hidden).sum().backward()
    torch.testing.assert_close([2 * grad for grad in once], [parameter.grad for parameter in stack.parameters()])


def test_a_second_backward_is_refused(hidden: Tensor) -> None:
    output = forward(blocks(), hidden)
    output.sum().backward(retain_graph=True)
    with pytest.raises(ConsumedTapeError, match=r"can be differentiated once.*run the forward pass again"):
        output.sum().backward()


def test_a_loss_on_an_inner_hidden_state_alone_is_refused(hidden: Tensor) -> None:
    stack = blocks()
    tape = Tape(make_coupling("meft1"), EXACT, hidden)
    layers = [LayerCall({"F": block, "G": block}, tuple(block.parameters())) for block in stack]
    states = [run_layer(tape, layer, reversible=True)[0] for layer in layers]
    with pytest.raises(ConsumedTapeError, match="they now lie above layer 9"):
        states[3].sum().backward()  # the tape holds what layer 9 left


def test_double_backward_is_refused_and_cached_layers_allow_it(hidden: Tensor) -> None:
    hidden.requires_grad_()
    with pytest.raises(DoubleBackwardError, match=r'create_graph=True.*backward="cached"'):
        torch.autograd.grad(forward(blocks(), hidden).sum(), hidden, create_graph=True)
    output = forward(blocks(), hidden, arithmetic=FloatArithmetic(), reversible=lambda index: False)
    (gradient,) = torch.autograd.grad(output.square().sum(), hidden, create_graph=True)
    gradient.sum().backward()
    assert hidden.grad is not None


def test_weights_modified_between_the_passes_are_refused(hidden: Tensor) -> None:
    stack = blocks()
    output = forward(stack, hidden)
    with torch.no_grad():
        stack[0].down.bias.add_(1)
    with pytest.raises(ModifiedTensorError, match=r"shape \(32,\).*before optimizer.step"):
        output.sum().backward()


@pytest.mark.parametrize("freeze", [False, True])
def test_flags_switched_between_the_passes_do_not_matter(freeze: bool, hidden: Tensor) -> None:
    stack = blocks()
    wanted = gradients(stack, hidden)
    stack.zero_grad()
    leaf = hidden.clone().requires_grad_()
    torch.manual_seed(2)
    output = forward(stack, leaf)
    stack.eval()
    if freeze:
        stack.requires_grad_(False)  # autograd then gives these leaves no gradient, and still the input
    output.square().sum().backward()
    found = [leaf.grad, *(parameter.grad for parameter in stack.parameters() if parameter.grad is not None)]
    assert len(found) == (1 if freeze else len(wanted))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=False))
    assert any(parameter.requires_grad for parameter in stack.parameters()) is not freeze
    assert not any(module.training for module in stack.modules())


class Noisy(Block):
    """Noise from outside the generators that are replayed."""

    generator = torch.Generator().manual_seed(0)

    def forward(self, hidden: Tensor, outside: tuple[Tensor, ...] = ()) -> Tensor:
        noise = torch.randn(hidden.shape, generator=self.generator).to(hidden.dtype)
        return super().forward(hidden, outside) + 1e-4 * noise


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("place", [0, DEPTH - 1])
def test_a_nondeterministic_layer_is_caught_in_the_same_step(coupling: str, place: int, hidden: Tensor) -> None:
    stack = blocks()
    stack[2 * place] = Noisy()
    with pytest.raises(ReconstructionError, match=rf"Layer {place} returned other values .*use_deterministic_alg"):
        gradients(stack, hidden, coupling=coupling)


def test_anchors_stop_the_error_of_nondeterministic_layers(hidden: Tensor) -> None:
    stack = nn.ModuleList([Noisy(0.0) for _ in range(2 * 8)])
    errors = {}
    for every in (2, 4):
        observer = Deviations()
        with observed_by(observer), pytest.warns(DriftWarning, match="Nondeterministic kernels"):
            gradients(stack, hidden, anchor_every=every, drift_tolerance=0.0)
        errors[every] = observer.worst
    # Each inversion multiplies the error by 10; a reconstruction of two layers cannot reach what four reach.
    assert errors[2] < errors[4] / 10


def test_anchors_keep_two_streams_every_so_many_layers(hidden: Tensor) -> None:
    graph = Graph(forward(blocks(), hidden, anchor_every=2))
    residues, streams = hidden.numel() // 2, 2 * 4 * hidden.numel()
    assert sorted(graph.saved_bytes()) == [residues] * 3 + [residues + streams] * 2


def test_anchors_do_not_change_exact_gradients(hidden: Tensor) -> None:
    plain = gradients(blocks(), hidden)
    anchored = gradients(blocks(), hidden, anchor_every=2)
    assert all(torch.equal(a, b) for a, b in zip(plain, anchored, strict=True))


class Deviations:
    """The largest difference of rebuilt streams from those of the forward pass."""

    def __init__(self) -> None:
        self.streams: dict[int, tuple[Tensor, Tensor]] = {}
        self.worst = 0.0
        self.seen: list[int] = []

    def passed(self, tape: Tape, depth: int, streams: tuple[Tensor, Tensor]) -> None:
        self.streams[depth] = (streams[0].clone(), streams[1].clone())

    def rebuilt(self, tape: Tape, depth: int, streams: tuple[Tensor, Tensor]) -> None:
        self.seen.append(depth)
        for found, wanted in zip(streams, self.streams[depth], strict=True):
            self.worst = max(self.worst, float((found.double() - wanted.double()).abs().max()))


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ninety_six_layers_with_dropout_are_rebuilt_bit_for_bit(coupling: str, dtype: torch.dtype) -> None:
    stack = nn.ModuleList([Normed(block) for block in blocks(depth=96, dtype=dtype)])
    hidden, options = torch.randn(1, 3, WIDTH).to(dtype), {"coupling": coupling}
    observer = Deviations()
    with observed_by(observer):
        fast = gradients(stack, hidden, **options)
    assert observer.seen == list(range(95, -1, -1))
    assert observer.worst == 0
    slow = gradients(stack, hidden, reversible=lambda index: False, **options)
    assert all(torch.equal(a, b) for a, b in zip(fast[1:], slow[1:], strict=True))


class Normed(nn.Module):
    """A block whose output does not grow with depth, as in a post-norm transformer."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, outside: tuple[Tensor, ...] = ()) -> Tensor:
        return nn.functional.layer_norm(self.block(hidden, outside), (WIDTH,))


def test_float_arithmetic_drifts_and_says_so(hidden: Tensor) -> None:
    with pytest.warns(DriftWarning, match=r'relative error of .*drift_tolerance=0.01.*arithmetic="exact"'):
        gradients(blocks(depth=12), hidden, coupling="meft3", arithmetic=FloatArithmetic())
    gradients(blocks(depth=2), hidden, coupling="meft3", arithmetic=FloatArithmetic())  # warnings are errors


@pytest.mark.parametrize("place", ["input", "layer", "difference"])
def test_overflow_raises_before_the_hidden_state_is_used(place: str, hidden: Tensor) -> None:
    stack = blocks(dropout=0.0)
    coupling, largest = "meft1", 40000.0
    if place == "input":
        hidden = hidden * 0 + largest
    elif place == "layer":
        nn.init.constant_(stack[4].up.bias, largest)
    else:
        coupling, largest = "momentum", 20000.0
        nn.init.constant_(stack[4].up.bias, largest)
    with pytest.raises(StreamOverflowError) as caught:
        forward(stack, hidden, coupling)
    text = str(caught.value)
    first = 0 if place == "input" else 2
    assert f"layers {first} to " in text and "fraction_bits=15 would fit" in text, text
    assert isinstance(caught.value, OverflowError)


def test_a_hidden_state_that_is_not_finite_raises(hidden: Tensor) -> None:
    stack = blocks(dropout=0.0)
    nn.init.constant_(stack[6].up.bias, float("nan"))
    with pytest.raises(StreamOverflowError, match=r"layers 3 to 4.*magnitude is nan;.*overflows its dtype"):
        forward(stack, hidden)


@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_the_advice_foresees_the_growth_of_the_layers_above(factor: float) -> None:
    stack = nn.ModuleList([Growing(factor) for _ in range(2 * 40)])
    with pytest.raises(StreamOverflowError, match=r"layers \d+ to 39") as caught:
        forward(stack, torch.ones(1, 2, WIDTH), "momentum", FixedPoint(20))
    found = re.search(r"fraction_bits=(\d+) would fit", str(caught.value))
    if factor > 2:  # 3 ** 40 fits nowhere
        assert found is None and "No fraction_bits from 4 would fit" in str(caught.value)
        return
    assert found is not None
    bits = int(found[1])
    forward(stack, torch.ones(1, 2, WIDTH), "momentum", FixedPoint(bits))
    with pytest.raises(StreamOverflowError):
        forward(stack, torch.ones(1, 2, WIDTH), "momentum", FixedPoint(bits + 2))


class Growing(Block):
    """Multiplies the hidden state."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, hidden: Tensor, outside: tuple[Tensor, ...] = ()) -> Tensor:
        return hidden * self.factor


def test_overflow_is_looked_at_once_a_forward_pass(hidden: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(Tape, "check_magnitudes", lambda tape: looks.append(len(tape.magnitudes)))
    forward(blocks(), hidden)
    assert looks == [1 + 2 * DEPTH]  # the input, and two steps a layer


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_is_replayed(autocast: torch.dtype, hidden: Tensor) -> None:
    stack = blocks()
    leaf = hidden.clone().requires_grad_()
    observer = Deviations()
    with observed_by(observer):
        with torch.autocast("cpu", autocast):
            output = forward(stack, leaf)
        output.square().sum().backward()
    assert observer.worst == 0 and len(observer.seen) == DEPTH
    assert output.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, TOKENS, WIDTH), (1, 0, WIDTH), (WIDTH,), (2, 3, 4, WIDTH)])
def test_any_shape_even_an_empty_one(shape: tuple[int, ...]) -> None:
    for coupling in COUPLINGS:
        gradients(blocks(), torch.randn(shape), coupling=coupling)


def test_hooks_on_saved_tensors_see_residues_only(hidden: Tensor) -> None:
    seen: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward(blocks(), hidden)
    assert seen == [hidden.numel() // 2] * DEPTH
    output.sum().backward()


def test_nothing_lives_on_after_a_step(hidden: Tensor) -> None:
    gc.collect()
    gc.disable()
    try:
        tapes = [weakref.ref(tape) for tape in run_and_collect_tapes(hidden)]
        assert [reference() for reference in tapes] == [None]
    finally:
        gc.enable()


def run_and_collect_tapes(hidden: Tensor) -> Iterator[Tape]:
    stack = blocks()
    tape = Tape(make_coupling("meft1"), EXACT, hidden)
    for block in copy.deepcopy(stack):
        run_layer(tape, LayerCall({"F": block, "G": block}, tuple(block.parameters())), reversible=True)
    yield tape
    finish(tape).sum().backward()
    assert tape.kept is None and tape.streams is None and tape.handles is None
