"""The registry of ways to train: what a name means, what options go with it, and what comes of it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import meft
from meft.backbone.discovery import find_stacks
from meft.backbone.layers import ReversibleLayer
from meft.engine.couplings import COUPLINGS
from meft.errors import ConfigError
from meft.methods.registry import AROUND, COMPARED, METHODS, WAYS, apply_method, count_parameters, own_options, read_way
from meft.methods.table import COUPLED_METHODS, PLAIN_METHODS
from support.models import build

ON_BACKBONE = [f"{method}+{coupling}" for method, coupling in product(PLAIN_METHODS, COUPLINGS)]


def coupling_of(model: torch.nn.Module) -> Any:
    layer = find_stacks(model)[0].layers[0]
    return layer.placement().reversible_stack.plan.coupling if isinstance(layer, ReversibleLayer) else None


@pytest.mark.parametrize("name", WAYS)
def test_every_way_makes_a_model_trainable_as_its_row_says(name: str) -> None:
    way = read_way(name)
    assert way.name == name
    model = way.apply(build("bert"), "SEQ_CLS")
    coupling = coupling_of(model)
    assert way.coupled == (coupling is not None)
    assert (way.under or way.method.coupling) == (None if coupling is None else coupling.name)
    assert isinstance(model, PeftModel) == (way.method.saves is not None)
    if isinstance(model, PeftModel):
        assert model.peft_config["default"].peft_type.value == way.method.saves
    plain = apply_method(build("bert"), way.method.name, task_type="SEQ_CLS")
    assert count_parameters(model) == count_parameters(plain)
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert checkpointed == (way.around == "checkpointing")


def test_what_can_be_compared_and_the_rows_are_ways() -> None:
    assert set(COMPARED) < set(WAYS) and len(set(WAYS)) == len(WAYS)
    assert set(ON_BACKBONE) < set(WAYS) and COUPLED_METHODS == COUPLINGS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora+", "method is 'lora\\+'; it must be one of full, lora, .*; full, lora, ia3, bitfit may stand on a rev"),
        ("lora+meft9", "method is 'lora\\+meft9'; it must be one of"),
        (
            "momentum+meft1",
            "method is 'momentum\\+meft1', but the adapters of meft are coupled by their own method",
        ),
        ("adapter+momentum", "but the adapters of meft are coupled by their own method. Give 'momentum' instead"),
        ("meft1+checkpointing", "full, lora, ia3, bitfit, adapter may be followed by \\+checkpointing or \\+offload"),
        ("lora+momentum+offload", "it must be one of"),
        ("", "method is ''; it must be one of"),
        (None, "method is None; it must be one of"),
    ],
)
def test_names_that_mean_nothing_are_refused(name: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_way(name)


def test_options_go_to_the_method_or_to_the_coupling_under_it() -> None:
    model = apply_method(
        build("bert"), "lora+momentum", task_type="SEQ_CLS", lora_rank=3, gamma=1 / 64, frozen_layers=1
    )
    assert model.peft_config["default"].r == 3
    plan = find_stacks(model)[0].layers[0].placement().reversible_stack.plan
    assert (plan.options()["gamma"], plan.frozen_layers) == (1 / 64, 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "lora",
            {"gamma": 0.25},
            r"method 'lora' has no such option; it belongs to momentum.*, or lora\+momentum\.",
        ),
        (
            "lora+momentum",
            {"lam": 0.1},
            r"lam is 0\.1, but method 'lora\+momentum' has no such option; it belongs to ",
        ),
        ("lora+meft1", {"gamma": 0.25}, r"method 'lora\+meft1' has no such .*, or lora\+momentum\."),
        ("lora+meft1", {"granularity": "block"}, r"method 'lora\+meft1' has no such option; it belongs to momentum"),
        (
            "lora+momentum",
            {"adapter_norm": True},
            r"'lora\+momentum' has no such option; it belongs to adapter,",
        ),
        ("lora+offload", {"gamma": 0.25}, r"method 'lora\+offload' has no such option"),
        (
            "full+momentum",
            {"modules_to_save": ["a"]},
            r"method 'full\+momentum' has no such option; it belongs to ",
        ),
        ("lora+momentum", {"gamma": 0.3}, r"gamma"),
        ("lora+momentum", {"gammas": 0.25}, r"Unknown option 'gammas'; the options of a method are bottleneck_dim"),
    ],
)
def test_what_means_nothing_to_a_way_is_refused_and_the_model_stays(
    name: str, options: dict[str, Any], message: str
) -> None:
    model = build("bert")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        apply_method(model, name, task_type="SEQ_CLS", **options)
    assert coupling_of(model) is None and type(model) is type(build("bert"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


def test_of_several_ways_each_takes_its_own_options() -> None:
    options = {"gamma": 1 / 64, "lora_rank": 3, "lam": 0.5}
    assert own_options("lora", options) == {"lora_rank": 3}
    assert own_options("lora+momentum", options) == {"lora_rank": 3, "gamma": 1 / 64}
    assert own_options("meft1", options) == {"lam": 0.5}


@pytest.mark.parametrize("name", [*ON_BACKBONE, *(f"lora+{around}" for around in AROUND)])
def test_what_is_saved_is_an_ordinary_adapter_or_model(name: str, tmp_path: Any) -> None:
    """Byte for byte what the method saves without anything under it, before a step."""
    files = []
    for each in (name, read_way(name).method.name):
        torch.manual_seed(0)
        model = apply_method(build("bert"), each, task_type="SEQ_CLS")
        model.save_pretrained(tmp_path / each)
        files.append(load_file(next((tmp_path / each).glob("*model.safetensors"))))
        configs = sorted(path.name for path in (tmp_path / each).glob("*.json"))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())
    assert configs == sorted(path.name for path in (tmp_path / name).glob("*.json"))


@pytest.mark.parametrize("name", WAYS)
def test_the_lines_of_python_do_what_the_way_does(name: str) -> None:
    code = read_way(name).code("SEQ_CLS")
    scope: dict[str, Any] = {"base": build("bert"), "meft": meft, "apply_method": apply_method}
    exec("from peft import IA3Config, LoraConfig, get_peft_model\nimport torch", scope)
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
    exec(code.replace("pin_memory=True", "pin_memory=False"), scope | {"batch": batch})


def test_methods_say_what_they_train() -> None:
    assert all(row.trains and row.name == name for name, row in METHODS.items())
