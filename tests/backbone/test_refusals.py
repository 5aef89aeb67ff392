"""What `make_reversible`, `restore` and `MeftConfig` refuse: the text says what to do, and the model stays whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import meft
from meft.errors import ConfigError, UnsupportedModelError
from meft_lab.families.shrink import tiny_config
from support import models
from support.peft_helpers import (
    TASK_OF,
    batch_of,
    gradients,
    llama,
    neox,
    unchanged,
)


def base_of(family: str, **options: Any) -> PreTrainedModel:
    return models.build(family, TASK_OF[family], **{"layers": 3, **options})


def test_twice_is_refused() -> None:
    model = meft.make_reversible(base_of("bart"))
    with unchanged(model), pytest.raises(ConfigError) as caught:
        meft.make_reversible(model, "meft1", backward="cached")
    assert str(caught.value).startswith(
        "model.encoder.layers of BartEncoder is reversible already, with other options (coupling 'momentum', not "
        "'meft1'; lam None, not 0.1; beta None, not 1.0; output 'newest', not 'mean'; backward 'reversible', not "
        "'cached'; gamma 0.03125, not None). To change them call meft.restore(model) first"
    )
    with unchanged(model), pytest.raises(ConfigError, match="already, with the options of this call"):
        meft.make_reversible(model)
    adapted = get_peft_model(base_of("bert"), meft.MeftConfig(task_type="SEQ_CLS"))
    with unchanged(adapted), pytest.raises(ConfigError, match=r"has a MEFT adapter, .* model = model\.unload\(\)"):
        meft.make_reversible(adapted)


@pytest.mark.parametrize("changed", [{"gamma": 1 / 8}, {"sign": "random"}, {"granularity": "block"}, {"tile_size": 7}])
def test_twice_through_the_wrappers_of_peft(changed: dict[str, Any]) -> None:
    """Before and after LoRA was put in, on the wrapped model and on its base."""
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    for model in (
        get_peft_model(meft.make_reversible(base_of("bert")), lora),
        meft.make_reversible(get_peft_model(base_of("bert"), lora)),
    ):
        name, value = next(iter(changed.items()))
        for one in (model, model.get_base_model()):
            with unchanged(model), pytest.raises(ConfigError, match=rf"other options \({name} .*, not {value!r}\)"):
                meft.make_reversible(one, **changed)
        meft.make_reversible(meft.restore(model), **changed)


def test_what_is_no_model_is_refused() -> None:
    for call in (meft.make_reversible, meft.restore):
        for given, kind in ((None, "NoneType"), ("bert-base-uncased", "str")):
            with pytest.raises(ConfigError, match=rf"{call.__name__} was given a {kind} .*Valid is a torch.nn.Module"):
                call(given)


def test_two_couplings_active_at_once_are_refused() -> None:
    """However they were activated; and after one of them is, the model runs."""
    model, batch = get_peft_model(base_of("bert"), meft.MeftConfig(task_type="SEQ_CLS")), batch_of("bert")
    model.add_adapter("other", meft.MeftConfig(task_type="SEQ_CLS", coupling="momentum"))
    layers = [module for module in model.modules() if isinstance(module, meft.MeftLayer)]
    both = ["default", "other"]
    for activate in (model.base_model.set_adapter, layers[0].set_adapter):
        with unchanged(model), pytest.raises(ConfigError, match=r"adapters \['default', 'other'\] are active together"):
            activate(both)
    layers[1].set_adapter("other")
    with pytest.raises(ConfigError) as caught:
        model(**batch)
    assert str(caught.value).startswith(
        "The layers of bert.encoder.layer of BertModel do not follow one coupling: momentum in some, but another "
        "adapter (meft1) in layers [0, 2]."
    )
    for name in both:
        model.set_adapter(name)
        assert torch.isfinite(model(**batch).loss)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_two_couplings_added_by_transformers_itself() -> None:
    model = base_of("bert")
    for name, coupling in (("a", "meft1"), ("b", "momentum")):
        model.add_adapter(meft.MeftConfig(coupling=coupling), name)
    with pytest.raises(ConfigError, match=r"adapters \['a', 'b'\] are active together, .* model.set_adapter\('a'\)"):
        model.set_adapter(["a", "b"])
    model.set_adapter("b")
    assert torch.isfinite(model(**batch_of("bert")).loss)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_second_adapter_does_not_take_the_place_of_the_first() -> None:
    model = get_peft_model(base_of("bert"), meft.MeftConfig(task_type="SEQ_CLS"))
    for one in (model, model.get_base_model()):
        with pytest.raises(ConfigError, match=r"adapter 'default' already, of coupling='meft1'; another one of"):
            get_peft_model(one, meft.MeftConfig(task_type="SEQ_CLS", coupling="meft2"))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_one_method_under_another_is_refused() -> None:
    """LoRA and MEFT side by side in one PEFT model, and MEFT on a reversible backbone."""
    lora = get_peft_model(base_of("bert"), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with unchanged(lora), pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        lora.add_adapter("other", meft.MeftConfig(task_type="SEQ_CLS"))
    meft.make_reversible(lora)
    with pytest.raises(ConfigError, match=r"was made reversible by make_reversible\. Call meft\.restore\(model\)"):
        lora.get_base_model().add_adapter(meft.MeftConfig())


def test_layers_added_since_are_refused() -> None:
    replicated = LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3]])
    assert gradients(meft.make_reversible(get_peft_model(llama(), replicated)), batch_of("opt", "CAUSAL_LM"))
    model = get_peft_model(meft.make_reversible(llama()), replicated)
    with pytest.raises(UnsupportedModelError, match="restore the model and make it reversible again"):
        model(**batch_of("opt", "CAUSAL_LM"))


def test_nothing_to_restore_is_refused() -> None:
    adapted = get_peft_model(base_of("bert"), meft.MeftConfig(task_type="SEQ_CLS"))
    restored = meft.restore(meft.make_reversible(base_of("bert")))
    lora = get_peft_model(base_of("bert"), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    mixed = get_peft_model(base_of("bert"), LoraConfig(target_modules=["query"]), mixed=True)
    for model in (base_of("bert"), adapted, restored, lora, mixed, nn.Linear(2, 2)):
        with unchanged(model), pytest.raises(ConfigError) as caught:
            meft.restore(model)
        text = str(caught.value)
        assert text.startswith(type(model).__name__) and "nothing to restore" in text and "unload()" in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"coupling": "meft9"}, "coupling='meft9' is unknown. Valid: 'meft1', 'meft2', 'meft3', 'momentum'"),
        ({"coupling": "adapter"}, "coupling='adapter' is unknown"),
        ({"gamma": 0}, "gamma=0 cannot be used in exact arithmetic: it must be 1/m with m an integer from 1 to 256"),
        ({"gamma": 0, "arithmetic": "float"}, "gamma=0 cannot be inverted: the inverse divides by it"),
        ({"gamma": 0.3}, r"gamma=1/4 \(0.25\) and gamma=1/3 \(0.333333\)|gamma=1/3 \(0.333333\) and gamma=1/4"),
        ({"coupling": "meft1", "lam": 0}, "lam=0 cannot be used in exact arithmetic"),
        ({"coupling": "meft2", "beta": 0.0, "arithmetic": "float"}, "beta=0.0 cannot be inverted"),
        ({"coupling": "meft1", "lam": -0.5}, "lam=-0.5 cannot be used in exact arithmetic"),
        ({"coupling": "meft1", "lam": float("nan"), "arithmetic": "float"}, "lam=nan is out of range"),
        ({"lam": 0.5}, "lam=0.5 was given, but coupling='momentum' has no lam. Its factors are gamma"),
        ({"coupling": "meft1", "gamma": 0.5}, "coupling='meft1' has no gamma. Its factors are lam and beta"),
        ({"output": "oldest"}, "output='oldest' is no output rule"),
        ({"output": ("sum", "x")}, "is no output rule"),
        ({"arithmetic": "double"}, "arithmetic='double' is unknown. Valid: 'exact', 'float'"),
        ({"backward": "both"}, "backward='both' is unknown. Valid: 'reversible', 'cached'"),
        ({"fraction_bits": 25}, "fraction_bits=25 is out of range. Valid: an integer, 4 to 24 or 'auto'"),
        ({"fraction_bits": 16.0}, "fraction_bits=16.0 is a float"),
        ({"frozen_layers": -1}, "frozen_layers=-1 is out of range"),
        ({"frozen_layers": 3}, "frozen_layers=3 leaves nothing to train: .*encoder.layer of BertModel has 3 layers"),
        ({"frozen_layers": 1, "cached_layers": 3}, "Their sum must be at most 3: use at most cached_layers=2"),
        ({"cached_layers": True}, "cached_layers=True is a bool"),
        ({"drift_tolerance": -1}, "drift_tolerance=-1 is no relative error"),
        ({"anchor_every": 0}, "anchor_every=0 is out of range"),
    ],
    ids=str,
)
def test_options_that_are_not_valid(options: dict[str, Any], text: str) -> None:
    """Refused before anything changes, by `make_reversible` and `MeftConfig` alike."""
    model = base_of("bert")
    with unchanged(model), pytest.raises(ConfigError, match=text):
        meft.make_reversible(model, **options)
    with unchanged(model), pytest.raises(ConfigError):
        if options.get("coupling") == "adapter":
            options = {"coupling": "adapter", "lam": 0.1}
        get_peft_model(model, meft.MeftConfig(task_type="SEQ_CLS", **{"coupling": "momentum", **options}))


def doge() -> PreTrainedModel:
    """A model whose layers do not split as the others do: both residuals have weights of their own."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config("doge"))


