"""A slow, plain, obvious MEFT in float64: no engine, no hooks, nothing of `meft`, every activation stored by autograd.

It states section 1 of the design a second time, so that every fast path has something to be compared with:

    y1 = lam  * x1 + F(x2)
    y2 = beta * x2 + G(y1)
    (x1, x2) <- (y2, y1) if switch else (y1, y2)

    >>> hidden = reference_hidden(layers, embeddings, coupling="meft1", layer_kwargs={"attention_mask": mask})
    >>> with reference_model(peft_model, coupling="meft1"):      # the whole model with its own embeddings and head
    ...     loss = peft_model(**batch).loss

**Dropout.** The reference draws random numbers in the order in which calling the pretrained layers draws them: layer by
layer, F before G, and inside a layer top to bottom. An adapter draws after the last projection of the feed-forward (or
the attention) and before the model's own dropout there; beside the feed-forward it is added after that dropout, as in
the paper's code. A comparison with dropout
on therefore needs nothing but the same `torch.manual_seed` before each of the two forward passes. The inverse does not
replay random numbers: use it without dropout.

**Compensation.** With `compensated`, momentum's y1 = x2 + (1 + gamma) * (F(x2) - x2) - gamma * (x2 - x1), and the
output is (newest + gamma * older) / (1 + gamma).

**Signs.** With sign "random" each layer of `momentum` in training multiplies gamma by +1 or -1, one for each row of the
batch, drawn before anything else of that layer. In evaluation gamma is 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

Branch = Callable[[Tensor], Tensor]
Output = str | tuple[str, float]
PAPER_GAMMA = 0.25  # what momentum has here where no gamma is given: the reference knows no model


# --- The equations, on any two functions F and G -------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One row of the table of couplings; `newest` says which of (y1, y2) of the last layer is the newest stream."""

    lam: float | Tensor
    beta: float
    switch: bool
    newest: str
    output: Output


TABLE = {
    "meft1": Rule(lam=0.1, beta=1.0, switch=True, newest="y1", output="mean"),
    "meft2": Rule(lam=1.0, beta=0.1, switch=True, newest="y2", output="mean"),
    "meft3": Rule(lam=0.1, beta=0.1, switch=False, newest="y2", output="mean"),
    "momentum": Rule(lam=PAPER_GAMMA, beta=1.0, switch=True, newest="y1", output="newest"),
}


def couple(x1: Tensor, x2: Tensor, F: Branch, G: Branch, rule: Rule) -> tuple[Tensor, Tensor]:
    """One layer: the streams that come in to the streams that go out, after the switch."""
    y1 = rule.lam * x1 + F(x2)
    y2 = rule.beta * x2 + G(y1)
    return (y2, y1) if rule.switch else (y1, y2)


def uncouple(out1: Tensor, out2: Tensor, F: Branch, G: Branch, rule: Rule) -> tuple[Tensor, Tensor]:
    """The inverse of `couple`: the streams that go out to the streams that came in."""
    y1, y2 = (out2, out1) if rule.switch else (out1, out2)
    x2 = (y2 - G(y1)) / rule.beta
    x1 = (y1 - F(x2)) / rule.lam
    return x1, x2


def combine(out1: Tensor, out2: Tensor, rule: Rule) -> Tensor:
    """The output rule: the last layer's streams, as `couple` returned them, to one hidden state."""
    y1, y2 = (out2, out1) if rule.switch else (out1, out2)
    newest, older = (y1, y2) if rule.newest == "y1" else (y2, y1)
    if rule.output == "mean":
        return (newest + older) / 2
    if rule.output == "newest":
        return newest
    if rule.output == "weighted":
        return (newest + rule.lam * older) / (1 + rule.lam)
    kind, s = rule.output
    assert kind == "sum", rule.output
    return newest + s * older


# --- The pretrained layers, written out as attention block and feed-forward block ----------------------------------


@dataclass(frozen=True)
class Adapter:
    """The two projections of a bottleneck adapter."""

    down: nn.Module
    up: nn.Module


