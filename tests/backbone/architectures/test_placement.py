"""Where the parallel adapter goes: by the table, by the names of children, by the user's choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from meft.backbone.adapters import Bottleneck, beside
from meft.backbone.architectures import architecture_of, feed_forward_of
from meft.backbone.architectures.placement import submodule
from meft.errors import ConfigError, UnsupportedModelError
from meft_lab.families.shrink import tiny_config
from support.known_layouts import NAMES, make
from support.layer_calls import Call, calls


def first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def passing(call: Call, entry: nn.Module, exit_: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """What enters and what leaves two modules during one call of a layer."""
    entered: list[Tensor] = []
    left: list[Tensor] = []
    handles = [
        entry.register_forward_pre_hook(
            lambda module, args, kwargs: entered.append(args[0] if args else next(iter(kwargs.values()))),
            with_kwargs=True,
        ),
        exit_.register_forward_hook(lambda module, args, output: left.append(first(output))),
    ]
    with torch.no_grad():
        call.whole()
    for handle in handles:
        handle.remove()
    return entered, left


@pytest.mark.parametrize("name", NAMES)
def test_every_row_names_modules_of_hidden_width(name: str) -> None:
    """Called once a call of the layer, entered and left by every token at the width of the hidden state."""
    model, batch = make(name)
    for call in calls(model, batch):
        known = architecture_of(call.layer)
        assert known is not None
        attention = submodule(call.layer, known.attention_exit)
        assert attention is not None
        for entry, exit_ in (feed_forward_of(call.layer, "layer"), (attention, attention)):
            entered, left = passing(call, entry, exit_)
            assert len(left) == len(entered) == 1
            assert left[0].numel() == call.hidden.numel() and left[0].shape[-1] == call.hidden.shape[-1]
            if entry is not attention:
                assert entered[0].numel() == call.hidden.numel() and entered[0].shape[-1] == call.hidden.shape[-1]


def test_experts_that_return_one_matrix_of_tokens() -> None:
    """Llama 4's; the adapter sees them in rows."""
    model, batch = make("llama4_text")
    call = calls(model.eval(), batch)[0]
    down, up = nn.Linear(32, 4), nn.Linear(4, 32)
    adapter = Bottleneck(down, up, torch.relu, 0.0, call.layer)
    ends = feed_forward_of(call.layer, "layer")
    entered, plain = passing(call, *ends)
    with beside(*ends, adapter):
        _, adapted = passing(call, *ends)
    assert entered[0].shape != plain[0].shape
    assert torch.equal(adapted[0], plain[0] + adapter(entered[0]).view_as(plain[0]))


@pytest.mark.parametrize(
    ("entry", "exit_", "text"),
    [
        (
            "mlp",
            "mlp.unused",
            "The Linear that was taken for the feed-forward of .* was not called, so the adapter",
        ),
        ("mlp.unused", "mlp", "LlamaMLP was left before Linear was entered, so these two are no feed-forward"),
    ],
)
def test_an_adapter_that_would_have_no_effect(entry: str, exit_: str, text: str) -> None:
    model, batch = make("llama")
    call = calls(model, batch)[0]
    call.layer.mlp.add_module("unused", nn.Linear(32, 32))
    ends = submodule(call.layer, entry), submodule(call.layer, exit_)
    adapter = Bottleneck(nn.Linear(32, 4), nn.Linear(4, 32), torch.relu, 0.0, call.layer)
    with pytest.raises(UnsupportedModelError, match=text), beside(*ends, adapter):
        call.whole()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in call.layer.modules())


@pytest.mark.parametrize(
    ("exit_", "text"),
    [
        (
            "mlp.gate_proj",
            r"LlamaMLP to Linear, makes \(3, 8, 64\) of \(3, 8, 32\), but the hidden state has width 32\.",
        ),
        ("mlp.down_proj", r"Linear to Linear, makes \(3, 8, 32\) of \(3, 8, 64\), but the hidden state has width 32\."),
    ],
)
def test_a_feed_forward_of_another_width(exit_: str, text: str) -> None:
    model, batch = make("llama")
    call = calls(model, batch)[0]
    last = submodule(call.layer, exit_)
    ends = (call.layer.mlp, last) if exit_ == "mlp.gate_proj" else (last, last)
    adapter = Bottleneck(nn.Linear(32, 4), nn.Linear(4, 32), torch.relu, 0.0, call.layer)
    with pytest.raises(UnsupportedModelError, match=text), beside(*ends, adapter):
        call.whole()