@pytest.mark.parametrize(
    ("build", "layer", "why"),
    [
        (doge, "DogeDecoderLayer", "it is not known. The known layers are those of albert, bart, bert, "),
        (neox, "GPTNeoXLayer", "its attention and its feed-forward read the same input"),
    ],
)
def test_meft3_on_layers_that_do_not_split(build: Callable[[], PreTrainedModel], layer: str, why: str) -> None:
    model = build()
    for convert in (
        lambda: meft.make_reversible(model, "meft3"),
        lambda: get_peft_model(model, meft.MeftConfig(task_type="CAUSAL_LM", coupling="meft3")),
    ):
        with unchanged(model), pytest.raises(UnsupportedModelError) as caught:
            convert()
        text = str(caught.value)
        assert layer in text and "layers.0 of" in text and type(model).__name__.removesuffix("ForCausalLM") in text
        assert why in text and 'coupling="meft1", "meft2" or "momentum"' in text
    assert gradients(get_peft_model(model, meft.MeftConfig(task_type="CAUSAL_LM", coupling="meft1")), batch_of("opt"))


def _prehook(layer: nn.Module) -> Any:
    return layer.register_forward_pre_hook(lambda module, args: None)


def _backward_hook(layer: nn.Module) -> Any:
    return layer.register_full_backward_hook(lambda module, grad_input, grad_output: None)


