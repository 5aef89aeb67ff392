"""CLIP, SigLIP and relatives, text and vision towers: a norm before attention and before the MLP."""

from __future__ import annotations

from .base import rows
from .residual import Sublayer, two_residuals

LAYER = two_residuals(Sublayer(("self_attn",), before="layer_norm1"), Sublayer(("mlp",), before="layer_norm2"))
# Norms after the residual.
CLIPSEG_DECODER_LAYER = two_residuals(
    Sublayer(("self_attn",), closing="layer_norm1"), Sublayer(("mlp",), closing="layer_norm2")
)
# The same with other names.
AIMV2_LAYER = two_residuals(Sublayer(("attention",), before="rms_norm1"), Sublayer(("ffn",), before="rms_norm2"))
QWEN_VISION_LAYER = two_residuals(Sublayer(("attn",), before="norm1"), Sublayer(("mlp",), before="norm2"))

ROWS = {
    **rows(
        LAYER,
        "AltCLIPEncoderLayer",
        "Blip2EncoderLayer",
        "BlipEncoderLayer",
        "CLIPEncoderLayer",
        "CLIPSegEncoderLayer",
        "ChineseCLIPVisionLayer",
        "GitVisionEncoderLayer",
        "GraniteDoclingEncoderLayer",
        "GroupViTEncoderLayer",
        "HunYuanVLVisionBlock",
        "Idefics2EncoderLayer",
        "Idefics3EncoderLayer",
        "InstructBlipEncoderLayer",
        "InstructBlipVideoEncoderLayer",
        "JanusVisionEncoderLayer",
        "Kosmos2VisionEncoderLayer",
        "MLCDEncoderLayer",
        "MetaClip2EncoderLayer",
        "MiniCPMOcrVisionEncoderLayer",
        "MiniCPMV4_6VisionEncoderLayer",
        "MiniCPMV4_7VisionEncoderLayer",
        "Molmo2VisionEncoderLayer",
        "Nemotron3DiarizationAudioLayer",
        "Nemotron3_5TranscribeAsrAudioLayer",
        "OwlViTEncoderLayer",
        "Owlv2EncoderLayer",
        "PaddleOCRVisionEncoderLayer",
        "Phi4MultimodalVisionEncoderLayer",
        "Sam3LiteTextTextEncoderLayer",
        "Siglip2EncoderLayer",
        "SiglipEncoderLayer",
        "SmolVLMEncoderLayer",
        "Tipsv2TextEncoderLayer",
        "UnlimitedOcrEncoderLayer",
        "VideoLlama3VisionEncoderLayer",
        "XCLIPEncoderLayer",
    ),
    **rows(AIMV2_LAYER, "Aimv2EncoderLayer", "Ovis2VisionEncoderLayer"),
    **rows(
        QWEN_VISION_LAYER,
        "CohereCompassVisionBlock",
        "Dots3NoteVisionBlock",
        "Ernie4_5_VLMoeVisionBlock",
        "Exaone4_5_VisionBlock",
        "Glm4vMoeVisionBlock",
        "Glm4vVisionBlock",
        "Glm5NextVisionBlock",
        "GlmImageVisionBlock",
        "GlmOcrVisionBlock",
        "Kimi_K25VisionEncoderLayer",
        "MuseGlimmerVisionEncoderLayer",
        "MuseSparkVisionEncoderLayer",
        "Qwen2VLVisionBlock",
        "Qwen2_5OmniVisionBlock",
        "Qwen2_5_VLVisionBlock",
        "Qwen3OmniMoeVisionBlock",
        "Qwen3VLMoeVisionBlock",
        "Qwen3VLVisionBlock",
        "Qwen3_5MoeVisionBlock",
        "Qwen3_5VisionBlock",
        "Qwen4ExpVisionBlock",
    ),
    "CLIPSegDecoderLayer": CLIPSEG_DECODER_LAYER,
}
