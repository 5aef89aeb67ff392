"""What users do to a layer that a wrapper stands in for: attributes, `forward`, other names, pickling, saving."""

from __future__ import annotations

import copy
import io
import json
import pickle
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, Wav2Vec2Config, Wav2Vec2Model

import meft
from meft.backbone.discovery import find_stacks
from meft.backbone.layers import ReversibleLayer
from meft.errors import ConfigError, MeftWarning, ReconstructionError, UnsupportedModelError
from meft.loss import FusedLinear
from support import models
from support.peft_helpers import (
    COUPLINGS,
    TASK_OF,
    adapted,
    assert_close,
    assert_equal,
    batch_of,
    gradients,
    llama,
    outputs,
    unchanged,
)

WORDS = {"input_ids": torch.tensor([[4, 5, 6, 7, 8], [9, 3, 5, 7, 6]]), "labels": torch.tensor([[4, 5, 6, 7, 8]] * 2)}
KINDS = ("full", "meft")


def converted(kind: str, family: str = "opt", **options: Any) -> nn.Module:
    if kind == "meft":
        return adapted(family, **options)
    return meft.make_reversible(models.build(family, TASK_OF[family], layers=3, **options))


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, ReversibleLayer)]


def given_back(kind: str, model: Any) -> Any:
    return model.unload() if kind == "meft" else meft.restore(model)