@dataclass(frozen=True)
class Family:
    """How to compute the two blocks of a layer; `positional` names what the model's loop passes by position.

    `attention(layer, x, adapter, kwargs)` adds the adapter to the output of the attention's output projection,
    `feed_forward(layer, x, adapter)` adds it, run on what the feed-forward receives, to its last projection's output.
    Both take None for no adapter.
    """

    attention: Callable[[Any, Tensor, Adapter | None, Mapping[str, Any]], Tensor]
    feed_forward: Callable[[Any, Tensor, Adapter | None], Tensor]
    activation: Callable[[Any], Callable[[Tensor], Tensor]]
    dropout: Callable[[Any], float]
    positional: tuple[str, ...] = ()


def bottleneck(layer: nn.Module, adapter: Adapter | None, x: Tensor) -> Tensor:
    """up(dropout(act(down(x)))) with the activation and the dropout of the model; zeros without an adapter."""
    if adapter is None:
        return torch.zeros_like(x)
    family = family_of(layer)
    inner = family.activation(layer)(adapter.down(x))
    return adapter.up(dropout(inner, family.dropout(layer), layer.training))


def _bert_attention(layer: Any, x: Tensor, adapter: Adapter | None, kwargs: Mapping[str, Any]) -> Tensor:
    assert kwargs.get("encoder_hidden_states") is None, "cross-attention is written out for BART only"
    a = layer.attention.self(x, attention_mask=kwargs.get("attention_mask"))[0]
    a = layer.attention.output.dense(a)
    if adapter is not None:
        a = a + bottleneck(layer, adapter, a)
    a = dropout(a, layer.attention.output.dropout.p, layer.training)
    return layer.attention.output.LayerNorm(a + x)


def _bert_feed_forward(layer: Any, x: Tensor, adapter: Adapter | None) -> Tensor:
    f = layer.output.dense(layer.intermediate.intermediate_act_fn(layer.intermediate.dense(x)))
    beside = bottleneck(layer, adapter, x)
    f = dropout(f, layer.output.dropout.p, layer.training) + beside
    return layer.output.LayerNorm(f + x)


def _bart_attention(layer: Any, x: Tensor, adapter: Adapter | None, kwargs: Mapping[str, Any]) -> Tensor:
    a = layer.self_attn(x, attention_mask=kwargs.get("attention_mask"))[0]
    if adapter is not None:
        a = a + bottleneck(layer, adapter, a)
    x = layer.self_attn_layer_norm(x + dropout(a, layer.dropout, layer.training))
    encoder = kwargs.get("encoder_hidden_states")
    if encoder is None:
        return x
    c = layer.encoder_attn(x, key_value_states=encoder, attention_mask=kwargs.get("encoder_attention_mask"))[0]
    return layer.encoder_attn_layer_norm(x + dropout(c, layer.dropout, layer.training))


def _bart_feed_forward(layer: Any, x: Tensor, adapter: Adapter | None) -> Tensor:
    inner = dropout(layer.activation_fn(layer.fc1(x)), layer.activation_dropout, layer.training)
    f = layer.fc2(inner)
    beside = bottleneck(layer, adapter, x)
    return layer.final_layer_norm(x + (dropout(f, layer.dropout, layer.training) + beside))


def _opt_attention(layer: Any, x: Tensor, adapter: Adapter | None, kwargs: Mapping[str, Any]) -> Tensor:
    before = layer.do_layer_norm_before
    a = layer.self_attn_layer_norm(x) if before else x
    a = layer.self_attn(hidden_states=a, attention_mask=kwargs.get("attention_mask"))[0]
    if adapter is not None:
        a = a + bottleneck(layer, adapter, a)
    x = x + dropout(a, layer.dropout, layer.training)
    return x if before else layer.self_attn_layer_norm(x)


