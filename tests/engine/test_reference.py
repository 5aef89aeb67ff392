"""The reference's own checks: the equations by hand, the blocks against the pretrained layers, gradients, inverse."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support import models
from support.reference import (
    TABLE,
    Adapter,
    Coupled,
    Rule,
    bottleneck,
    branches,
    combine,
    couple,
    coupled_hidden,
    family_of,
    forward_streams,
    inverse_streams,
    reference_hidden,
    reference_model,
    rule_for,
    uncouple,
    whole_layer,
)

COUPLINGS = tuple(TABLE)
STACKS = ("bert", "roberta", "bart.encoder", "bart.decoder", "opt", "opt_350m")


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def adapter_of(layer: nn.Module, width: int = 4) -> Adapter:
    """An adapter with weights and biases large enough that its place in the layer shows."""
    hidden = next(p.shape[0] for p in layer.parameters() if p.dim() == 1)
    down, up = nn.Linear(hidden, width).double(), nn.Linear(width, hidden).double()
    return Adapter(down, up)


def stack(name: str, *, layers: int = 2, hidden: int = 8, dropout: float = 0.0, attn: str = "sdpa") -> list[nn.Module]:
    """The layers of one stack; OPT is taken with sdpa because its eager softmax is not float64."""
    family, _, part = name.partition(".")
    model = models.build(
        family,
        "FEATURE_EXTRACTION",
        layers=layers,
        hidden=hidden,
        heads=2,
        dropout=dropout,
        dtype=torch.float64,
        attn_implementation=attn,
    )
    found = models.stacks(model)
    return list(next(child for path, child in found.items() if part in path))


def inputs(name: str, hidden: int = 8, attn: str = "sdpa") -> tuple[Tensor, dict[str, Any]]:
    """Hidden states (2, 4, hidden) with padding in the second row, in the mask form the model's loop passes."""
    x = torch.randn(2, 4, hidden, dtype=torch.float64)
    visible = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    visible[1, ..., 3] = False
    if name in ("bart.decoder", "opt", "opt_350m"):
        visible = visible.tril()

    def mask(seen: Tensor) -> Tensor:
        lowest = torch.finfo(torch.float64).min
        return seen if attn == "sdpa" else torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, lowest)

    kwargs: dict[str, Any] = {"attention_mask": mask(visible)}
    if name == "bart.decoder":
        encoder_visible = torch.ones(2, 1, 4, 5, dtype=torch.bool)
        encoder_visible[0, ..., 4] = False
        kwargs["encoder_hidden_states"] = torch.randn(2, 5, hidden, dtype=torch.float64)
        kwargs["encoder_attention_mask"] = mask(encoder_visible)
    return x, kwargs


def with_adapters(layers: Sequence[nn.Module]) -> list[Coupled]:
    return [Coupled(layer, adapter_of(layer), adapter_of(layer)) for layer in layers]


def silenced(parts: Sequence[Coupled]) -> list[Coupled]:
    """The same layers with adapters whose output is exactly zero."""
    silent = copy.deepcopy(list(parts))
    for part in silent:
        for adapter in (part.f, part.g):
            assert adapter is not None
            for parameter in adapter.up.parameters():
                nn.init.zeros_(parameter)
    return silent


