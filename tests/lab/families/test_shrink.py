"""Tiny configurations, the models made of them, and what these are called with."""

from __future__ import annotations

import pytest
import torch
import transformers

from meft.errors import ConfigError, UnsupportedModelError
from meft_lab.families import inputs
from meft_lab.families.catalogue import CATALOGUE
from meft_lab.families.family import Family
from meft_lab.families.heads import heads_of
from meft_lab.families.shrink import VOCABULARY, tiny_config


def test_sizes_follow_from_names() -> None:
    config = tiny_config("llama")
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 64, 3)
    assert (config.vocab_size, config.max_position_embeddings, config.num_attention_heads) == (40, 64, 4)
    assert (config.attention_dropout, config.hidden_act, config.rms_norm_eps) == (0.1, "silu", 1e-6)
    t5 = tiny_config("t5")
    assert (t5.d_model, t5.d_kv, t5.d_ff, t5.num_layers, t5.num_decoder_layers) == (32, 8, 64, 3, 3)


def test_configurations_inside_are_tiny_too() -> None:
    config = tiny_config("llava", {"text_config": {"hidden_size": 48}})
    assert (config.vision_config.hidden_size, config.vision_config.image_size, config.vision_config.patch_size) == (
        32,
        16,
        4,
    )
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (48, 3)


def test_special_tokens_are_words_of_the_vocabulary() -> None:
    """And no two that a model tells apart are the same."""
    config = tiny_config("qwen2_vl")
    special = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
    assert len(set(special)) == 4
    assert all(2 < token < VOCABULARY for token in special)
    gemma = tiny_config("gemma3_text").pad_token_id, tiny_config("gpt2").pad_token_id
    assert gemma == (0, 1)


def test_changes_win() -> None:
    assert tiny_config("falcon", {"parallel_attn": False}).parallel_attn is False
    assert tiny_config("bert", {"hidden_size": 64}).hidden_size == 64


def test_layer_drop_and_masked_time_are_left_to_the_model() -> None:
    """The library switches layer drop off; masks over time would come from another generator than dropout."""
    config = tiny_config("wav2vec2")
    assert (config.layerdrop, config.mask_time_prob, config.conv_dim) == (0.1, 0.0, [32] * 7)


def test_unknown_model_type() -> None:
    with pytest.raises(ConfigError) as error:
        tiny_config("lama")
    assert str(error.value) == (
        f"model_type is 'lama', which Transformers {transformers.__version__} does not have. Give one of its model "
        "types, as in the config.json of a checkpoint."
    )


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        tiny_config("llama", {"hidden_size": 33})
    text = str(error.value)
    assert text.startswith("No tiny configuration of llama can be made: ")
    assert "The hidden size (33) is not a multiple of the number of attention heads (4)." in text
    assert text.endswith("The sizes that meft families chooses do not fit this model type.")


def test_the_same_seed_gives_the_same_model_and_batch() -> None:
    family = CATALOGUE["bert"]
    state = torch.get_rng_state()
    one, other, third = family.build(), family.build(), family.build(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    equal = [torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    assert all(equal)
    assert not torch.equal(next(one.parameters()), next(third.parameters()))
    batch = family.batch(one)
    assert all(torch.equal(values, family.batch(one)[name]) for name, values in batch.items())


def test_no_parameter_hides_its_part() -> None:
    """Norm weights are not one and biases are not zero; positions that are not trained stay what they are."""
    model = CATALOGUE["marian"].build()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.unique().numel() > 1, name
    positions = model.model.encoder.embed_positions.weight
    assert not positions.requires_grad
    assert torch.equal(positions[0, :16], torch.zeros(16))


def test_a_batch_of_words() -> None:
    family = CATALOGUE["roberta"]
    model = family.build("token_classification")
    batch = family.batch(model, "token_classification")
    assert batch["attention_mask"].sum(dim=1).tolist() == [8, 7, 6]
    assert batch["input_ids"][1].tolist()[-2:] == [model.config.eos_token_id, model.config.pad_token_id]
    assert batch["labels"][1, -1] == -100
    assert model(**batch).loss.isfinite()


def test_heads() -> None:
    assert CATALOGUE["bert"].heads() == (
        "masked_lm",
        "causal_lm",
        "sequence_classification",
        "token_classification",
        "question_answering",
        "base",
    )
    assert CATALOGUE["vit"].heads()[0] == "image_classification"
    assert heads_of(tiny_config("whisper"))[0] == "speech_seq2seq"


def test_encoders_look_at_earlier_words_only_under_a_causal_head() -> None:
    family = Family("bert")
    model = family.build("causal_lm").eval()
    ids = torch.randint(24, 40, (1, 6))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] - 23) % 16 + 24
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits[:, :-1], model(input_ids=changed).logits[:, :-1])


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("bert", inputs.text),
        ("clip", inputs.text_and_pixels),
        ("vit", inputs.pixels),
        ("wav2vec2", inputs.waveform),
        ("whisper", inputs.mel_frames),
        ("audio-spectrogram-transformer", inputs.frames_of_mel),
    ],
)
def test_inputs_are_guessed_where_the_catalogue_does_not_say(model_type: str, expected: object) -> None:
    assert inputs.guessed(Family(model_type).build()) is expected