def _opt_feed_forward(layer: Any, x: Tensor, adapter: Adapter | None) -> Tensor:
    before = layer.do_layer_norm_before
    received = layer.final_layer_norm(x) if before else x
    f = layer.fc2(layer.activation_fn(layer.fc1(received)))
    beside = bottleneck(layer, adapter, received)
    x = x + (dropout(f, layer.dropout, layer.training) + beside)
    return x if before else layer.final_layer_norm(x)


_BERT = Family(
    _bert_attention,
    _bert_feed_forward,
    activation=lambda layer: layer.intermediate.intermediate_act_fn,
    dropout=lambda layer: layer.output.dropout.p,
    positional=("attention_mask", "encoder_hidden_states"),
)
_BART = Family(
    _bart_attention,
    _bart_feed_forward,
    activation=lambda layer: layer.activation_fn,
    dropout=lambda layer: layer.dropout,
    positional=("attention_mask", "encoder_hidden_states"),
)
_OPT = Family(
    _opt_attention,
    _opt_feed_forward,
    activation=lambda layer: layer.activation_fn,
    dropout=lambda layer: layer.dropout,
)

FAMILIES = {
    "BertLayer": _BERT,
    "RobertaLayer": _BERT,
    "BartEncoderLayer": _BART,
    "BartDecoderLayer": _BART,
    "OPTDecoderLayer": _OPT,
}


def family_of(layer: nn.Module) -> Family:
    return FAMILIES[type(layer).__name__]


def whole_layer(layer: nn.Module, x: Tensor, adapter: Adapter | None, kwargs: Mapping[str, Any]) -> Tensor:
    """The pretrained layer with an adapter in parallel to its feed-forward."""
    family = family_of(layer)
    return family.feed_forward(layer, family.attention(layer, x, None, kwargs), adapter)


def adapted_layer(layer: nn.Module, x: Tensor, part: Coupled, kwargs: Mapping[str, Any]) -> Tensor:
    """The pretrained layer with adapter f in parallel to its feed-forward and adapter g behind it."""
    y = whole_layer(layer, x, part.f, kwargs)
    return y + bottleneck(layer, part.g, y)


# --- The couplings: which function is F and which is G --------------------------------------------------------------


@dataclass(frozen=True)
class Coupled:
    """One layer of the stack: the pretrained layer, the adapter inside F, the adapter inside G."""

    layer: nn.Module
    f: Adapter | None = None
    g: Adapter | None = None


def branches(
    coupling: str, part: Coupled, lam: float | Tensor, kwargs: Mapping[str, Any], compensated: bool = False
) -> tuple[Branch, Branch]:
    """F and G of one layer. Under momentum lam is gamma and G is zero."""
    layer, f, g = part.layer, part.f, part.g
    family = family_of(layer)
    if coupling == "meft1":
        return lambda x2: whole_layer(layer, x2, f, kwargs), lambda y1: bottleneck(layer, g, y1)
    if coupling == "meft2":
        return lambda x2: bottleneck(layer, f, x2), lambda y1: whole_layer(layer, y1, g, kwargs)
    if coupling == "meft3":
        return lambda x2: family.attention(layer, x2, f, kwargs), lambda y1: family.feed_forward(layer, y1, g)
    assert coupling == "momentum", coupling
    if compensated:
        # All of y1 but gamma * x1, which `couple` adds.
        return lambda x2: x2 + (1 + lam) * (adapted_layer(layer, x2, part, kwargs) - x2) - lam * x2, torch.zeros_like
    return lambda x2: adapted_layer(layer, x2, part, kwargs) - lam * x2, torch.zeros_like


def with_signs(rule: Rule, x: Tensor, layer: nn.Module) -> Rule:
    """The rule with a gamma for each row of the batch: drawn among +gamma and -gamma in training, 0 otherwise."""
    signs = 2 * torch.randint(0, 2, (len(x), 1, 1), dtype=torch.int8) - 1 if layer.training else torch.zeros(1)
    return replace(rule, lam=rule.lam * signs.to(x.dtype))


