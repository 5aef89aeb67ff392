from __future__ import annotations

import peft
import pytest
import torch

import meft
from meft.errors import ConfigError, UnsupportedModelError
from meft.methods.registry import METHODS, apply_method, count_parameters, read_way
from support.models import batch, build

HIDDEN, LAYERS, LABELS = 16, 3, 3


def small(family: str = "bert") -> torch.nn.Module:
    return build(family, "SEQ_CLS", layers=LAYERS, hidden=HIDDEN, heads=2)


@pytest.mark.parametrize("family", ["bert", "opt", "bart"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_every_family(method: str, family: str) -> None:
    model = apply_method(small(family), method, task_type="SEQ_CLS", bottleneck_dim=4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(**batch(family, "SEQ_CLS")).loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def head() -> int:
    return HIDDEN * LABELS + LABELS


def test_trainable_parameters_by_hand() -> None:
    def trainable(method: str, **options: object) -> int:
        return count_parameters(apply_method(small(), method, task_type="SEQ_CLS", **options))[0]

    adapter = (HIDDEN * 4 + 4) + (4 * HIDDEN + HIDDEN)  # down and up, weights and biases
    square, wide = 4 * 2 * (HIDDEN + HIDDEN), 2 * 2 * (HIDDEN + 2 * HIDDEN)  # q, k, v, output; the feed-forward's two
    assert trainable("lora", lora_rank=2) == LAYERS * (square + wide) + head()
    assert trainable("adapter", bottleneck_dim=4) == LAYERS * 2 * adapter + head()
    assert trainable("meft1", bottleneck_dim=4) == LAYERS * 2 * adapter + head()
    assert trainable("momentum", bottleneck_dim=4) == LAYERS * 2 * adapter + head()
    assert trainable("meft1", bottleneck_dim=4, frozen_layers=1) == (LAYERS - 1) * 2 * adapter + head()


def test_full_trains_everything_and_adds_nothing() -> None:
    model = small().requires_grad_(False)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(apply_method(model, "full", task_type="SEQ_CLS")) == (total, total)


def test_lora_reaches_the_transformer_layers_only() -> None:
    model = apply_method(small("bart"), "lora", task_type="SEQ_CLS")
    reached = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(reached) == LAYERS * 6 + LAYERS * 10  # the decoder has cross-attention as well
    assert all(".layers." in name for name in reached)


def test_lora_pattern_is_the_same_every_time() -> None:
    patterns = {
        apply_method(small(), "lora", task_type="SEQ_CLS").peft_config["default"].target_modules for _ in range(2)
    }
    assert len(patterns) == 1 and isinstance(patterns.pop(), str)


def test_options_reach_the_configuration() -> None:
    model = apply_method(
        small(), "meft2", task_type="SEQ_CLS", bottleneck_dim=5, beta=0.25, output=("sum", 0.1), backward="cached"
    )
    config = model.peft_config["default"]
    assert isinstance(config, meft.MeftConfig)
    assert (config.coupling, config.bottleneck_dim, config.beta) == ("meft2", 5, 0.25)
    assert (config.output, config.backward, config.arithmetic) == (("sum", 0.1), "cached", "exact")
    options = {"granularity": "block", "tile_size": 7, "stacks": ("bert",), "feedforward_module": "intermediate"}
    config = apply_method(small(), "momentum", task_type="SEQ_CLS", **options).peft_config["default"]
    assert (config.granularity, config.tile_size, config.stacks) == ("block", 7, ["bert"])
    assert config.feedforward_module == "intermediate"
    lora = apply_method(small(), "lora", task_type="SEQ_CLS", lora_rank=3, lora_alpha=7, lora_dropout=0.5)
    assert isinstance(lora.peft_config["default"], peft.LoraConfig)
    config = lora.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 7, 0.5)


def test_modules_to_save_are_trained_beside_the_head() -> None:
    model = apply_method(small(), "meft1", task_type="SEQ_CLS", modules_to_save=("bert.pooler.dense",))
    saved = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "meft_" not in name}
    assert {name.split(".modules_to_save")[0].removeprefix("base_model.model.") for name in saved} == {
        "bert.pooler.dense",
        "classifier",
    }


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "meft4",
            {},
            "method is 'meft4'; it must be one of full, lora, ia3, bitfit, adapter, meft1, meft2, meft3, momentum; "
            "full, lora, ia3, bitfit may stand on a reversible backbone",
        ),
        ("ia3", {"frozen_layers": 1}, "frozen_layers is 1, but method 'ia3' has no such option; it belongs to adapter"),
        ("bitfit", {"arithmetic": "exact"}, "arithmetic is 'exact', but method 'bitfit' has no such option; it "),
        (
            "lora",
            {"gamma": 0.25},
            "gamma is 0.25, but method 'lora' has no such option; it belongs to momentum. Leave gamma out or choose "
            r"one of those methods, or lora\+momentum\.",
        ),
        ("full", {"frozen_layers": 2}, "frozen_layers is 2, but method 'full' has no such option; it belongs to "),
        ("momentum", {"lam": 0.1}, "lam is 0.1, but method 'momentum' has no such option; it belongs to meft1, "),
        (
            "full",
            {"modules_to_save": ("a",)},
            r"modules_to_save is \('a',\), but method 'full' has no such option; it belongs to lora, ia3, bitfit, ",
        ),
    ],
)
def test_what_a_method_lacks_is_refused(method: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_way(method, options)
    with pytest.raises(ConfigError, match=message):
        apply_method(small(), method, task_type="SEQ_CLS", **options)


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Unknown option 'rank'; the options of a method are bottleneck_dim, lora_r"):
        apply_method(small(), "lora", task_type="SEQ_CLS", rank=8)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Linear has no stack of layers"):
        apply_method(torch.nn.Linear(2, 2), "lora", task_type="SEQ_CLS")
