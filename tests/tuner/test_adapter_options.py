"""Options of the adapters themselves: dropout that tools find, its place, initial weights, a norm before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from trl.trainer.utils import disable_dropout_in_model

import meft
from meft.backbone.adapters import Bottleneck, beside
from meft.backbone.architectures import feed_forward_of
from meft.errors import ConfigError, UnsupportedModelError
from support import models
from support.peft_helpers import METHODS, TASK_OF, adapted, assert_equal, batch_of, enlarge, gradients, outputs


@pytest.mark.parametrize("coupling", METHODS)
@pytest.mark.parametrize("family", ["bert", "opt"])
def test_tools_that_switch_dropout_off_find_that_of_the_adapters(family: str, coupling: str) -> None:
    model, batch = adapted(family, coupling), batch_of(family)
    model.add_adapter("other", meft.MeftConfig(task_type=TASK_OF[family], coupling=coupling, adapter_dropout=0.5))
    enlarge(model, "other")
    model.set_adapter("other")
    model.train()
    assert not torch.equal(outputs(model, batch, seed=1), outputs(model, batch, seed=2))
    disable_dropout_in_model(model)
    assert torch.equal(outputs(model, batch, seed=1), outputs(model, batch, seed=2))


def test_dropout_is_the_models_unless_it_is_given() -> None:
    for given, expected in ((None, 0.3), (0.0, 0.0), (0.7, 0.7)):
        model = adapted("bert", dropout=0.3, adapter_dropout=given)
        layers = [module for module in model.modules() if isinstance(module, meft.MeftLayer)]
        drops = [
            drop for layer in layers for drop in (layer.meft_f_dropout["default"], layer.meft_g_dropout["default"])
        ]
        assert [drop.p for drop in drops] == [expected] * 6
        assert all(drop.training for drop in drops)
        model.eval()
        assert not any(drop.training for drop in drops)


def test_saved_adapters_keep_their_keys_and_load_without_the_new_options(tmp_path: Path) -> None:
    model, batch = adapted("bert", dropout=0.3), batch_of("bert")
    names = [name.partition("meft_")[2] for name in model.state_dict() if "meft_" in name]
    assert sorted(set(names)) == sorted(
        f"{f}_{part}.default.{kind}" for f in "fg" for part in ("down", "up") for kind in ("weight", "bias")
    )
    model.save_pretrained(tmp_path)
    settings = (tmp_path / "adapter_config.json").read_text()
    for name in ("adapter_dropout", "adapter_init_std", "adapter_norm"):
        assert f'"{name}"' in settings
        lines = [line for line in settings.splitlines() if f'"{name}"' not in line]
        settings = "\n".join(lines)
    (tmp_path / "adapter_config.json").write_text(settings)
    again = PeftModel.from_pretrained(models.build("bert", layers=3, dropout=0.3), str(tmp_path), is_trainable=True)
    assert torch.equal(outputs(again.eval(), batch), outputs(model.eval(), batch))
    assert_equal(gradients(again.train(), batch), gradients(model.train(), batch))


_NORMS = {
    "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
    "roberta": ("attention.output.LayerNorm", "output.LayerNorm"),
    "bart": ("self_attn_layer_norm", "final_layer_norm"),
    "opt_350m": ("self_attn_layer_norm", "final_layer_norm"),
}


@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_parallel_adapter_is_added_after_the_layers_dropout(family: str, alias: bool) -> None:
    """Where dropout leaves nothing of the blocks, the adapter remains. OPT's and BART's dropout is a function."""
    model = models.build(family, TASK_OF[family], layers=1, dropout=1.0)
    layer: Any = next(iter(models.stacks(model).values()))[0]
    adapter = Bottleneck(nn.Linear(32, 4), nn.Linear(4, 32), torch.tanh, 0.0, layer)
    hidden = torch.randn(2, 5, 32, requires_grad=True)
    entry, exit_ = feed_forward_of(layer, "layer")
    if alias:
        # Such a hook hands on an alias of the output.
        exit_.register_full_backward_hook(lambda *given: None)
    with beside(entry, exit_, adapter):
        found = layer(hidden, attention_mask=None)
    if family == "opt":
        expected = hidden + adapter(layer.final_layer_norm(hidden))
    else:
        first, last = (layer.get_submodule(name) for name in _NORMS[family])
        expected = last(first(hidden) + adapter(first(hidden)))
    torch.testing.assert_close(found, expected)
    layer.eval()
    with beside(entry, exit_, adapter):
        assert not torch.equal(layer(hidden, attention_mask=None), found)


def test_an_output_that_nothing_uses_leaves_the_adapter_without_effect_and_is_refused() -> None:
    layer = nn.Linear(8, 8)
    adapter = Bottleneck(nn.Linear(8, 2), nn.Linear(2, 8), torch.tanh, 0.0, layer)
    with pytest.raises(UnsupportedModelError, match="has no effect"), beside(layer, layer, adapter, "layer 3"):
        layer(torch.randn(2, 8))


@pytest.mark.parametrize("coupling", METHODS)
def test_a_norm_before_the_adapters(coupling: str, tmp_path: Path) -> None:
    model, batch = adapted("bert", coupling, adapter_norm=True), batch_of("bert")
    norms = [name for name, _ in model.named_parameters() if "_norm.default" in name and "meft_" in name]
    assert len(norms) == 3 * 2 * 2
    found = gradients(model, batch)
    assert all(found[name].abs().sum() > 0 for name in norms)
    if coupling != "adapter":
        other = adapted("bert", coupling, adapter_norm=True, backward="cached")
        assert_equal(gradients(other, batch), found)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(models.build("bert", layers=3), str(tmp_path), adapter_name="mine")
    assert torch.equal(outputs(again.eval(), batch), outputs(model.eval(), batch))


@pytest.mark.parametrize("std", [0.0, 0.02, 0.5])
def test_initial_weights(std: float) -> None:
    model = get_peft_model(models.build("bert", layers=3, hidden=64), meft.MeftConfig(adapter_init_std=std))
    for part, expected in (("_up.", std), ("_down.", std or 0.02)):  # or neither would ever get a gradient
        drawn = [p for name, p in model.named_parameters() if part in name and name.endswith("weight")]
        assert torch.cat([p.flatten() for p in drawn]).std().item() == pytest.approx(expected, rel=0.05)
    assert not any(p.any() for name, p in model.named_parameters() if "meft_" in name and name.endswith("bias"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"adapter_dropout": 1.0}, r"adapter_dropout=1\.0 is out of range. Valid: a probability from 0 up to"),
        (
            {"adapter_dropout": "no"},
            r"adapter_dropout='no' is a str\. Valid: a probability from 0 up to, but not, 1 or None",
        ),
        ({"adapter_init_std": -1.0}, r"adapter_init_std=-1\.0 is out of range. Valid: a number from 0 up"),
        ({"adapter_init_std": float("nan")}, r"adapter_init_std=nan is out of range"),
        ({"adapter_norm": "in"}, r"adapter_norm='in' is a str\. Valid: True or False"),
    ],
)
def test_options_that_are_not_valid(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        meft.MeftConfig(**options)
