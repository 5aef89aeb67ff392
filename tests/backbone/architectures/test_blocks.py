"""The two blocks of every known layer, one after the other, compute what the layer computes, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import EncoderDecoderModel, PreTrainedModel

from meft_lab.families.shrink import tiny_config
from support.known_layouts import NAMES, expected, make
from support.layer_calls import Call, assert_same_bits, calls, cast


def compare(found: list[Call]) -> None:
    for call in found:
        with torch.no_grad():
            assert_same_bits(call.blocks(), call.whole())


@pytest.mark.parametrize("name", NAMES)
def test_blocks_compute_what_the_layer_computes(name: str) -> None:
    """In training, dropout included, in float32 and bfloat16; in float32 without dropout as well."""
    model, batch = make(name)
    for training, dtype in ((True, torch.float32), (False, torch.float32), (True, torch.bfloat16)):
        model.train(training).to(dtype)
        found = calls(model, cast(batch, dtype))
        assert {type(call.layer).__name__ for call in found} == expected(name)
        compare(found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gpt_bigcode", "gpt_neo", "bloom", "mpt", "opt", "bert"])
def test_one_more_word_with_a_cache(name: str) -> None:
    """The keys and values that the blocks append are compared too."""
    model, batch = make(name)
    model.eval()
    if name == "bert":
        model = as_decoder("bert").eval()
    ids = batch["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    found = calls(model, {"input_ids": ids[:, -1:], "past_key_values": cache, "use_cache": True})
    assert found and all(call.hidden.shape[1] == 1 and call.whole()[1] for call in found)
    compare(found)


@pytest.mark.parametrize("name", ["bart", "mbart", "t5", "umt5"])
def test_one_more_word_with_both_caches(name: str) -> None:
    model, batch = make(name)
    model.eval()
    words = {"decoder_input_ids": torch.tensor([[5, 6, 7]] * len(batch["input_ids"])), "use_cache": True}
    with torch.no_grad():
        out = model(input_ids=batch["input_ids"], **words)
    words = {"decoder_input_ids": words["decoder_input_ids"][:, -1:], "past_key_values": out.past_key_values}
    found = calls(model, {"encoder_outputs": (out.encoder_last_hidden_state,), **words})
    assert found and all(call.hidden.shape[1] == 1 and len(call.whole()[1]) > 2 for call in found)
    compare(found)


def as_decoder(model_type: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, {"is_decoder": True}))


@pytest.mark.parametrize("decoder", ["bert", "gpt2", "xlm-roberta-xl", "rembert"])
def test_cross_attention(decoder: str) -> None:
    """Decoders that read the states of an encoder of another family."""
    torch.manual_seed(0)
    config = tiny_config(decoder, {"is_decoder": True, "add_cross_attention": True})
    encoder = make("distilbert")[0].base_model
    model = EncoderDecoderModel(encoder=encoder, decoder=type(as_decoder(decoder))(config)).train()
    ids = torch.randint(24, 40, (2, 6))
    found = [
        call
        for call in calls(model, {"input_ids": ids, "decoder_input_ids": ids[:, :4], "use_cache": False})
        if hasattr(call.layer, "crossattention")
    ]
    assert len(found) == 2 and all(
        isinstance(call.kwargs.get("encoder_hidden_states", call.args[2:3]), Tensor | tuple) for call in found
    )
    compare(found)


@pytest.mark.parametrize("name", ["bart", "mbart", "t5", "umt5"])
def test_float16_activations_that_overflow_are_clamped_alike(name: str) -> None:
    model, batch = make(name)
    call = calls(model.half().eval(), batch)[0]
    with torch.no_grad():
        if name == "bart":  # its last norm would leave nothing to clamp
            call.layer.final_layer_norm.weight[0] = 6e4
        else:
            last = call.layer.layer[-1].DenseReluDense.wo if name.endswith("t5") else call.layer.fc2
            last.weight[0], last.weight[1] = 6e4, -6e4
    compare([call])
    output = call.whole()[0]
    largest = (output[0] if isinstance(output, tuple) else output).abs().max()
    assert largest == torch.finfo(torch.float16).max - 1000


def test_a_comparison_that_must_fail() -> None:
    """Other random numbers, or a missing residual, show."""
    model, batch = make("llama")
    call = calls(model, batch)[0]
    for broken in (call.whole(seed=1), (call.whole()[0] - call.hidden, call.whole()[1])):
        with pytest.raises(AssertionError):
            assert_same_bits(broken, call.whole(seed=0))
    with pytest.raises(AssertionError):
        assert_same_bits(replace(call, kwargs={**call.kwargs, "attention_mask": None}).blocks(), call.whole())
