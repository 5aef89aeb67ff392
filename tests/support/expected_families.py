"""What `meft` refuses of the catalogue, and the reason it must give: words of the error's text, by coupling.

A family that is not here works under every coupling. Each reason names the layer that it is about.
"""

from __future__ import annotations

WAYS = ("meft1", "meft2", "meft3", "momentum", "full")

_NOT_MEFT3 = ("meft1", "meft2", "momentum", "full")
_WITH_ADAPTERS = ("meft1", "meft2", "momentum")

_PARALLEL = {
    "gpt_neox": "GPTNeoXLayer",
    "gptj": "GPTJBlock",
    "codegen": "CodeGenBlock",
    "falcon": "FalconDecoderLayer",
    "falcon, new decoder": "FalconDecoderLayer",
    "phi": "PhiDecoderLayer",
    "stablelm, parallel": "StableLmDecoderLayer",
    "cohere": "CohereDecoderLayer",
    "cohere2": "Cohere2DecoderLayer",
}
_UNKNOWN = {
    "big_bird": "BigBirdLayer",
    "longformer": "LongformerLayer",
    "luke": "LukeLayer",
    "fnet": "FNetLayer",
    "led": "LEDEncoderLayer",
    "longt5": "LongT5Block",
    "nllb-moe": "NllbMoeEncoderLayer",
    "prophetnet": "ProphetNetEncoderLayer",
    "gemma3n_text": "Gemma3nTextDecoderLayer",
    "gemma4_text": "Gemma4TextDecoderLayer",
    "openai-gpt": "Block",
    "sam_vision_model": "SamVisionLayer",
    "wav2vec2-bert": "Wav2Vec2BertEncoderLayer",
    "mllama, words only": "MllamaVisionEncoderLayer",
    "segformer": "SegformerLayer",
    "ctrl": "EncoderLayer",
    "canine": "CanineLayer",
    "mobilebert": "MobileBertLayer",
    "swin": "SwinLayer",
    "swinv2": "Swinv2Layer",
    "pvt_v2": "PvtV2BlockLayer",
    "convnext": "ConvNextLayer",
    "xlnet": "XLNetLayer",
    "funnel": "FunnelLayer",
}
_RECURRENT = (
    "mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "recurrent_gemma", "jamba", "bamba", "zamba", "zamba2",
    "falcon_h1", "granitemoehybrid", "nemotron_h", "lfm2", "qwen3_next", "olmo_hybrid", "minimax",
)  # fmt: skip
_WITHOUT_A_STACK = {
    "squeezebert": "SqueezeBertForMaskedLM",
    "resnet": "ResNetForImageClassification",
    "xlm": "XLMWithLMHeadModel",
}
_SPLIT = "into an attention and a feed-forward block: "

REFUSED: dict[str, dict[str, tuple[str, ...]]] = {}
"""Words that the reason must contain, by name of the family and coupling."""


def _add(name: str, ways: tuple[str, ...], *words: str) -> None:
    REFUSED.setdefault(name, {}).update(dict.fromkeys(ways, words))


for _name, _layer in _PARALLEL.items():
    _add(_name, ("meft3",), f"a {_layer}, {_SPLIT}its attention and its feed-forward read the same input")
for _name, _layer in _UNKNOWN.items():
    _add(_name, ("meft3",), f"a {_layer}, {_SPLIT}it is not known")
for _name in _RECURRENT:
    _add(_name, ("meft3",), f"{_SPLIT}it is not known")
for _name, _model in _WITHOUT_A_STACK.items():
    _add(_name, WAYS, f"{_model} has no stack of layers")
_add("convnext", _WITH_ADAPTERS, "is a ConvNextLayer, whose feed-forward is not known")
_add(
    "wav2vec2-bert",
    _WITH_ADAPTERS,
    "is a Wav2Vec2BertEncoderLayer, whose feed-forward is not known",
    "several can be told to be the feed-forward",
)
_add("mobilebert", _WITH_ADAPTERS, "makes (3, 8, 16) of (3, 8, 16), but the hidden state has width 32")
_add(
    "mllama, words only",
    _NOT_MEFT3,
    "MllamaTextModel called model.language_model.layers.2 after model.language_model.layers.0",
    "a reversible stack runs every layer once, in order",
)

IDLE = {
    "idefics3, words only": ("model.vision_model.encoder.layers",),
    "gemma3, words only": ("model.vision_tower.encoder.layers",),
    "smolvlm, words only": ("model.vision_model.encoder.layers",),
    "qwen2_vl, words only": ("model.visual.blocks",),
    "qwen2_5_vl, words only": ("model.visual.blocks",),
    "qwen3_vl, words only": ("model.visual.blocks",),
    "canine": ("canine.final_char_encoder.layer",),
}
"""Layer stacks that no loss on the family's batch reaches."""

PLAIN_CACHE_DIFFERS = ("prophetnet", "t5gemma", "minimax", "rwkv")
"""Plain models that generate other words with a key-value cache than without, at these sizes."""

OLD_PLAIN_CACHE_DIFFERS = ("umt5",)
"""The same, in older versions of Transformers (5.17) only."""

PLAIN_LOADING_DIFFERS = ("funnel",)
"""Plain models that come back from a folder with other weights than they were saved with."""
