"""Llama and its many relatives, dense or mixtures of experts: a norm before attention and before the feed-forward."""

from __future__ import annotations

from .base import rows
from .residual import Sublayer, two_residuals

ATTENTION = Sublayer(("self_attn",), before="input_layernorm")
FEED_FORWARD = Sublayer(("mlp",), before="post_attention_layernorm")

LAYER = two_residuals(ATTENTION, FEED_FORWARD)

# Dropout on both outputs.
PHI3_LAYER = two_residuals(
    Sublayer(("self_attn",), before="input_layernorm", after=("resid_attn_dropout",)),
    Sublayer(("mlp",), before="post_attention_layernorm", after=("resid_mlp_dropout",)),
)
EMU3_LAYER = two_residuals(
    Sublayer(("self_attn",), before="input_layernorm", after=("dropout",)),
    Sublayer(("mlp",), before="post_attention_layernorm", after=("dropout",)),
)
PERSIMMON_LAYER = two_residuals(ATTENTION, Sublayer(("mlp",), before="post_attention_layernorm", after=("dropout",)))

# Their attention gets what the layer names, and nothing else.
NEMOTRON_LAYER = two_residuals(ATTENTION, FEED_FORWARD, extras=False)

# The same with other names.
APERTUS_LAYER = two_residuals(
    Sublayer(("self_attn",), before="attention_layernorm"), Sublayer(("mlp",), before="feedforward_layernorm")
)
JETMOE_LAYER = two_residuals(Sublayer(("self_attention",), before="input_layernorm"), FEED_FORWARD)
PIXTRAL_LAYER = two_residuals(
    Sublayer(("attention",), before="attention_norm"), Sublayer(("feed_forward",), before="ffn_norm")
)
VAULTGEMMA_LAYER = two_residuals(ATTENTION, Sublayer(("mlp",), before="pre_feedforward_layernorm"))
VOXTRAL_REALTIME_LAYER = two_residuals(
    Sublayer(("self_attn",), before="self_attn_layer_norm"),
    Sublayer(("mlp",), before="final_layer_norm"),
    children=("activation_fn",),  # it has one, and does not use it
)

ROWS = {
    **rows(
        LAYER,
        "AXK1DecoderLayer",
        "AXK2DecoderLayer",
        "ArceeDecoderLayer",
        "AriaTextDecoderLayer",
        "BitNetDecoderLayer",
        "Cosmos3EdgeTextDecoderLayer",
        "CsmDecoderLayer",
        "CwmDecoderLayer",
        "DeepseekOcr2TextDecoderLayer",
        "DeepseekOcr2VisionEncoderLayer",
        "DeepseekV2DecoderLayer",
        "DeepseekV32DecoderLayer",
        "DeepseekV3DecoderLayer",
        "DiffLlamaDecoderLayer",
        "Dots1DecoderLayer",
        "Dots3NoteTextDecoderLayer",
        "Ernie4_5DecoderLayer",
        "Ernie4_5_MoeDecoderLayer",
        "EuroBertDecoderLayer",
        "ExaoneMoeDecoderLayer",
        "FlintDecoderLayer",
        "GemmaDecoderLayer",
        "Glm4MoeDecoderLayer",
        "Glm4MoeLiteDecoderLayer",
        "Glm4vMoeTextDecoderLayer",
        "GlmAsrEncoderLayer",
        "GlmDecoderLayer",
        "GptOssDecoderLayer",
        "GradiumPhononTTSDecoderLayer",
        "HYV3DecoderLayer",
        "HeliumDecoderLayer",
        "HrmTextDecoderLayer",
        "HunYuanDenseV1DecoderLayer",
        "HunYuanMoEV1DecoderLayer",
        "HunYuanVLDenseV1DecoderLayer",
        "Jais2DecoderLayer",
        "LagunaDecoderLayer",
        "LlamaDecoderLayer",
        "MellumDecoderLayer",
        "MiMoV2FlashDecoderLayer",
        "MiniMaxM2DecoderLayer",
        "MiniMaxM3VLDecoderLayer",
        "Ministral3DecoderLayer",
        "MinistralDecoderLayer",
        "Mistral4DecoderLayer",
        "MistralDecoderLayer",
        "MixtralDecoderLayer",
        "MoonshineEncoderLayer",
        "MoonshineStreamingEncoderLayer",
        "NanoChatDecoderLayer",
        "NeuCodecDecoderLayer",
        "OlmoDecoderLayer",
        "OlmoeDecoderLayer",
        "OpenAIPrivacyFilterEncoderLayer",
        "PaddleOCRDecoderLayer",
        "PeAudioEncoderLayer",
        "PeAudioVideoEncoderLayer",
        "PeVideoEncoderLayer",
        "PhimoeDecoderLayer",
        "PocketTTSDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen2MoeDecoderLayer",
        "Qwen2VLDecoderLayer",
        "Qwen2_5OmniDecoderLayer",
        "Qwen2_5_VLDecoderLayer",
        "Qwen3DecoderLayer",
        "Qwen3MoeDecoderLayer",
        "Qwen3OmniMoeTalkerCodePredictorDecoderLayer",
        "Qwen3OmniMoeTalkerDecoderLayer",
        "Qwen3OmniMoeThinkerTextDecoderLayer",
        "Qwen3VLMoeTextDecoderLayer",
        "Qwen3VLTextDecoderLayer",
        "SeedOssDecoderLayer",
        "SmolLM3DecoderLayer",
        "SolarOpenDecoderLayer",
        "Starcoder2DecoderLayer",
        "Step3p7DecoderLayer",
        "UltrabertDecoderLayer",
        "UnlimitedOcrTextDecoderLayer",
        "Xcodec2DecoderLayer",
        "YoutuDecoderLayer",
    ),
    **rows(PHI3_LAYER, "Phi3DecoderLayer", "Phi4MultimodalDecoderLayer"),
    "ApertusDecoderLayer": APERTUS_LAYER,
    "Emu3DecoderLayer": EMU3_LAYER,
    "JetMoeDecoderLayer": JETMOE_LAYER,
    "NemotronDecoderLayer": NEMOTRON_LAYER,
    "PersimmonDecoderLayer": PERSIMMON_LAYER,
    "PixtralAttentionLayer": PIXTRAL_LAYER,
    "VaultGemmaDecoderLayer": VAULTGEMMA_LAYER,
    "VoxtralRealtimeEncoderLayer": VOXTRAL_REALTIME_LAYER,
}
