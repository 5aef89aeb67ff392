"""Which stacks a model has, which are taken, and which are refused before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    ResNetConfig,
    ResNetModel,
    RwkvConfig,
    RwkvModel,
    SwinConfig,
    SwinForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import meft
from meft.backbone.conversion import find_stacks
from meft.backbone.layers import ReversibleLayer
from meft.errors import ConfigError, MeftWarning, UnsupportedModelError
from support.peft_helpers import assert_close, llama, taken, unchanged
from support.stacks import Block, Stacked, hidden_state

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 8}


def clip() -> CLIPModel:
    text = CLIPTextConfig(vocab_size=40, max_position_embeddings=24, eos_token_id=2, **SIZES)
    vision = CLIPVisionConfig(**SIZES | IMAGE | {"hidden_size": 48})
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision, text = CLIPVisionConfig(**SIZES, **IMAGE), LlamaConfig(vocab_size=40, **SIZES)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=39)
    config.image_seq_length = 4
    return LlavaForConditionalGeneration(config)


def llava_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, 38, (2, 5), generator=generator)
    ids = torch.cat([torch.full((2, 4), 39), words], dim=1)
    return {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


def whisper(**options: Any) -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8}
    tokens = {"vocab_size": 40, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
    lengths = {"max_source_positions": 10, "max_target_positions": 12}
    config = WhisperConfig(**layers, **widths, **tokens, **lengths, **options)
    return WhisperForConditionalGeneration(config)


def reversible_stacks(model: nn.Module) -> list[str]:
    return [stack.name for stack in find_stacks(model) if isinstance(stack.layers[0], ReversibleLayer)]


@pytest.mark.parametrize(
    "make, names, widths",
    [
        (clip, ["text_model.encoder.layers", "vision_model.encoder.layers"], [32, 48]),
        (llava, ["model.vision_tower.vision_model.encoder.layers", "model.language_model.layers"], [32, 32]),
        (whisper, ["model.encoder.layers", "model.decoder.layers"], [32, 32]),
    ],
)
def test_every_stack_of_a_model_is_found_with_its_width(make: Any, names: list[str], widths: list[int]) -> None:
    found = find_stacks(make())
    assert [stack.hidden_size for stack in found] == widths
    assert [stack.name.replace("vision_tower.encoder", "vision_tower.vision_model.encoder") for stack in found] == names


def test_a_vision_tower_whose_configuration_names_another_width() -> None:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    text = {"vocab_size": 40, "num_key_value_heads": 2, **SIZES}
    config = Qwen2VLConfig(vision_config=vision, text_config=text)
    assert [stack.hidden_size for stack in find_stacks(Qwen2VLForConditionalGeneration(config))] == [16, 32]


@pytest.mark.parametrize("chosen", ["vision_tower", "model.vision_tower", "language_model", "language_model.layers"])
def test_a_tower_is_chosen_by_any_part_of_its_name(chosen: str) -> None:
    model = meft.make_reversible(llava(), stacks=[chosen])
    (name,) = reversible_stacks(model)
    assert chosen.split(".")[-1] in name or chosen.split(".")[0] in name
    adapted = get_peft_model(llava(), meft.MeftConfig(stacks=[chosen]))
    assert [name.removeprefix("base_model.model.") for name in reversible_stacks(adapted)] == [name]


def test_an_unknown_stack_is_an_error_that_names_the_stacks() -> None:
    with unchanged(model := llava()), pytest.raises(ConfigError, match=r"asks for 'audio'.*language_model\.layers"):
        meft.make_reversible(model, stacks=["audio"])
    with pytest.raises(ConfigError, match=r"stacks='vision_tower' is no list of names"):
        meft.make_reversible(llava(), stacks="vision_tower")
    with pytest.raises(ConfigError, match=r"stacks=\[\] is no list of names"):
        meft.make_reversible(llava(), stacks=[])


@pytest.mark.parametrize("chosen", [None, ["vision_tower"], ["language_model"]])
def test_two_towers_get_the_gradients_of_cached_ones(chosen: list[str] | None) -> None:
    """LLaVA reads the last hidden state but one of its vision tower: the top layer gets no gradient."""
    found = []
    for backward in ("reversible", "cached"):
        model = meft.make_reversible(llava().train(), stacks=chosen, backward=backward)
        model(**llava_batch()).loss.backward()
        found.append(taken(model))
    assert any("vision" in name for name in found[0])
    assert_close(*found, relative=1e-5)


def test_whisper_loses_layer_drop_until_it_is_restored() -> None:
    model = whisper(encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    with pytest.warns(MeftWarning, match=r"layerdrop=0.5 of WhisperEncoder, layerdrop=0.5 of WhisperDecoder.*set to 0"):
        meft.make_reversible(model.train())
    assert model.model.encoder.layerdrop == model.model.decoder.layerdrop == 0.0
    ids = torch.randint(4, 40, (2, 5))
    model(input_features=torch.randn(2, 8, 20), labels=ids).loss.backward()
    meft.restore(model)
    assert model.model.encoder.layerdrop == model.model.decoder.layerdrop == 0.5


def test_layer_drop_that_the_loop_reads_from_the_configuration_is_switched_off() -> None:
    config = Wav2Vec2Config(
        **SIZES, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, layerdrop=0.9
    )
    config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups = 4, 2
    model = Wav2Vec2Model(config)
    with pytest.warns(MeftWarning, match=r"layerdrop=0.9 of Wav2Vec2Config"):
        meft.make_reversible(model.train())
    assert config.layerdrop == 0.0
    model(torch.randn(1, 400)).last_hidden_state.sum().backward()
    assert config.layerdrop == 0.0 and meft.restore(model).config.layerdrop == 0.9


def mamba() -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2))


def jamba() -> JambaForCausalLM:
    sizes = {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 4}
    offsets = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    config = JambaConfig(
        vocab_size=40, mamba_d_state=4, num_experts=2, use_mamba_kernels=False, mamba_dt_rank=4, **sizes, **offsets
    )
    return JambaForCausalLM(config)


def rwkv() -> RwkvModel:
    return RwkvModel(RwkvConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2))


def swin() -> SwinForImageClassification:
    return SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
    )


def resnet() -> ResNetModel:
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))


@pytest.mark.parametrize("make", [mamba, jamba, rwkv])
@pytest.mark.parametrize("coupling", ["momentum", "meft1"])
def test_recurrent_layers_get_the_gradients_of_cached_ones(make: Any, coupling: str) -> None:
    found = []
    for backward in ("reversible", "cached"):
        torch.manual_seed(0)
        model = meft.make_reversible(make().train(), coupling, backward=backward)
        model(input_ids=torch.arange(3, 11).reshape(2, 4), use_cache=False)[0].square().sum().backward()
        found.append(taken(model))
    assert_close(*found, relative=1e-5)


def test_lists_within_stages_of_another_width_are_taken() -> None:
    assert [(stack.name, stack.hidden_size) for stack in find_stacks(swin())] == [
        ("swin.encoder.layers.0.blocks", 16),
        ("swin.encoder.layers.1.blocks", 32),
    ]


REFUSED = [
    (resnet, r"ResNetModel has no stack of layers: no ModuleList or Sequential of modules"),
]


@pytest.mark.parametrize("make, message", REFUSED)
@pytest.mark.parametrize("coupling", ["momentum", "meft1"])
def test_what_cannot_be_reversible_is_refused_before_anything_changes(make: Any, message: str, coupling: str) -> None:
    model = make()
    with unchanged(model), pytest.raises(UnsupportedModelError, match=message):
        meft.make_reversible(model, coupling)


@pytest.mark.parametrize("make, message", REFUSED)
def test_the_peft_method_refuses_the_same(make: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        get_peft_model(make(), meft.MeftConfig())


def test_a_layer_that_stands_in_a_list_twice() -> None:
    block = Block()
    model = meft.make_reversible(Stacked([block, block]).train(), "meft1")
    model(hidden_state()).sum().backward()
    found = taken(model)
    reference = meft.make_reversible(Stacked([block, block]).train(), "meft1", backward="cached")
    reference(hidden_state()).sum().backward()
    assert_close(found, taken(reference))
    shared = llama()
    shared.model.layers[1] = shared.model.layers[0]
    with pytest.raises(UnsupportedModelError, match=r"holds the same layer several times"):
        get_peft_model(shared, meft.MeftConfig())


def test_the_feed_forward_may_be_named() -> None:
    model = get_peft_model(llama(), meft.MeftConfig(feedforward_module="mlp", coupling="momentum"))
    assert model.peft_config["default"].feedforward_module == "mlp"
    with pytest.raises(ConfigError, match=r"feedforward_module='mlpp'"):
        get_peft_model(llama(), meft.MeftConfig(feedforward_module="mlpp"))
