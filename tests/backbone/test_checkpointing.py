"""Activation checkpointing that others switch on: around a stack, on its layers, inside them, by flags."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

import meft
from meft.errors import MeftWarning, UnsupportedModelError
from support import models
from support.peft_helpers import (
    COUPLINGS,
    METHODS,
    adapted,
    assert_close,
    assert_equal,
    batch_of,
    gradients,
    llama,
    taken,
)

WORDS = {"input_ids": torch.tensor([[4, 5, 6, 7, 8], [9, 3, 5, 7, 6]]), "labels": torch.tensor([[4, 5, 6, 7, 8]] * 2)}


def lora(model: nn.Module, rate: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=rate, init_lora_weights=False)
    return get_peft_model(model, config).train()


def wrapped(model: nn.Module, kind: type[nn.Module], **options: Any) -> None:
    wrapper = partial(checkpoint_wrapper, **options)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, check_fn=lambda m: isinstance(m, kind))


# --- Around a stack ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "nested"])
@pytest.mark.parametrize("coupling", [*COUPLINGS, "block"])
def test_checkpointing_around_a_stack(coupling: str, way: str) -> None:
    """With dropout, and the same gradients as without; saved tensors are handed out once."""

    def found(way: str, backward: str) -> dict[str, Tensor]:
        model, batch = models.build("bert", "SEQ_CLS", layers=3, dropout=0.1), models.batch("bert", "SEQ_CLS")
        options = {"granularity": "block"} if coupling == "block" else {}
        meft.make_reversible(model, "momentum" if coupling == "block" else coupling, backward=backward, **options)
        torch.manual_seed(3)
        hidden = model.bert.embeddings(batch["input_ids"])

        def encode(hidden: Tensor) -> Tensor:
            return model.bert.encoder(hidden).last_hidden_state

        def inner(hidden: Tensor) -> Tensor:
            return checkpoint(encode, hidden, use_reentrant=False) * 1.0

        if way == "none":
            hidden = encode(hidden)
        elif way == "nested":
            hidden = checkpoint(inner, hidden, use_reentrant=False)
        else:
            hidden = checkpoint(encode, hidden, use_reentrant=way == "reentrant")
        nn.functional.cross_entropy(model.classifier(hidden[:, 0]), batch["labels"]).backward()
        return taken(model)

    assert_close(found(way, "reversible"), found("none", "cached"), 1e-5)


# --- On the layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("put", [checkpoint_wrapper, offload_wrapper])
@pytest.mark.parametrize("when", ["before", "after"])
def test_wrappers_around_reversible_layers_are_taken_off_with_one_warning(when: str, put: Callable) -> None:
    expected = gradients(meft.make_reversible(lora(llama(), 0.2)), WORDS)
    model = lora(llama(), 0.2)
    layers = model.base_model.model.model.layers

    def put_on() -> None:
        for index, layer in enumerate(layers):
            layers[index] = put(layer)

    if when == "before":
        put_on()
        before = list(layers)
        with pytest.warns(MeftWarning, match=r"layers\.0 of LlamaModel and 2 more was taken off") as caught:
            meft.make_reversible(model)
        found = gradients(model, WORDS)
        meft.restore(model)
        assert list(layers) == before
    else:
        meft.make_reversible(model)
        before = list(layers)
        put_on()
        with pytest.warns(MeftWarning, match=r"Wrapper around .*layers\.0 of LlamaModel and 2 more") as caught:
            found = gradients(model, WORDS)
        assert_equal(gradients(model, WORDS), found)
        assert list(layers) == before
    assert len(caught) == 1
    assert_equal(found, expected)


@pytest.mark.parametrize("coupling", METHODS)
def test_wrappers_around_layers_with_adapters(coupling: str) -> None:
    """Those of layers that are not reversible stay, and have their effect."""

    def model() -> nn.Module:
        torch.manual_seed(1)
        return get_peft_model(llama(), meft.MeftConfig(task_type="CAUSAL_LM", coupling=coupling)).train()

    expected, wrapping = gradients(model(), WORDS), model()
    wrapped(wrapping, meft.MeftLayer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = gradients(wrapping, WORDS)
    kept = any(isinstance(module, CheckpointWrapper) for module in wrapping.modules())
    assert (len(caught), kept) == ((0, True) if coupling == "adapter" else (1, False))
    assert_equal({name.replace("_checkpoint_wrapped_module.", ""): g for name, g in found.items()}, expected)


@pytest.mark.parametrize("coupling", METHODS)
def test_adapters_on_layers_that_were_wrapped_before(coupling: str) -> None:
    base = llama()
    wrapped(base, LlamaDecoderLayer)
    config = meft.MeftConfig(task_type="CAUSAL_LM", coupling=coupling)
    if coupling == "adapter":
        with pytest.raises(UnsupportedModelError, match=r"layers\.0 of LlamaModel is inside a CheckpointWrapper"):
            get_peft_model(base, config)
        assert not any(isinstance(module, meft.MeftLayer) for module in base.modules())
        return
    with pytest.warns(MeftWarning, match="CheckpointWrapper around .* was taken off"):
        model = get_peft_model(base, config)
    assert gradients(model.train(), WORDS)


def test_a_wrapped_layer_that_is_called_past_its_model_is_refused_by_name() -> None:
    model = meft.make_reversible(models.build("bert", "SEQ_CLS", layers=3))
    layers, hidden = model.bert.encoder.layer, torch.randn(2, 4, 32, requires_grad=True)
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    with pytest.raises(UnsupportedModelError, match=r"bert\.encoder\.layer\.0 .*CheckpointWrapper was put around it"):
        model.bert.encoder(hidden)


# --- Inside the layers ------------------------------------------------------------------------------------------------


def test_checkpointing_inside_layers() -> None:
    expected, model = gradients(meft.make_reversible(lora(llama(), 0.2)), WORDS), lora(llama(), 0.2)
    wrapped(model, LlamaMLP)
    found = gradients(meft.make_reversible(model), WORDS)
    assert_equal({name.replace("_checkpoint_wrapped_module.", ""): g for name, g in found.items()}, expected)


def test_reentrant_checkpointing_inside_layers_is_refused_by_name() -> None:
    """It differentiates by `.backward()` alone."""
    model = lora(llama())
    wrapped(model, LlamaMLP, checkpoint_impl=CheckpointImpl.REENTRANT)
    loss = meft.make_reversible(model)(**WORDS).loss
    with pytest.raises(UnsupportedModelError, match=r"runs under reentrant activation checkpointing .*use_reentrant=F"):
        loss.backward()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_that_checkpoints_itself_is_refused_by_name(when: str) -> None:
    """FairScale's wrapper puts such a function in the place of a layer's `forward`."""
    model = llama()
    layers = model.model.layers

    def put_on() -> None:
        for layer in layers:
            layer.forward = partial(_checkpointed_forward, type(layer).forward, layer)

    if when == "before":
        put_on()
    meft.make_reversible(model)
    if when == "after":
        put_on()
    loss = model(**WORDS).loss
    with pytest.raises(UnsupportedModelError, match="reentrant activation checkpointing"):
        loss.backward()


def _checkpointed_forward(forward: Callable[..., Any], module: nn.Module, hidden: Tensor, **kwargs: Any) -> Any:
    return checkpoint(partial(forward, module, **kwargs), hidden, use_reentrant=True)


# --- By Transformers' flags -------------------------------------------------------------------------------------------


def t5(method: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.1}
    model = T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, **sizes)).train()
    if method == "lora":
        return meft.make_reversible(get_peft_model(model, LoraConfig(init_lora_weights=False)))
    if method == "full":
        return meft.make_reversible(model)
    return get_peft_model(model, meft.MeftConfig(coupling=method)).train()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["full", "lora", *METHODS])
def test_t5_under_gradient_checkpointing(method: str, reentrant: bool) -> None:
    """Its attention makes a leaf of its position bias under its flag, and its layers hand tensors to each other."""
    expected, model = gradients(t5(method), WORDS), t5(method)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_close(gradients(model, WORDS), expected, 1e-5)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_is_on_again_in_a_restored_model(when: str) -> None:
    model = models.build("bert", "SEQ_CLS", layers=3)
    if when == "before":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    meft.make_reversible(model)
    if when == "after":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    gradients(model, models.batch("bert", "SEQ_CLS"))
    assert not any(layer.pretrained.gradient_checkpointing for layer in model.bert.encoder.layer)
    meft.restore(model)
    assert all(layer.gradient_checkpointing for layer in model.bert.encoder.layer)
    calls = []
    for layer in model.bert.encoder.layer:
        layer.attention.register_forward_hook(lambda *given: calls.append(1))
    gradients(model, models.batch("bert", "SEQ_CLS"))
    assert len(calls) == 6


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_every_tensor_that_a_checkpointed_layer_with_adapters_reads_gets_its_gradient(reentrant: bool) -> None:
    """BART's decoder reads the encoder, whose adapters are trained through it."""
    expected, model = gradients(adapted("bart", "adapter"), batch_of("bart")), adapted("bart", "adapter")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_close(gradients(model, batch_of("bart")), expected, 1e-5)