class Layer(nn.Module):
    """A layer of nobody's, with the children it is given."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def wide() -> nn.Linear:
    return nn.Linear(8, 32)


def narrow() -> nn.Linear:
    return nn.Linear(32, 8)


def block() -> nn.Sequential:
    return nn.Sequential(wide(), narrow())


@pytest.mark.parametrize(
    ("layer", "entry", "exit_"),
    [
        (Layer(attn=block(), mlp=block()), "mlp", "mlp"),
        (Layer(attn=block(), feed_forward=block()), "feed_forward", "feed_forward"),
        (Layer(block_sparse_moe=block()), "block_sparse_moe", "block_sparse_moe"),
        (Layer(fc1=wide(), fc2=narrow()), "fc1", "fc2"),
        (Layer(linear1=wide(), dropout=nn.Dropout(), linear2=narrow()), "linear1", "linear2"),
        (Layer(lin1=wide(), lin2=narrow()), "lin1", "lin2"),
        (Layer(ffn=wide(), ffn_output=narrow()), "ffn", "ffn_output"),
        (Layer(intermediate=block(), output=Layer(dense=narrow())), "intermediate", "output.dense"),
        (Layer(attn=Layer(mlp=block()), second=Layer(mlp=block())), "second.mlp", "second.mlp"),
        (Layer(layer=nn.ModuleList([Layer(q=wide()), Layer(wi=wide(), wo=narrow())])), "layer.-1.wi", "layer.1.wo"),
        (Layer(ff=nn.ModuleList([block()]), mlp=block()), "mlp", "mlp"),
        # Beside what mixes the tokens, where there is no feed-forward.
        (Layer(mixer=Layer(in_proj=wide(), out_proj=narrow()), norm=nn.Identity()), "mixer", "mixer"),
    ],
)
def test_usual_names(layer: Layer, entry: str, exit_: str) -> None:
    assert feed_forward_of(layer, "layers.0") == (submodule(layer, entry), submodule(layer, exit_))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Layer(gate=block(), norm=nn.Identity()), "of its children gate, norm, none can be told"),
        (Layer(mlp=block(), moe=block()), "of its children mlp, moe, several can be told"),
        (Layer(mlp=nn.ModuleList([block()])), "of its children mlp, none can be told"),
        (Layer(ffn=wide()), "of its children ffn, none can be told"),
        (Layer(), "of its children none, none can be told"),
    ],
)
def test_names_that_do_not_tell(layer: Layer, why: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        feed_forward_of(layer, "layers.0 of Model")
    text = str(caught.value)
    assert text.startswith("layers.0 of Model is a Layer, whose feed-forward is not known: ") and why in text
    assert 'Name it with feedforward_module, such as feedforward_module="mlp", or use make_reversible(' in text
    assert "Usual names are mlp, feed_forward, " in text and "pairs such as fc1 and fc2" in text


@pytest.mark.parametrize(
    ("chosen", "entry", "exit_"),
    [
        ("moe", "moe", "moe"),
        ("parts.0.mlp", "parts.0.mlp", "parts.0.mlp"),
        ("parts.-1", "parts.0", "parts.0"),
        ("up:down", "up", "down"),
    ],
)
def test_the_choice_wins(chosen: str, entry: str, exit_: str) -> None:
    layer = Layer(mlp=block(), moe=block(), up=wide(), down=narrow(), parts=nn.ModuleList([Layer(mlp=block())]))
    assert feed_forward_of(layer, "layers.0", chosen) == (submodule(layer, entry), submodule(layer, exit_))


def test_the_choice_wins_over_the_table() -> None:
    layer = AutoModel.from_config(tiny_config("bert")).encoder.layer[0]
    assert feed_forward_of(layer, "layer.0") == (layer.intermediate, layer.output.dense)
    assert feed_forward_of(layer, "layer.0", "attention.self") == (layer.attention.self, layer.attention.self)


@pytest.mark.parametrize("chosen", ["mlps", "mlp.9", "", "mlp:mlps", "experts.up", "parts.3"])
def test_a_choice_that_is_not_there(chosen: str) -> None:
    layer = Layer(mlp=block(), experts=block(), parts=nn.ModuleList([block()]))
    with pytest.raises(ConfigError) as caught:
        feed_forward_of(layer, "layers.0 of Model", chosen)
    assert str(caught.value) == (
        f"feedforward_module={chosen!r} names no module in layers.0 of Model, a Layer. Its children are mlp, experts, "
        'parts. Give one of them, a dotted path such as "output.dense", or the first and the last of a feed-forward '
        'in two modules, such as "fc1:fc2".'
    )


def test_a_choice_that_is_never_called() -> None:
    layer = Layer(parts=nn.ModuleList([block()]))
    with pytest.raises(ConfigError, match=r"='parts' names a list of modules, which is never called, in layers\.0,"):
        feed_forward_of(layer, "layers.0", "parts")


@pytest.mark.parametrize(
    ("model_type", "entry", "exit_"),
    [
        ("longformer", "intermediate", "output.dense"),
        ("prophetnet", "feed_forward", "feed_forward"),
        ("led", "fc1", "fc2"),
        ("gemma4_text", "mlp", "mlp"),
        ("longt5", "layer.-1.DenseReluDense", "layer.-1.DenseReluDense"),
        ("lfm2", "feed_forward", "feed_forward"),
        ("openai-gpt", "mlp", "mlp"),
    ],
)
def test_layers_of_transformers_without_a_row(model_type: str, entry: str, exit_: str) -> None:
    model = AutoModel.from_config(tiny_config(model_type))
    layer = next(child[0] for child in model.modules() if isinstance(child, nn.ModuleList) and len(child) == 3)
    assert architecture_of(layer) is None
    assert feed_forward_of(layer, "layer") == (submodule(layer, entry), submodule(layer, exit_))
