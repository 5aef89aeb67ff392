"""What is a stack, and what a model may do between its layers; against references written around the plain layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meft
from meft.backbone.adapters import Bottleneck, new_projections
from meft.backbone.discovery import find_stacks
from meft.errors import ConfigError, UnsupportedModelError
from support.peft_helpers import assert_close
from support.stacks import WIDTH, Block, Stacked, hidden_state

Between = Callable[[nn.Module, Tensor, int], Tensor]


class Worked(nn.Module):
    """A list of layers, and a model that works on the hidden state between them."""

    def __init__(self, between: Between, layers: int = 4) -> None:
        super().__init__()
        self.layers, self.between = nn.ModuleList(Block() for _ in range(layers)), between
        self.norm, self.features = nn.LayerNorm(WIDTH), nn.Parameter(torch.randn(layers, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if index < len(self.layers) - 1:
                hidden = self.between(self, hidden, index)
        return hidden


def _features(model: Any, hidden: Tensor, index: int) -> Tensor:
    """As Qwen3-VL adds visual features to some of its tokens, after some of its layers."""
    if index > 1:
        return hidden
    hidden = hidden.clone()
    hidden[:, :2] = hidden[:, :2] + model.features[index]
    return hidden


def _norm(model: Any, hidden: Tensor, index: int) -> Tensor:
    """As DETR norms what it gives its auxiliary losses."""
    return model.norm(hidden)


def _in_place(model: Any, hidden: Tensor, index: int) -> Tensor:
    return hidden.mul_(0.5)


def momentum(layers: Sequence[nn.Module], hidden: Tensor, between: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Momentum around plain layers: what the model makes takes the newest stream's place, the older one stays."""
    older = newest = hidden
    for index, layer in enumerate(layers):
        older, newest = newest, layer(newest) - 0.25 * (newest - older)
        if index < len(layers) - 1:
            newest = between(newest, index)
    return newest


def _keep(hidden: Tensor, index: int) -> Tensor:
    return hidden


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor], hidden: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    hidden = hidden.detach().requires_grad_()
    call(hidden).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found if hidden.grad is None else {**found, "hidden": hidden.grad}


@pytest.mark.parametrize("between", [_features, _norm, _in_place])
def test_what_a_model_makes_between_its_layers_becomes_the_newest_stream(between: Between) -> None:
    torch.manual_seed(0)
    model, hidden = Worked(between).double(), hidden_state().double()
    reversible = meft.make_reversible(copy.deepcopy(model), gamma=0.25, fraction_bits=24)
    work = (lambda h, i: h * 0.5) if between is _in_place else lambda h, i: between(model, h, i)
    expected = gradients(model, lambda h: momentum(model.layers, h, work), hidden)
    assert_close(gradients(reversible, reversible, hidden), expected, relative=1e-5)


@pytest.mark.parametrize("coupling", ["momentum", "meft1", "meft2"])
@pytest.mark.parametrize("between", [_features, _norm])
@pytest.mark.parametrize("options", [{}, {"cached_layers": 2}, {"frozen_layers": 1}, {"anchor_every": 2}])
def test_the_gradients_are_those_of_cached_layers(between: Between, coupling: str, options: dict[str, int]) -> None:
    found = []
    for backward in ("reversible", "cached"):
        torch.manual_seed(0)
        model = meft.make_reversible(Worked(between).double(), coupling, backward=backward, **options)
        found.append(gradients(model, model, hidden_state().double()))
    assert_close(*found, relative=1e-12)


def test_a_float_stream_changed_in_place_is_refused() -> None:
    model = meft.make_reversible(Worked(_in_place), arithmetic="float")
    message = r"with a tensor that does not come from what layers\.0 returned"
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=message):
        model(hidden_state())


class Widening(Block):
    """Returns a hidden state of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.wide = nn.Linear(width, 2 * width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return self.wide(torch.nn.functional.dropout(super().forward(hidden), 0.5, self.training))


def pyramid() -> Stacked:
    torch.manual_seed(0)
    return Stacked([Block(8), Block(8), Widening(8), Block(16), Block(16)]).double()


def test_runs_of_a_list_that_changes_its_width() -> None:
    model, hidden = pyramid(), hidden_state().double()
    low, wide, high = model.layers[:2], model.layers[2], model.layers[3:]
    reversible = meft.make_reversible(copy.deepcopy(model), gamma=0.25, fraction_bits=24)
    for _ in range(2):  # what changes its width is found out in the first pass
        torch.manual_seed(1)
        found = gradients(reversible, reversible, hidden)
        torch.manual_seed(1)
        expected = gradients(model, lambda h: momentum(high, wide(momentum(low, h, _keep)), _keep), hidden)
        assert_close(found, expected, relative=1e-5)
    assert reversible.layers[2].calls == model.layers[2].calls == 2
    assert meft.verify(reversible, {"hidden": hidden}).passed()
    assert [error.layer for error in meft.verify(reversible, {"hidden": hidden}).reconstruction_error["layers"]] == [
        0,
        1,
        3,
        4,
    ]
    meft.restore(reversible)
    assert [type(layer) for layer in reversible.layers] == [type(layer) for layer in model.layers]


@pytest.mark.parametrize("coupling", ["meft1", "meft2"])
def test_the_output_rule_holds_where_a_run_ends(coupling: str) -> None:
    found = []
    for backward in ("reversible", "cached"):
        model = meft.make_reversible(pyramid().eval().train(), coupling, backward=backward)
        torch.manual_seed(1)
        found.append(gradients(model, model, hidden_state().double()))
    assert_close(*found, relative=1e-12)


class Unmarked(nn.Module):
    """A layer as people write them."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.c = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.c(torch.tanh(self.b(torch.tanh(self.a(self.norm(hidden))))))