@pytest.mark.parametrize("hook", [_prehook, _backward_hook])
def test_hooks_that_would_not_run(hook: Callable[[nn.Module], Any]) -> None:
    model = base_of("bert")
    handle = hook(model.bert.encoder.layer[1])
    for convert in (
        lambda: meft.make_reversible(model),
        lambda: get_peft_model(model, meft.MeftConfig(task_type="SEQ_CLS")),
    ):
        with (
            unchanged(model),
            pytest.raises(UnsupportedModelError, match=r"encoder.layer.1 of BertModel has forward-pre"),
        ):
            convert()
    handle.remove()
    meft.make_reversible(model)


def _copied(hidden: Tensor) -> Tensor:
    return hidden.clone()


def _scaled(hidden: Tensor) -> Tensor:
    return 2 * hidden


def _scaled_in_place(hidden: Tensor) -> Tensor:
    return hidden.mul_(2)


def _detached(hidden: Tensor) -> Tensor:
    return hidden.detach()


@pytest.mark.parametrize("through", ["hook", "loop"])
def test_a_tensor_detached_between_two_layers(through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = meft.make_reversible(base_of("bert")).train()
    layers = model.bert.encoder.layer
    if through == "hook":
        handle = layers[1].register_forward_hook(lambda module, args, output: output.detach())
    else:
        called = layers[2].forward

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return called(hidden.detach(), *args, **kwargs)

        monkeypatch.setattr(layers[2], "forward", forward)
    with pytest.raises(UnsupportedModelError) as caught:
        model(**batch_of("bert"))
    text = str(caught.value)
    assert "calls bert.encoder.layer.2 with a tensor that does not come from what bert.encoder.layer.1 returned" in text
    assert "Remove the hook or code between these layers" in text
    if through == "hook":
        handle.remove()
    else:
        monkeypatch.undo()
    assert gradients(model.train(), batch_of("bert"))


@pytest.mark.parametrize("order", [[0, 2], [1], [0, 1, 1, 2], [2, 1, 0], [0, 1, 2, 2]], ids=str)
def test_layers_skipped_or_repeated(order: list[int]) -> None:
    model = meft.make_reversible(base_of("bert"))
    encoder = model.bert.encoder
    layers = list(encoder.layer)
    encoder.layer = nn.ModuleList([layers[index] for index in order])
    with pytest.raises(UnsupportedModelError, match=r"BertModel called bert.encoder.layer.\d after .* once, in order"):
        model(**batch_of("bert"))
    encoder.layer = nn.ModuleList(layers)
    assert gradients(model, batch_of("bert"))


def test_a_hidden_state_without_gradients_is_refused() -> None:
    model = meft.make_reversible(base_of("bert"))
    with pytest.raises(UnsupportedModelError, match=r"has dtype torch.int32. .* Load the model in one of these"):
        model.bert.encoder.layer[0](torch.ones(1, 2, 32, dtype=torch.int32))