# --- Attributes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_reach_the_layer(kind: str) -> None:
    model, batch = converted(kind, dropout=0.5), batch_of("opt")
    assert not torch.equal(outputs(model, batch, seed=1), outputs(model, batch, seed=2))
    for module in model.modules():
        for name in ("dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert all(layer.dropout == layer.pretrained.dropout == 0.0 for layer in layers_of(model))
    assert torch.equal(outputs(model, batch, seed=1), outputs(model, batch, seed=2))
    pretrained = [layer.pretrained for layer in layers_of(model)]
    given_back(kind, model)
    assert all(layer.dropout == 0.0 for layer in pretrained)


@pytest.mark.parametrize("kind", KINDS)
def test_new_and_deleted_attributes_and_modules(kind: str) -> None:
    model = converted(kind)
    layer = layers_of(model)[0]
    layer.mark = "new"
    assert layer.pretrained.mark == layer.mark == "new"
    del layer.mark
    with pytest.raises(AttributeError, match="mark"):
        _ = layer.mark
    assert not hasattr(layer.pretrained, "mark")
    attention = copy.deepcopy(layer.self_attn)
    layer.self_attn = attention
    assert layer.pretrained.self_attn is attention and layer.self_attn is attention
    del layer.fc1
    assert not hasattr(layer.pretrained, "fc1")
    layer.fc1 = nn.Linear(32, 64)
    assert layer.fc1 is layer.pretrained.fc1
    layer.training = False
    assert layer.pretrained.training is False


@pytest.mark.parametrize("which", ["one", "all"])
def test_a_forward_that_is_set_is_run_as_the_layers_own(which: str) -> None:
    """Also after `restore`; and it can be taken off."""
    model = meft.make_reversible(llama())
    expected, calls = gradients(model, WORDS), []

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return 2 * inner(self, *args, **kwargs)

    inner = type(layers_of(model)[0].pretrained).forward
    layers = layers_of(model)[: 1 if which == "one" else None]
    for layer in layers:
        layer.forward = types.MethodType(patched, layer)
    found = gradients(model, WORDS)
    assert len(calls) == 2 * len(layers)
    other = meft.make_reversible(llama(), backward="cached")
    for layer in layers_of(other)[: len(layers)]:
        layer.forward = types.MethodType(patched, layer)
    assert_close(found, gradients(other, WORDS), 1e-5)
    calls.clear()
    meft.restore(model)
    gradients(model, WORDS)
    assert len(calls) == len(layers)
    for layer in layers:
        del layer.forward
    meft.make_reversible(model)
    assert_equal(gradients(model, WORDS), expected)


def test_a_forward_that_goes_on_to_the_layer_it_was_set_on() -> None:
    """By a way that cannot be seen: the second call is the layer's own."""
    model = meft.make_reversible(llama())
    expected, layer = gradients(model, WORDS), layers_of(model)[1]
    found = {"layer": layer}

    def around(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return type(found["layer"]).forward(found["layer"], hidden, *args, **kwargs)

    def outer(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return type(found["layer"]).forward(found["layer"], hidden, *args, **kwargs)

    layer.forward = around
    layer.forward = outer
    assert_equal(gradients(model, WORDS), expected)
    del layer.forward, layer.forward
    assert "forward" not in vars(layer.pretrained)


# --- Other names ------------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """Holds a model, and a part of it once more."""

    def __init__(self, alias: str) -> None:
        super().__init__()
        self.model = llama()
        if alias == "layers":
            self.again = self.model.model.layers
        if alias == "backbone":
            self.again = self.model.model
        if alias == "adapted":
            self.again = get_peft_model(self.model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        if alias == "some layers":
            self.again = nn.ModuleList(self.model.model.layers[:2])
        if alias == "one layer":
            self.again = self.model.model.layers[0]

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)


@pytest.mark.parametrize("alias", ["layers", "backbone", "adapted"])
def test_a_stack_under_two_names_is_one(alias: str) -> None:
    holder = Holder(alias)
    before = list(holder.model.model.layers)
    (stack,) = find_stacks(holder)
    assert stack.name == "model.model.layers"
    meft.make_reversible(holder, stacks=["again"])
    assert all(type(layer.pretrained) is type(before[0]) for layer in holder.model.model.layers)
    assert gradients(holder, WORDS) and torch.isfinite(outputs(holder.eval(), WORDS)).all()
    meft.restore(holder)
    assert list(holder.model.model.layers) == before


@pytest.mark.parametrize("alias", ["some layers", "one layer"])
def test_layers_that_stand_in_two_places(alias: str) -> None:
    expected, holder = gradients(meft.make_reversible(llama()), WORDS), Holder(alias)
    before = list(holder.model.model.layers)
    meft.make_reversible(holder)
    found = gradients(holder, WORDS)
    assert len(found) == len(expected)
    assert_equal({name.removeprefix("model."): g for name, g in found.items() if name.startswith("model.")}, expected)
    meft.restore(holder)
    assert list(holder.model.model.layers) == before
    both = r"(model\.model\.layers\.0 as again|again\.0 as model\.model\.layers\.0)"
    with unchanged(holder), pytest.raises(UnsupportedModelError, match=rf"holds the layer {both}"):
        get_peft_model(holder, meft.MeftConfig())


# --- Below frozen layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", ["reversible", "cached"])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_what_lies_below_frozen_layers_trains(coupling: str, backward: str) -> None:
    """As where the lowest layers are frozen by hand; the reference is the plain model below, coupled above."""
    model = meft.make_reversible(llama(), coupling, frozen_layers=1, backward=backward)
    found = gradients(model, WORDS)
    assert "model.embed_tokens.weight" in found
    assert not any("layers.0." in name for name in found)
    weight = model.model.embed_tokens.weight
    row = found["model.embed_tokens.weight"][7]
    step, losses = 1e-2 * row / row.norm(), []
    for sign in (1, -1):
        with torch.no_grad():
            weight[7] += sign * step
        losses.append(model(**WORDS).loss.item())
        with torch.no_grad():
            weight[7] -= sign * step
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(row.norm().item(), rel=0.05)


def test_an_encoder_is_trained_through_frozen_decoder_layers() -> None:
    found = {}
    for frozen in (True, False):
        model = models.build("bart", "SEQ_2_SEQ_LM", layers=2)
        if frozen:
            meft.make_reversible(model, stacks=["decoder"], frozen_layers=1, backward="cached", gamma=1 / 64)
        # Nothing below the decoder's layers is trained, so that the encoder alone asks for gradients.
        for part in (model.model.shared, model.model.decoder.embed_positions, model.model.decoder.layernorm_embedding):
            part.requires_grad_(False)
        found[frozen] = gradients(model, batch_of("bart"))
    name = "model.encoder.layers.1.fc2.weight"
    cosine = nn.functional.cosine_similarity(found[True][name].flatten(), found[False][name].flatten(), dim=0)
    assert cosine > 0.99


def test_prompts_and_new_tokens_below_frozen_layers() -> None:
    prompts = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert list(gradients(meft.make_reversible(prompts, frozen_layers=2), WORDS))
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5], init_lora_weights=False)
    found = gradients(meft.make_reversible(get_peft_model(llama(), config), frozen_layers=2), WORDS)
    assert any("trainable_tokens" in name for name in found) and not any("layers.0." in name for name in found)


@pytest.mark.parametrize("below", [True, False])
def test_weights_of_frozen_layers_that_ask_for_gradients_are_named_once(below: bool) -> None:
    model = meft.make_reversible(llama(), frozen_layers=1)
    model.requires_grad_(True)
    model.model.embed_tokens.requires_grad_(below)
    with pytest.warns(
        MeftWarning, match=r"9 parameters of model\.layers .* frozen_layers=1 keeps as they are"
    ) as caught:
        found = gradients(model, WORDS)
        gradients(model, WORDS)
    assert len(caught) == 1
    assert not any("layers.0." in name for name in found)
    assert all(parameter.requires_grad for parameter in model.model.layers.parameters())


# --- Pickled and saved ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full", "meft", "restored"])
def test_whole_models_are_pickled(kind: str) -> None:
    model: Any = llama()
    if kind == "lora":
        model = meft.make_reversible(get_peft_model(model, LoraConfig(init_lora_weights=False)))
    elif kind == "meft":
        model = get_peft_model(model, meft.MeftConfig(task_type="CAUSAL_LM"))
    else:
        meft.make_reversible(model)
    if kind == "restored":
        meft.restore(model)
    model.train()
    expected = gradients(model, WORDS)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_equal(gradients(again, WORDS), expected)
        assert len(layers_of(again)) == (0 if kind == "restored" else 3)
        if kind in ("lora", "full"):
            # One layer still, not one in the wrapper and one in the model's registries.
            assert layers_of(again)[0]._parameters is layers_of(again)[0].pretrained._parameters
            assert not layers_of(meft.restore(again))
        recorded = again(**WORDS, output_hidden_states=kind != "meft")
        assert kind == "meft" or len(recorded.hidden_states) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_output_embedding_takes_its_loss_in_tiles_too(kind: str) -> None:
    model: Any = llama()
    if kind == "meft":
        model = get_peft_model(model, meft.MeftConfig(task_type="CAUSAL_LM")).train()
    else:
        meft.make_reversible(model)
    model.resize_token_embeddings(48)
    heads = [module for name, module in model.named_modules() if name.endswith("lm_head")]
    gradients(model, WORDS)
    assert [type(head) for head in heads] == [FusedLinear] and heads[0].out_features == 48
    given_back(kind, model)
    assert type(heads[0]) is nn.Linear
    plain = llama()
    plain.resize_token_embeddings(48)
    plain(**WORDS).loss.backward()
    assert type(plain.lm_head) is nn.Linear


@pytest.mark.filterwarnings("ignore:Layer drop:meft.errors.MeftWarning")
def test_a_model_saved_while_reversible_has_the_users_configuration(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    convolutions = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    config = Wav2Vec2Config(
        **sizes, **convolutions, layerdrop=0.1, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2
    )
    model = Wav2Vec2Model(config)
    meft.make_reversible(model)
    assert config.layerdrop == 0.0 and config.to_dict()["layerdrop"] == 0.1
    model.save_pretrained(tmp_path / "reversible")
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    # Not the model: its convolution of positions is parametrised, which PyTorch does not pickle.
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    meft.restore(model).save_pretrained(tmp_path / "restored")
    written = [json.loads((place / "config.json").read_text()) for place in sorted(tmp_path.iterdir())]
    assert len(written) == 3 and all(w == written[0] for w in written) and written[0]["layerdrop"] == 0.1
    assert "to_dict" not in vars(config) and config.layerdrop == 0.1


# --- Said in a warning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_is_passed_in_training_is_said_once(kind: str) -> None:
    model = converted(kind)
    batch = batch_of("opt")
    with pytest.warns(MeftWarning, match=r"past_key_values passed to OPTForCausalLM are set aside") as caught:
        for _ in range(2):
            cache = DynamicCache(config=model.config)
            model(**batch, past_key_values=cache).loss.backward()
    assert len(caught) == 1 and cache.get_seq_length() == 0
    with torch.no_grad():
        model(**batch, past_key_values=cache)
    assert cache.get_seq_length() > 0


# --- modules_to_save --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["self_attn_layer_norm"], r"names model\.decoder\.layers\.0\.self_attn_layer_norm of OPTForCausalLM.*further"),
        (["norm"], r"'norm' is the end of the names of MEFT's own modules .*Give more of the name"),
        (["layers.1"], r"'layers\.1' names model\.decoder\.layers\.1 of"),
        (["decoder"], r"'decoder' names model\.decoder of"),
    ],
)
def test_modules_to_save_that_adapters_cannot_leave_are_refused(names: list[str], text: str) -> None:
    base = models.build("opt", "CAUSAL_LM", layers=2)
    with unchanged(base), pytest.raises(ConfigError, match=text):
        get_peft_model(base, meft.MeftConfig(task_type="CAUSAL_LM", modules_to_save=names))
    get_peft_model(base, meft.MeftConfig(task_type="CAUSAL_LM"))


