"""The tiny models whose layers the table is tried on: families of the catalogue, and what it has no row for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.clipseg.modeling_clipseg import CLIPSegForImageSegmentation
from transformers.models.emu3.modeling_emu3 import Emu3TextModel
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel
from transformers.models.glm4v.modeling_glm4v import Glm4vTextModel
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from meft_lab.families.catalogue import CATALOGUE
from meft_lab.families.family import Family
from meft_lab.families.shrink import PATCH, tiny_config

Made = tuple[nn.Module, dict[str, Any]]

LAYERS: dict[str, tuple[str, ...]] = {
    "afmoe": ("AfmoeDecoderLayer",),
    "aimv2_vision_model": ("Aimv2EncoderLayer",),
    "albert": ("AlbertLayer",),
    "apertus": ("ApertusDecoderLayer",),
    "arcee": ("ArceeDecoderLayer",),
    "audio-spectrogram-transformer": ("ASTLayer",),
    "bart": ("BartEncoderLayer", "BartDecoderLayer"),
    "beit": ("BeitLayer",),
    "bert": ("BertLayer",),
    "biogpt": ("BioGptDecoderLayer",),
    "blenderbot": ("BlenderbotEncoderLayer", "BlenderbotDecoderLayer"),
    "bloom": ("BloomBlock",),
    "camembert": ("CamembertLayer",),
    "clip": ("CLIPEncoderLayer",),
    "convbert": ("ConvBertLayer",),
    "data2vec-text": ("Data2VecTextLayer",),
    "data2vec-vision": ("Data2VecVisionLayer",),
    "deberta": ("DebertaLayer",),
    "deberta-v2": ("DebertaV2Layer",),
    "deepseek_v3": ("DeepseekV3DecoderLayer",),
    "deit": ("DeiTLayer",),
    "dinov2": ("Dinov2Layer",),
    "dinov2_with_registers": ("Dinov2WithRegistersLayer",),
    "dinov3_vit": ("DINOv3ViTLayer",),
    "distilbert": ("TransformerBlock",),
    "dpt": ("DPTViTLayer",),
    "electra": ("ElectraLayer",),
    "ernie4_5": ("Ernie4_5DecoderLayer",),
    "esm": ("EsmLayer",),
    "eurobert": ("EuroBertDecoderLayer",),
    "exaone4": ("Exaone4DecoderLayer",),
    "falcon": ("FalconDecoderLayer",),
    "flex_olmo": ("FlexOlmoDecoderLayer",),
    "gemma": ("GemmaDecoderLayer",),
    "gemma2": ("Gemma2DecoderLayer",),
    "gemma3_text": ("Gemma3DecoderLayer",),
    "glm": ("GlmDecoderLayer",),
    "glm4": ("Glm4DecoderLayer",),
    "glm4_moe": ("Glm4MoeDecoderLayer",),
    "gpt2": ("GPT2Block",),
    "gpt_bigcode": ("GPTBigCodeBlock",),
    "gpt_neo": ("GPTNeoBlock",),
    "gpt_neox": ("GPTNeoXLayer",),
    "gpt_oss": ("GptOssDecoderLayer",),
    "granite": ("GraniteDecoderLayer",),
    "granitemoe": ("GraniteMoeDecoderLayer",),
    "granitemoeshared": ("GraniteMoeSharedDecoderLayer",),
    "helium": ("HeliumDecoderLayer",),
    "hubert": ("HubertEncoderLayer",),
    "hyperclovax": ("HyperCLOVAXDecoderLayer",),
    "jetmoe": ("JetMoeDecoderLayer",),
    "layoutlm": ("LayoutLMLayer",),
    "llama": ("LlamaDecoderLayer",),
    "llama4_text": ("Llama4TextDecoderLayer",),
    "m2m_100": ("M2M100EncoderLayer", "M2M100DecoderLayer"),
    "marian": ("MarianEncoderLayer", "MarianDecoderLayer"),
    "mbart": ("MBartEncoderLayer", "MBartDecoderLayer"),
    "megatron-bert": ("MegatronBertLayer",),
    "minicpm3": ("MiniCPM3DecoderLayer",),
    "mistral": ("MistralDecoderLayer",),
    "mixtral": ("MixtralDecoderLayer",),
    "mlcd_vision_model": ("MLCDEncoderLayer",),
    "modernbert": ("ModernBertEncoderLayer",),
    "modernbert-decoder": ("ModernBertDecoderLayer",),
    "moonshine": ("MoonshineEncoderLayer", "MoonshineDecoderLayer"),
    "mpnet": ("MPNetLayer",),
    "mpt": ("MptBlock",),
    "mt5": ("MT5Block",),
    "nemotron": ("NemotronDecoderLayer",),
    "nomic_bert": ("NomicBertLayer",),
    "nystromformer": ("NystromformerLayer",),
    "olmo": ("OlmoDecoderLayer",),
    "olmo2": ("Olmo2DecoderLayer",),
    "olmo3": ("Olmo3DecoderLayer",),
    "olmoe": ("OlmoeDecoderLayer",),
    "openai_privacy_filter": ("OpenAIPrivacyFilterEncoderLayer",),
    "opt": ("OPTDecoderLayer",),
    "pegasus": ("PegasusEncoderLayer", "PegasusDecoderLayer"),
    "persimmon": ("PersimmonDecoderLayer",),
    "phi3": ("Phi3DecoderLayer",),
    "phimoe": ("PhimoeDecoderLayer",),
    "pixio": ("PixioLayer",),
    "pixtral": ("PixtralAttentionLayer",),
    "qwen2": ("Qwen2DecoderLayer",),
    "qwen2_moe": ("Qwen2MoeDecoderLayer",),
    "qwen3": ("Qwen3DecoderLayer",),
    "qwen3_moe": ("Qwen3MoeDecoderLayer",),
    "qwen3_vl_text": ("Qwen3VLTextDecoderLayer",),
    "rembert": ("RemBertLayer",),
    "roberta": ("RobertaLayer",),
    "roberta-prelayernorm": ("RobertaPreLayerNormLayer",),
    "roformer": ("RoFormerLayer",),
    "seed_oss": ("SeedOssDecoderLayer",),
    "siglip": ("SiglipEncoderLayer",),
    "smollm3": ("SmolLM3DecoderLayer",),
    "stablelm": ("StableLmDecoderLayer",),
    "starcoder2": ("Starcoder2DecoderLayer",),
    "switch_transformers": ("SwitchTransformersBlock",),
    "t5": ("T5Block",),
    "t5gemma": ("T5GemmaEncoderLayer", "T5GemmaDecoderLayer"),
    "t5gemma2": ("T5Gemma2EncoderLayer", "T5Gemma2DecoderLayer"),
    "trocr": ("TrOCRDecoderLayer",),
    "umt5": ("UMT5Block",),
    "vaultgemma": ("VaultGemmaDecoderLayer",),
    "vit": ("ViTLayer",),
    "vit_mae": ("ViTMAELayer",),
    "wav2vec2": ("Wav2Vec2EncoderLayer",),
    "wavlm": ("WavLMEncoderLayer",),
    "whisper": ("WhisperEncoderLayer", "WhisperDecoderLayer"),
    "xglm": ("XGLMDecoderLayer",),
    "xlm-roberta": ("XLMRobertaLayer",),
    "xlm-roberta-xl": ("XLMRobertaXLLayer",),
}
"""The classes of layers that the blocks of the table are compared with, by model type."""

VARIANTS: dict[str, dict[str, Any]] = {
    "falcon": {"parallel_attn": False, "alibi": True},
    "gpt_neox": {"use_parallel_residual": False},
    "stablelm": {"use_parallel_residual": False},
    "wav2vec2": {},
}
"""The variant of model types with several layouts that is meant; three of them may compute both halves side by side."""


def _of_text(config: Any, model: type[nn.Module]) -> Made:
    return model(config), {"input_ids": torch.arange(12).view(2, 6) + 20}


def _patches(model: nn.Module, name: str, size: int, **others: Any) -> Made:
    """Two images of 16 and 4 patches, laid end to end, as towers take them that read images of any size."""
    return model, {name: torch.randn(20, size), "grid_thw": torch.tensor([[1, 4, 4], [1, 2, 2]]), **others}


def _blip() -> Made:
    return BlipVisionModel(tiny_config("blip").vision_config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def _clipseg() -> Made:
    changes = {"extract_layers": [0, 1, 2], "reduce_dim": 16, "decoder_num_attention_heads": 4}
    model = CLIPSegForImageSegmentation(tiny_config("clipseg", changes))
    return model, {"pixel_values": torch.randn(2, 3, 16, 16), "input_ids": torch.tensor([[25, 26, 2], [26, 27, 2]])}


def _emu3() -> Made:
    return _of_text(tiny_config("emu3").text_config, Emu3TextModel)


def _gemma4_vision() -> Made:
    config = tiny_config("gemma4_vision")
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    places = torch.stack([rows, columns], -1).reshape(1, 36, 2)
    pixels = torch.rand(1, 36, 3 * config.patch_size**2)
    return Gemma4VisionModel(config), {"pixel_values": pixels, "pixel_position_ids": places}


def _glm4v() -> Made:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    return _of_text(tiny_config("glm4v_text", {"rope_parameters": rope}), Glm4vTextModel)


def _glm_image() -> Made:
    return _patches(GlmImageVisionModel(tiny_config("glm_image").vision_config), "pixel_values", 3 * PATCH**2)


def _glmasr() -> Made:
    config = tiny_config("glmasr_encoder")
    return AutoModel.from_config(config), {"input_features": torch.randn(2, config.num_mel_bins, 16)}


def _qwen2_vl() -> Made:
    model = Qwen2VisionTransformerPretrainedModel._from_config(tiny_config("qwen2_vl").vision_config)
    return _patches(model, "hidden_states", 3 * 2 * PATCH**2)


def _video_llama_3() -> Made:
    model = AutoModel.from_config(tiny_config("video_llama_3_vision"))
    return _patches(model, "pixel_values", 3 * PATCH**2, merge_sizes=torch.tensor([1, 1]))


def _voxtral_realtime() -> Made:
    return AutoModel.from_config(tiny_config("voxtral_realtime_encoder")), {"inputs_embeds": torch.randn(2, 8, 32)}


def _large(model_type: str) -> Callable[[], Made]:
    """The variant of speech models that norms before attention and feed-forward."""

    def make() -> Made:
        family = Family(model_type, {"do_stable_layer_norm": True}, inputs=None)
        model = family.build()
        return model, family.batch(model)

    return make


TOWERS: dict[tuple[str, ...], Callable[[], Made]] = {
    ("BlipEncoderLayer",): _blip,
    ("CLIPSegEncoderLayer", "CLIPSegDecoderLayer"): _clipseg,
    ("Emu3DecoderLayer",): _emu3,
    ("Gemma4VisionEncoderLayer",): _gemma4_vision,
    ("Glm4vTextDecoderLayer",): _glm4v,
    ("GlmImageVisionBlock",): _glm_image,
    ("GlmAsrEncoderLayer",): _glmasr,
    ("Qwen2VLVisionBlock",): _qwen2_vl,
    ("VideoLlama3VisionEncoderLayer",): _video_llama_3,
    ("VoxtralRealtimeEncoderLayer",): _voxtral_realtime,
    ("Wav2Vec2EncoderLayerStableLayerNorm",): _large("wav2vec2"),
    ("WavLMEncoderLayerStableLayerNorm",): _large("wavlm"),
}
"""Parts of larger models, and models with inputs of their own kind, by the layers that are compared."""


def _families() -> list[Family]:
    """The rows of the catalogue, and a row by general rules for model types that it has none for."""
    listed = [family for family in CATALOGUE.values() if family.model_type in LAYERS.keys() - VARIANTS.keys()]
    others = LAYERS.keys() - {family.model_type for family in listed}
    return listed + [Family(name, VARIANTS.get(name, {}), inputs=None) for name in sorted(others)]


FAMILIES: dict[str, Family] = {family.name: family for family in _families()}

CHECKED = frozenset(layer for layers in (*LAYERS.values(), *TOWERS) for layer in layers)
"""Every class of layers that is compared."""

NAMES = (*FAMILIES, *(layers[-1] for layers in TOWERS))


def make(name: str) -> Made:
    """The tiny model of one of `NAMES` with random weights, in training mode, and what it is called with."""
    if name in FAMILIES:
        model = FAMILIES[name].build()
        return model, FAMILIES[name].batch(model)
    torch.manual_seed(0)
    model, batch = next(tower for layers, tower in TOWERS.items() if layers[-1] == name)()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights of one and biases of zero would hide a norm or a bias that is left out or used twice.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train(), batch


def expected(name: str) -> set[str]:
    """The known classes of layers that the model of one of `NAMES` is made of."""
    if name in FAMILIES:
        return set(LAYERS[FAMILIES[name].model_type])
    return {layer for layers in TOWERS if layers[-1] == name for layer in layers}