def _in_turn(model: Any, hidden: Tensor) -> Tensor:
    for layer in model.layers:
        hidden = layer(hidden)
    return hidden


def _beside_one_another(model: Any, hidden: Tensor) -> Tensor:
    return torch.stack([layer(hidden) for layer in model.layers]).sum(0)


def _first_alone(model: Any, hidden: Tensor) -> Tensor:
    return model.layers[0](hidden)


def test_layers_without_a_mark_are_a_stack() -> None:
    torch.manual_seed(0)
    model, hidden = Stacked([Unmarked() for _ in range(3)], _in_turn).double(), hidden_state().double()
    reversible = meft.make_reversible(copy.deepcopy(model), gamma=0.25, fraction_bits=24)
    expected = gradients(model, lambda h: momentum(model.layers, h, _keep), hidden)
    assert_close(gradients(reversible, reversible, hidden), expected, relative=1e-5)


@pytest.mark.parametrize("loop", [_beside_one_another, _first_alone])
@pytest.mark.parametrize("coupling", ["momentum", "meft1"])
def test_a_list_that_is_no_stack_runs_as_it_is(loop: Any, coupling: str) -> None:
    torch.manual_seed(0)
    model, hidden = Stacked([Unmarked() for _ in range(3)], loop).double(), hidden_state().double()
    reversible = meft.make_reversible(copy.deepcopy(model), coupling)
    gradients(reversible, reversible, hidden)
    assert_close(gradients(reversible, reversible, hidden), gradients(model, model, hidden), relative=1e-12)
    assert "layers" in meft.report(reversible).left_out


def test_a_list_with_none_in_it_is_no_stack() -> None:
    model = Stacked([Unmarked(), Unmarked()])
    model.others = nn.ModuleList([Unmarked(), None])  # type: ignore[list-item]
    assert [stack.name for stack in find_stacks(model)] == ["layers"]
    with pytest.raises(ConfigError, match=r"asks for 'others'"):
        find_stacks(model, ["others"])


def test_any_list_can_be_named() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)), nn.Tanh())
    with pytest.raises(UnsupportedModelError, match=r"has no stack of layers.* Name the list of its layers"):
        find_stacks(model)
    (stack,) = find_stacks(model, ["0"])
    assert stack.name == "0" and len(stack.layers) == 3


@pytest.mark.parametrize("shape", [(2, WIDTH, 3, 5), (2, 3, 5, WIDTH)])
def test_adapters_act_on_channels(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    down, up = new_projections(WIDTH, 4)
    adapter, hidden = Bottleneck(down, up, torch.tanh, 0.0, nn.Identity()), torch.randn(shape)
    axis = shape.index(WIDTH)
    expected = up(torch.tanh(down(hidden.movedim(axis, -1)))).movedim(-1, axis)
    assert torch.equal(adapter(hidden), expected)


@pytest.mark.parametrize("shape", [(2, WIDTH, 3, WIDTH), (2, 3, 5)])
def test_adapters_refuse_what_they_cannot_tell(shape: tuple[int, ...]) -> None:
    adapter = Bottleneck(*new_projections(WIDTH, 4), torch.tanh, 0.0, nn.Identity())
    with pytest.raises(UnsupportedModelError, match=r"An adapter of width 8 is given a hidden state of shape"):
        adapter(torch.randn(shape))


def test_the_report_says_what_is_covered() -> None:
    model = Stacked([Block(), Block()])
    model.extra = nn.Linear(WIDTH, 2 * WIDTH)
    with pytest.raises(ConfigError, match="is not reversible"):
        meft.report(model)
    meft.make_reversible(model)
    found = meft.report(model)
    inside = sum(p.numel() for p in model.layers.parameters())
    share = inside / (inside + sum(p.numel() for p in model.extra.parameters()))
    assert found.stacks == {"layers": 2} and found.parameters == pytest.approx(share)
    assert found.keeps == ("extra",)
    why = "the stages of a Block are not known"
    assert found.whole == {"layers": why}
    assert str(found) == (
        f"reversible: layers (2 layers), {share:.0%} of the parameters; keeps its activations: extra; "
        f"not in stages: layers ({why})"
    )


@pytest.mark.parametrize("width", [8, 64])
def test_the_report_counts_the_activations_that_are_kept(width: int) -> None:
    torch.manual_seed(0)
    model = Stacked([Block(), Block()], lambda model, hidden: model.extra(_in_turn(model, hidden)))
    model.extra = nn.Sequential(nn.Linear(WIDTH, width), nn.Tanh())
    meft.make_reversible(model)
    found = meft.report(model, {"hidden": hidden_state()})
    assert found.kept_bytes["extra.1"] == 4 * 2 * 3 * width  # what the tanh returned
    plain = sum(found.kept_bytes.values())
    assert found.activations is not None and 0 < found.activations < 1
    assert "% of the activations; keeps its activations: extra (" in str(found) and plain >= 4 * 2 * 3 * width
    assert not any(parameter.grad is not None for parameter in model.parameters())