@pytest.mark.parametrize("order", ["lora first", "reversible first", "meft"])
def test_modules_to_save_inside_layers_train(order: str) -> None:
    def found(backward: str) -> dict[str, Tensor]:
        model: Any = llama()
        names = ["input_layernorm"] if order != "meft" else ["o_proj"]
        torch.manual_seed(2)
        if order == "meft":
            config: Any = meft.MeftConfig(task_type="CAUSAL_LM", modules_to_save=names, backward=backward)
            return gradients(get_peft_model(model, config).train(), WORDS)
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=names, init_lora_weights=False)
        if order == "lora first":
            return gradients(meft.make_reversible(get_peft_model(model, config), backward=backward), WORDS)
        return gradients(get_peft_model(meft.make_reversible(model, backward=backward), config).train(), WORDS)

    reversible = found("reversible")
    assert sum("modules_to_save" in name for name in reversible) == 3
    assert_close(reversible, found("cached"), 1e-5)


# --- Threads ----------------------------------------------------------------------------------------------------------


def test_threads_that_share_a_generator_get_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread draws while the other one's layer does."""
    model, batch = meft.make_reversible(models.build("bert", layers=2, dropout=0.1)), models.batch("bert")
    layer, dropout, drawn = layers_of(model)[0], nn.functional.dropout, []

    def disturbed(*args: Any, **kwargs: Any) -> Tensor:
        if len(drawn) == 3:
            thread = threading.Thread(target=torch.rand, args=(5,))
            thread.start()
            thread.join()
        drawn.append(1)
        return dropout(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "dropout", disturbed)
    assert layer.training
    loss = model(**batch).loss
    with pytest.raises(ReconstructionError, match="PyTorch has one for all threads of a process"):
        loss.backward()
