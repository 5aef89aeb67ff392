"""Two towers, and models that read images as words."""

from __future__ import annotations

from typing import Any

from ..family import Family
from ..inputs import text, text_and_pixels, with_images


def _sections(name: str, sections: list[int]) -> dict[str, Any]:
    """Rotary positions of time, height and width share the tiny heads."""
    return {name: {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}}}


MULTIMODAL = (
    Family("clip_text_model"),
    Family("clip", inputs=text_and_pixels),
    Family("siglip", inputs=text_and_pixels),
    Family("llava", inputs=with_images(16), name="llava, both towers"),
    Family("llava", inputs=with_images(16), name="llava, language tower", stacks=("language_model",)),
    Family("idefics3", inputs=text, name="idefics3, words only"),
    Family("paligemma", inputs=with_images(16)),
    Family("gemma3", inputs=text, name="gemma3, words only"),
    Family("smolvlm", inputs=text, name="smolvlm, words only"),
    Family("qwen2_vl", _sections("text_config", [2, 1, 1]), inputs=text, name="qwen2_vl, words only"),
    Family("qwen2_5_vl", _sections("text_config", [2, 1, 1]), inputs=text, name="qwen2_5_vl, words only"),
    Family("qwen3_vl", _sections("text_config", [2, 1, 1]), inputs=text, name="qwen3_vl, words only"),
    Family("mllama", {"text_config": {"cross_attention_layers": [1]}}, inputs=text, name="mllama, words only"),
    Family("trocr"),
)