def rule_for(
    coupling: str,
    lam: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    output: Output | None = None,
    compensated: bool = False,
) -> Rule:
    """The coupling's row of the table with the options that were given put in its place."""
    default = TABLE[coupling]
    if compensated and output is None:
        output = "weighted"
    if coupling == "momentum":
        lam = gamma
    return Rule(
        lam=default.lam if lam is None else lam,
        beta=default.beta if beta is None else beta,
        switch=default.switch,
        newest=default.newest,
        output=default.output if output is None else output,
    )


# --- Whole stacks ---------------------------------------------------------------------------------------------------


def forward_streams(
    parts: Iterable[Coupled],
    x1: Tensor,
    x2: Tensor,
    coupling: str,
    rule: Rule,
    kwargs: Mapping[str, Any],
    sign: str = "fixed",
    compensated: bool = False,
) -> tuple[Tensor, Tensor]:
    for part in parts:
        drawn = rule if sign == "fixed" else with_signs(rule, x1, part.layer)
        x1, x2 = couple(x1, x2, *branches(coupling, part, drawn.lam, kwargs, compensated), drawn)
    return x1, x2


def inverse_streams(
    parts: Sequence[Coupled],
    out1: Tensor,
    out2: Tensor,
    coupling: str,
    rule: Rule,
    kwargs: Mapping[str, Any],
    compensated: bool = False,
) -> tuple[Tensor, Tensor]:
    """What went into `forward_streams`, rebuilt from what came out of it."""
    for part in reversed(parts):
        out1, out2 = uncouple(out1, out2, *branches(coupling, part, rule.lam, kwargs, compensated), rule)
    return out1, out2