def plain(layers: Sequence[nn.Module], x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    for layer in layers:
        x = layer(x, **kwargs)
    return x


# --- The equations, by hand -----------------------------------------------------------------------------------------


def double(x: Tensor) -> Tensor:
    return 2 * x


def triple(x: Tensor) -> Tensor:
    return 3 * x


@pytest.mark.parametrize(
    ("coupling", "streams"),
    [
        # lam .1, beta 1:  y = (.1 + 2, 1 + 6.3) = (2.1, 7.3);  y = (.73 + 4.2, 2.1 + 14.79) = (4.93, 16.89), switched
        ("meft1", (16.89, 4.93)),
        # lam 1, beta .1:  y = (1 + 2, .1 + 9) = (3, 9.1);  y = (9.1 + 6, .3 + 45.3) = (15.1, 45.6), switched
        ("meft2", (45.6, 15.1)),
        # lam .1, beta .1: y = (.1 + 2, .1 + 6.3) = (2.1, 6.4);  y = (.21 + 12.8, .64 + 39.03) = (13.01, 39.67)
        ("meft3", (13.01, 39.67)),
    ],
)
def test_two_layers_by_hand(coupling: str, streams: tuple[float, float]) -> None:
    rule = TABLE[coupling]
    x1 = x2 = scalar(1.0)
    for _ in range(2):
        x1, x2 = couple(x1, x2, double, triple, rule)
    assert (x1.item(), x2.item()) == pytest.approx(streams, abs=1e-12)
    for _ in range(2):
        x1, x2 = uncouple(x1, x2, double, triple, rule)
    assert (x1.item(), x2.item()) == pytest.approx((1.0, 1.0), abs=1e-10)


def test_momentum_by_hand() -> None:
    """y1 = layer(x2) - gamma * (x2 - x1), y2 = x2, switched, with layer(x) = 2x and gamma = 1/4.

    From (1, 1): y1 = 2 - 0 = 2, so (1, 2); then y1 = 4 - .25 * (2 - 1) = 3.75, so (2, 3.75).
    """
    rule = TABLE["momentum"]
    assert rule.lam == 0.25

    def F(x2: Tensor) -> Tensor:
        return 2 * x2 - rule.lam * x2

    x1 = x2 = scalar(1.0)
    x1, x2 = couple(x1, x2, F, torch.zeros_like, rule)
    assert (x1.item(), x2.item()) == (1.0, 2.0)
    x1, x2 = couple(x1, x2, F, torch.zeros_like, rule)
    assert (x1.item(), x2.item()) == (2.0, 3.75)
    assert combine(x1, x2, rule).item() == 3.75


@pytest.mark.parametrize(
    ("coupling", "output", "expected"),
    [
        # The streams go in as they come out of the last layer: switched for all but meft3, so y1 = 8, y2 = 2 there.
        ("meft1", "mean", 5.0),
        ("meft1", "newest", 8.0),  # y1, the pretrained layer's output
        ("meft1", ("sum", 0.5), 9.0),
        ("meft2", "mean", 5.0),
        ("meft2", "newest", 2.0),  # y2, the pretrained layer's output
        ("meft2", ("sum", 0.5), 6.0),
        ("meft3", "mean", 5.0),
        ("meft3", "newest", 8.0),  # y2, not switched
        ("meft3", ("sum", 0.5), 9.0),
        ("momentum", "mean", 5.0),
        ("momentum", "newest", 8.0),
        ("momentum", ("sum", 0.5), 9.0),
    ],
)
def test_output_rules_by_hand(coupling: str, output: Any, expected: float) -> None:
    rule = replace(TABLE[coupling], output=output)
    assert combine(scalar(2.0), scalar(8.0), rule).item() == expected


def test_table_is_that_of_the_design() -> None:
    assert rule_for("meft1") == Rule(0.1, 1.0, True, "y1", "mean")
    assert rule_for("meft2") == Rule(1.0, 0.1, True, "y2", "mean")
    assert rule_for("meft3") == Rule(0.1, 0.1, False, "y2", "mean")
    assert rule_for("momentum") == Rule(0.25, 1.0, True, "y1", "newest")
    assert rule_for("meft1", lam=0.5, output="newest") == Rule(0.5, 1.0, True, "y1", "newest")
    assert rule_for("momentum", gamma=0.125).lam == 0.125


# --- The blocks are those of the pretrained layers ------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", STACKS)
def test_blocks_without_adapters_are_the_pretrained_layer(name: str, attn: str, dropout: float) -> None:
    """Bit for bit, with dropout too: the blocks draw the same random numbers in the same order."""
    layer = stack(name, layers=1, dropout=dropout, attn=attn)[0]
    x, kwargs = inputs(name, attn=attn)
    torch.manual_seed(1)
    expected = layer(x, **kwargs)
    torch.manual_seed(1)
    assert torch.equal(whole_layer(layer, x, None, kwargs), expected)
    assert not torch.equal(expected, x)


@pytest.mark.parametrize("name", STACKS)
def test_adapter_stands_in_parallel_to_the_feed_forward(name: str) -> None:
    """Beside a last projection of zeros, the adapter is all of the feed-forward: the layer with the adapter equals the
    layer whose feed-forward is the adapter.
    """
    layer = stack(name, layers=1)[0]
    x, kwargs = inputs(name)
    adapter = adapter_of(layer)
    last = layer.output.dense if hasattr(layer, "intermediate") else layer.fc2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    with_adapter = whole_layer(layer, x, adapter, kwargs)

    act = family_of(layer).activation(layer)
    substitute = copy.deepcopy(layer)
    if hasattr(layer, "intermediate"):
        substitute.intermediate = nn.Sequential(adapter.down, _Function(act))
        substitute.output.dense = adapter.up
    else:
        substitute.fc1, substitute.fc2 = adapter.down, adapter.up
    torch.testing.assert_close(with_adapter, substitute(x, **kwargs), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", STACKS)
def test_adapter_stands_on_the_attention_output(name: str) -> None:
    """a + adapter(a) is what a layer with the adapter written into its attention's output projection computes."""
    layer = stack(name, layers=1)[0]
    x, kwargs = inputs(name)
    adapter, family = adapter_of(layer), family_of(layer)
    with_adapter = family.feed_forward(layer, family.attention(layer, x, adapter, kwargs), None)

    substitute = copy.deepcopy(layer)
    holder, attribute = (
        (substitute.attention.output, "dense") if hasattr(layer, "attention") else (substitute.self_attn, "out_proj")
    )
    projection, act = getattr(holder, attribute), family.activation(layer)
    setattr(holder, attribute, _Function(lambda h: (a := projection(h)) + adapter.up(act(adapter.down(a)))))
    torch.testing.assert_close(with_adapter, substitute(x, **kwargs), rtol=1e-13, atol=1e-13)
    assert not torch.allclose(with_adapter, layer(x, **kwargs))


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("coupling", "lam", "beta"), [("meft1", 0.0, 1.0), ("meft2", 1.0, 0.0), ("meft3", 0.0, 0.0), ("momentum", 0.0, 1.0)]
)
@pytest.mark.parametrize("name", STACKS)
def test_silent_adapters_and_trivial_factors_give_the_plain_model(
    name: str, coupling: str, lam: float, beta: float
) -> None:
    """With these factors (not reversible, hence refused by the engine) the newest stream is the plain hidden state."""
    layers = stack(name, layers=3)
    x, kwargs = inputs(name)
    parts = silenced(with_adapters(layers))
    factors = {"gamma": lam} if coupling == "momentum" else {"lam": lam, "beta": beta}
    hidden = coupled_hidden(parts, x, coupling=coupling, layer_kwargs=kwargs, output="newest", **factors)
    assert torch.equal(hidden, plain(layers, x, kwargs))


@pytest.mark.parametrize("name", STACKS)
def test_the_coupling_adapter_with_silent_adapters_is_the_plain_model(name: str) -> None:
    layers = stack(name)
    x, kwargs = inputs(name)
    parts = with_adapters(layers)
    hidden = coupled_hidden(silenced(parts), x, coupling="adapter", layer_kwargs=kwargs)
    assert torch.equal(hidden, plain(layers, x, kwargs))
    assert not torch.allclose(coupled_hidden(parts, x, coupling="adapter", layer_kwargs=kwargs), hidden)


def test_the_coupling_adapter_adds_the_second_adapter_to_the_layers_output() -> None:
    layer = stack("bert", layers=1)[0]
    x, kwargs = inputs("bert")
    part = with_adapters([layer])[0]
    h = whole_layer(layer, x, part.f, kwargs)
    expected = h + part.g.up(nn.functional.gelu(part.g.down(h)))
    torch.testing.assert_close(coupled_hidden([part], x, coupling="adapter", layer_kwargs=kwargs), expected)


@pytest.mark.parametrize("name", STACKS)
def test_the_adapter_has_the_activation_and_the_dropout_of_the_model(name: str) -> None:
    layer = stack(name, layers=1, dropout=0.3)[0]
    x, _ = inputs(name)
    adapter = adapter_of(layer, width=64)
    inner = (torch.relu if name.startswith("opt") else nn.functional.gelu)(adapter.down(x))
    torch.manual_seed(1)
    got = bottleneck(layer, adapter, x)
    torch.manual_seed(1)
    torch.testing.assert_close(got, adapter.up(nn.functional.dropout(inner, 0.3, training=True)))
    torch.testing.assert_close(bottleneck(layer.eval(), adapter, x), adapter.up(inner))


@pytest.mark.parametrize("coupling", [*COUPLINGS, "adapter"])
def test_frozen_layers_run_as_pretrained_and_pass_gradients_to_what_lies_below(coupling: str) -> None:
    """Their own weights and adapters get none; an embedding or a prompt below them does."""
    layers = stack("bert", layers=4)
    x, kwargs = inputs("bert")
    x.requires_grad_()
    parts = with_adapters(layers)
    below = plain(layers[:2], x, kwargs)
    above = coupled_hidden(parts[2:], below, coupling=coupling, layer_kwargs=kwargs)
    (expected,) = torch.autograd.grad(above.square().sum(), x)
    hidden = coupled_hidden(parts, x, coupling=coupling, layer_kwargs=kwargs, frozen_layers=2, cached_layers=1)
    assert torch.equal(hidden, above)
    hidden.square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert all(p.grad is None for part in parts[:2] for p in (*part.layer.parameters(), *part.f.down.parameters()))
    assert parts[2].f.up.weight.grad is not None
    everything_frozen = coupled_hidden(parts, x, coupling=coupling, layer_kwargs=kwargs, frozen_layers=4)
    assert torch.equal(everything_frozen, plain(layers, x, kwargs))


def test_dropout_is_drawn_layer_by_layer_and_f_before_g() -> None:
    layers = stack("bert", layers=2, dropout=0.3)
    x, kwargs = inputs("bert")
    parts = with_adapters(layers)
    torch.manual_seed(1)
    hidden = coupled_hidden(parts, x, coupling="meft2", layer_kwargs=kwargs, output="newest")
    torch.manual_seed(1)
    x1 = x2 = x
    for part in parts:  # meft2: F is the bottleneck, G the layer
        y1 = x1 + bottleneck(part.layer, part.f, x2)
        y2 = 0.1 * x2 + whole_layer(part.layer, y1, part.g, kwargs)
        x1, x2 = y2, y1
    assert torch.equal(hidden, x1)


# --- Inverse and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("name", STACKS)
def test_inverse_of_forward_is_the_input(name: str, coupling: str) -> None:
    """Three layers; each loses one to two digits (factor 1/lam, times the layer's own slope), so 1e-9 remains."""
    parts = with_adapters(stack(name, layers=3))
    x, kwargs = inputs(name)
    x1, x2 = x, torch.randn_like(x)  # distinct, so that no mistake can hide in their equality
    rule = rule_for(coupling)
    with torch.no_grad():
        streams = forward_streams(parts, x1, x2, coupling, rule, kwargs)
        rebuilt = inverse_streams(parts, *streams, coupling, rule, kwargs)
    assert max((rebuilt[0] - x1).abs().max(), (rebuilt[1] - x2).abs().max()) < 1e-9
    assert (streams[0] - x1).abs().max() > 1e-2


@pytest.mark.parametrize("coupling", [*COUPLINGS, "adapter"])
@pytest.mark.parametrize("name", STACKS)
def test_gradients_against_finite_differences(name: str, coupling: str) -> None:
    """Central differences, by one random direction a tensor (`fast_mode`): every adapter, the input, the encoder."""
    parts = with_adapters(stack(name))
    x, kwargs = inputs(name)
    leaves = [x, *([kwargs["encoder_hidden_states"]] if "encoder_hidden_states" in kwargs else [])]
    parameters = [p for part in parts for p in adapter_parameters(part, coupling)]
    for tensor in (*leaves, *parameters):
        tensor.requires_grad_()

    def run(*_: Tensor) -> Tensor:
        return coupled_hidden(parts, x, coupling=coupling, layer_kwargs=kwargs)

    assert torch.autograd.gradcheck(run, (*leaves, *parameters), fast_mode=True)


def adapter_parameters(part: Coupled, coupling: str) -> list[nn.Parameter]:
    adapters = [part.f] if coupling == "momentum" else [part.f, part.g]
    return [p for adapter in adapters for projection in (adapter.down, adapter.up) for p in projection.parameters()]


# --- On wrapped layers and whole models -----------------------------------------------------------------------------


class Wrapped(nn.Module):
    """What a wrapped layer of a PEFT model looks like from outside."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        for which in "fg":
            adapter = adapter_of(base_layer)
            setattr(self, f"meft_{which}_down", nn.ModuleDict({"other": adapter.down}))
            setattr(self, f"meft_{which}_up", nn.ModuleDict({"other": adapter.up}))


def test_reference_hidden_uses_the_wrapped_layers_own_parameters() -> None:
    wrapped = [Wrapped(layer) for layer in stack("bart.decoder")]
    x, kwargs = inputs("bart.decoder")
    encoder = kwargs.pop("encoder_hidden_states").requires_grad_()
    hidden = reference_hidden(
        wrapped, x, coupling="meft1", adapter="other", layer_kwargs=kwargs, encoder_hidden=encoder
    )
    parts = [
        Coupled(
            w.base_layer,
            Adapter(w.meft_f_down["other"], w.meft_f_up["other"]),
            Adapter(w.meft_g_down["other"], w.meft_g_up["other"]),
        )
        for w in wrapped
    ]
    expected = coupled_hidden(parts, x, coupling="meft1", layer_kwargs={**kwargs, "encoder_hidden_states": encoder})
    assert torch.equal(hidden, expected)
    hidden.square().sum().backward()
    assert encoder.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for w in wrapped for n, p in w.named_parameters() if n.startswith("meft_"))


def test_an_adapter_of_another_name_is_not_used() -> None:
    wrapped = [Wrapped(layer) for layer in stack("bert")]
    x, kwargs = inputs("bert")
    absent = reference_hidden(wrapped, x, coupling="adapter", adapter="default", layer_kwargs=kwargs)
    assert torch.equal(absent, plain([w.base_layer for w in wrapped], x, kwargs))


@pytest.mark.parametrize(("family", "task"), models.FAMILY_TASKS)
def test_reference_model_keeps_embeddings_and_heads_and_puts_the_layers_back(family: str, task: str) -> None:
    """With gamma = 0 the reference is the plain model, embeddings, dropout and head and all."""
    model = models.build(family, task, layers=2, dropout=0.2, dtype=torch.float64, attn_implementation="sdpa")
    inputs, layers = models.batch(family, task), list(models.stacks(model).values())
    torch.manual_seed(1)
    expected = model(**inputs)[0]
    with reference_model(model, coupling="momentum", gamma=0.0):
        torch.manual_seed(1)
        assert torch.equal(model(**inputs)[0], expected)
    with reference_model(model, coupling="momentum", gamma=0.25):
        torch.manual_seed(1)
        assert not torch.equal(model(**inputs)[0], expected)
    assert all(a is b for a, b in zip(models.stacks(model).values(), layers, strict=True))


@pytest.mark.parametrize("family", models.FAMILIES)
def test_masks_hide_padding(family: str) -> None:
    """What stands in the padding changes nothing at the visible places, in the reference as in the model."""
    model = models.build(family, "FEATURE_EXTRACTION", dtype=torch.float64, attn_implementation="sdpa")
    # On the right of a causal model nothing looks at the padding, mask or no mask.
    inputs = models.batch(family, "FEATURE_EXTRACTION", padding="left" if family.startswith("opt") else "right")
    name = "decoder_" if family == "bart" else ""
    visible = inputs[f"{name}attention_mask"].bool()
    other = {key: value.clone() for key, value in inputs.items()}
    other["input_ids"][inputs["attention_mask"] == 0] = 7
    if family == "bart":
        other["decoder_input_ids"][~visible] = 7
    # RoBERTa counts positions by the padding token, so there only the states, not the positions, may differ.
    if family == "roberta":
        positions = torch.arange(2, 2 + visible.shape[1]).expand_as(visible)
        inputs["position_ids"], other["position_ids"] = positions, positions
    with reference_model(model, coupling="momentum"):
        first, second = model(**inputs).last_hidden_state, model(**other).last_hidden_state
    torch.testing.assert_close(first[visible], second[visible], rtol=1e-12, atol=1e-12)
    assert torch.equal(inputs["attention_mask"], other["attention_mask"])
    assert not torch.equal(inputs["input_ids"], other["input_ids"])


def test_the_reference_refuses_other_precisions() -> None:
    layers = [layer.float() for layer in stack("bert")]
    with pytest.raises(AssertionError, match=r"the reference is float64, got torch\.float32"):
        coupled_hidden([Coupled(layer) for layer in layers], torch.zeros(1, 2, 8), coupling="momentum")


def test_branches_of_momentum_subtract_gamma_times_the_stream() -> None:
    layer = stack("bert", layers=1)[0]
    x, kwargs = inputs("bert")
    F, G = branches("momentum", Coupled(layer), 0.25, kwargs)
    assert torch.equal(F(x), layer(x, **kwargs) - 0.25 * x)
    assert not G(x).any()
