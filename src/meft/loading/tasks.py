"""The task heads, and what a configuration was saved for."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)

IMAGES = "IMAGE_CLS"
TASK_MODELS: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
    IMAGES: AutoModelForImageClassification,
}
"""The Auto class of each head, by PEFT's names, and one for images, which PEFT has no name for."""
TOKEN_TASKS = tuple(name for name in TASK_MODELS if name != IMAGES)
"""Those of models that take tokens."""

_ENDINGS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForImageClassification": IMAGES,
}


def task_type_of(config: PretrainedConfig) -> str | None:
    """What a configuration was saved for, by the name of its class; None where that says nothing."""
    for architecture in config.architectures or ():
        for ending, task_type in _ENDINGS.items():
            if architecture.endswith(ending):
                return task_type
    return None