def _fixed(layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """A frozen layer: gradients pass through it, and its weights get none."""
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        return whole_layer(layer, hidden, None, kwargs)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def coupled_hidden(
    parts: Sequence[Coupled],
    hidden: Tensor,
    *,
    coupling: str,
    layer_kwargs: Mapping[str, Any] | None = None,
    lam: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    output: Output | None = None,
    frozen_layers: int = 0,
    cached_layers: int = 0,
    sign: str = "fixed",
    compensated: bool = False,
    loop_draws: bool = False,
) -> Tensor:
    """The hidden state after a whole stack.

    The first `frozen_layers` run as pretrained; both streams start from what they return. Gradients pass through them
    to what is trained below or beside them, such as the encoder of a decoder's frozen layers. The last
    `cached_layers` compute what reversible ones compute, so here, where every activation is stored, they are the same.
    The coupling "adapter" has no streams: h = layer with parallel adapter f (h), then h = h + adapter g (h).

    Args:
        parts: the layers in order with their adapters; those of frozen layers are not used.
        hidden: (batch, sequence, hidden), float64: what goes into the first layer.
        layer_kwargs: what the model's loop passes to each layer: `attention_mask`, for a decoder with cross-attention
            also `encoder_hidden_states` and `encoder_attention_mask`.
        loop_draws: the model's own loop draws a number for each layer (layer drop, also at 0); it drew that of the
            first.
    """
    assert hidden.dtype == torch.float64, f"the reference is float64, got {hidden.dtype}"
    assert frozen_layers + cached_layers <= len(parts)
    kwargs = layer_kwargs or {}
    walk = _drawing(parts) if loop_draws else iter(parts)
    reversible = parts[frozen_layers:]
    for part in islice(walk, frozen_layers):
        hidden = _fixed(part.layer, hidden, kwargs)
    if coupling == "adapter":
        for part in walk:
            hidden = adapted_layer(part.layer, hidden, part, kwargs)
        return hidden
    if not reversible:
        return hidden
    rule = rule_for(coupling, lam, beta, gamma, output, compensated)
    return combine(*forward_streams(walk, hidden, hidden, coupling, rule, kwargs, sign, compensated), rule)


def _drawing(parts: Sequence[Coupled]) -> Iterator[Coupled]:
    for index, part in enumerate(parts):
        if index and part.layer.training:
            torch.rand([])
        yield part


# --- The same, on the weights of a PEFT model -----------------------------------------------------------------------


def unwrap(wrapper: nn.Module, adapter: str | None = "default") -> Coupled:
    """The pretrained layer and the adapters of one wrapped layer, by reference; a plain layer has no adapters."""
    layer = _pretrained(wrapper)
    assert layer is not None, f"{type(wrapper).__name__} is neither a layer nor a wrapper of one"

    def held(which: str) -> Adapter | None:
        down, up = getattr(wrapper, f"meft_{which}_down", None), getattr(wrapper, f"meft_{which}_up", None)
        return Adapter(down[adapter], up[adapter]) if down is not None and adapter in down else None

    return Coupled(layer, held("f"), held("g"))


def reference_hidden(
    layers: Sequence[nn.Module],
    hidden: Tensor,
    *,
    coupling: str,
    adapter: str | None = "default",
    layer_kwargs: Mapping[str, Any] | None = None,
    encoder_hidden: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`coupled_hidden` on the wrapped layers of a model, with their very parameters.

    Gradients reach the same parameter objects that the engine trains, and `hidden` and `encoder_hidden`.

    Args:
        layers: one stack of wrapped layers, frozen ones included.
        encoder_hidden: encoder states for cross-attention; put into `layer_kwargs` as `encoder_hidden_states`.
        options: lam, beta, gamma, output, frozen_layers, cached_layers, sign, compensated, loop_draws.
    """
    kwargs = dict(layer_kwargs or {})
    if encoder_hidden is not None:
        kwargs["encoder_hidden_states"] = encoder_hidden
    parts = [unwrap(layer, adapter) for layer in layers]
    return coupled_hidden(parts, hidden, coupling=coupling, layer_kwargs=kwargs, **options)


class _Stack(nn.Module):
    """Stands where a model's list of layers stood and computes all of them in one call of the model's loop."""

    def __init__(
        self, parent: nn.Module, layers: Sequence[nn.Module], adapter: str | None, options: Mapping[str, Any]
    ) -> None:
        super().__init__()
        # A plain list inside a tuple: the layers must not become children of this module, they have a home.
        self._held = (list(layers), adapter, {**options, "loop_draws": _loop_draws(parent)})

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layers, adapter, options = self._held
        names = family_of(unwrap(layers[0], adapter).layer).positional
        kwargs.update(zip(names, args, strict=False))
        return reference_hidden(layers, hidden_states, adapter=adapter, layer_kwargs=kwargs, **options)


@contextmanager
def reference_model(
    model: nn.Module, *, coupling: str, adapter: str | None = "default", **options: Any
) -> Iterator[nn.Module]:
    """Inside the context every layer stack of `model` is computed by the reference; embeddings and heads stay its own.

    Args:
        model: any model with lists of wrapped (or plain) layers of the supported families.
        options: lam, beta, gamma, output, frozen_layers, cached_layers, sign, compensated, for every stack alike.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) and _pretrained(child[0])
    ]
    assert found, f"no stack of layers in {type(model).__name__}"
    try:
        for parent, name, layers in found:
            setattr(parent, name, nn.ModuleList([_Stack(parent, layers, adapter, {"coupling": coupling, **options})]))
        yield model
    finally:
        for parent, name, layers in found:
            setattr(parent, name, layers)


def _loop_draws(parent: nn.Module) -> bool:
    """Whether a model's loop draws for layer drop where there is none to drop, as before Transformers 5.23."""
    source = inspect.getsource(inspect.unwrap(type(parent).forward))
    return "torch.rand([])" in source and "self.training and self.layerdrop" not in source


def _pretrained(module: nn.Module) -> nn.Module | None:
    """The layer itself, or what a wrapper holds: PEFT's as `base_layer`, that of `make_reversible` as `pretrained`."""
    for candidate in (module, getattr(module, "base_layer", None), getattr(module, "pretrained", None)):
        if type(candidate).__name__ in FAMILIES:
            return candidate
    return None
