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
    "mllama, words only": "MllamaSelfAttentionDecoderLayer",
    "segformer": "SegformerLayer",
    "ctrl": "EncoderLayer",
    "canine": "CanineLayer",
    "mobilebert": "MobileBertLayer",
    "swin": "SwinStage",
    "swinv2": "Swinv2Stage",
    "pvt_v2": "PvtV2EncoderLayer",
}
_RECURRENT = {
    "mamba": "MambaBlock",
    "mamba2": "Mamba2Block",
    "falcon_mamba": "FalconMambaBlock",
    "rwkv": "RwkvBlock",
    "recurrent_gemma": "RecurrentGemmaDecoderLayer",
    "jamba": "JambaMambaDecoderLayer",
    "zamba": "ZambaMambaDecoderLayer",
    "zamba2": "Zamba2MambaDecoderLayer",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "nemotron_h": "NemotronHMamba2Mixer",
    "lfm2": "Lfm2ShortConv",
    "bamba": "BambaMixer",
    "falcon_h1": "FalconH1Mixer",
    "xlstm": "xLSTMBlock",
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "olmo_hybrid": "OlmoHybridLinearAttentionDecoderLayer",
    "minimax": "MiniMaxLightningAttention",
}
_WITHOUT_A_STACK = {
    "squeezebert": "SqueezeBertForMaskedLM",
    "convnext": "ConvNextForImageClassification",
    "resnet": "ResNetForImageClassification",
    "xlnet": "XLNetLMHeadModel",
    "xlm": "XLMWithLMHeadModel",
    "reformer": "ReformerForMaskedLM",
    "funnel": "FunnelForMaskedLM",
}
_WIDTHS = {
    "swin": "swin.encoder.layers.1 of SwinEncoder has width 64, but swin.encoder.layers.0 has 32",
    "swinv2": "swinv2.encoder.layers.0 of Swinv2Model was given a hidden state of shape (3, 16, 32) and returned one",
    "pvt_v2": "pvt_v2.encoder.layers.1 of PvtV2Model has width 16, but pvt_v2.encoder.layers.0 has 8",
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
for _name, _layer in _RECURRENT.items():
    _add(_name, WAYS, f"contains a {_layer}: state-space and recurrent layers carry a state from token to token")
for _name, _model in _WITHOUT_A_STACK.items():
    _add(_name, WAYS, f"{_model} has no stack of layers")
for _name, _shapes in _WIDTHS.items():
    _add(_name, _NOT_MEFT3, _shapes, "so its layers must all have one width")
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

PLAIN_CACHE_DIFFERS = ("prophetnet", "t5gemma")
"""Plain models that generate other words with a key-value cache than without, at these sizes."""

OLD_PLAIN_CACHE_DIFFERS = ("umt5",)
"""The same, in older versions of Transformers (5.17) only."""
