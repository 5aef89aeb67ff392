"""The task heads that Transformers has for a model type, and the labels each is trained with."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig

from .inputs import FIRST_WORD, LAST_WORD, token_id

LABELS = 3
IGNORED = -100

HEADS: dict[str, Any] = {
    "seq2seq_lm": transformers.AutoModelForSeq2SeqLM,
    "speech_seq2seq": transformers.AutoModelForSpeechSeq2Seq,
    "image_text_to_text": transformers.AutoModelForImageTextToText,
    "masked_lm": transformers.AutoModelForMaskedLM,
    "causal_lm": transformers.AutoModelForCausalLM,
    "zero_shot_image_classification": transformers.AutoModelForZeroShotImageClassification,
    "image_classification": transformers.AutoModelForImageClassification,
    "ctc": transformers.AutoModelForCTC,
    "audio_classification": transformers.AutoModelForAudioClassification,
    "sequence_classification": transformers.AutoModelForSequenceClassification,
    "token_classification": transformers.AutoModelForTokenClassification,
    "question_answering": transformers.AutoModelForQuestionAnswering,
    "base": transformers.AutoModel,
}
"""Auto classes by the name of their head; the first one that a model type has is its natural head."""

GENERATING = ("seq2seq_lm", "speech_seq2seq", "image_text_to_text", "causal_lm")

PEFT_TASKS = {
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
}

OF_TEXT = ("masked_lm", "causal_lm", "sequence_classification", "token_classification", "question_answering")
OF_IMAGES = ("image_classification",)
"""Heads that read words or pixels only, whatever else the model has a tower for."""


def heads_of(config: PretrainedConfig) -> tuple[str, ...]:
    """The heads that Transformers has for a configuration, the natural one first."""
    return tuple(name for name, auto in HEADS.items() if type(config) in auto._model_mapping)


def prepare(config: PretrainedConfig, head: str) -> None:
    """Sets in a configuration what a head asks for."""
    # Where there are several models for a head, the Auto class goes by this list, which must not be None.
    config.architectures = []
    config.num_labels = 2 if head == "question_answering" else LABELS
    if head == "causal_lm" and config.model_type in _CAUSAL_BY_OPTION:
        config.is_decoder = True
    if head == "ctc":
        config.ctc_zero_infinity = True
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = token_id(config, "pad_token_id", 0)


_CAUSAL_BY_OPTION = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Encoders whose head for causal language models needs to be told to look at earlier words only."""


def labels_for(head: str, inputs: dict[str, Tensor], generator: torch.Generator) -> dict[str, Any]:
    """What a training step of a head is given besides the inputs; nothing for the model without a head."""
    rows = len(next(iter(inputs.values())))
    if head in ("sequence_classification", "image_classification", "audio_classification"):
        return {"labels": torch.randint(LABELS, (rows,), generator=generator)}
    if head == "question_answering":
        first = torch.randint(0, 2, (rows,), generator=generator)
        return {"start_positions": first, "end_positions": first + 2}
    if head == "token_classification":
        labels = torch.randint(LABELS, inputs["input_ids"].shape, generator=generator)
        return {"labels": _unless_padding(labels, inputs)}
    if head in ("causal_lm", "masked_lm", "image_text_to_text"):
        return {"labels": _unless_padding(inputs["input_ids"], inputs)}
    if head in ("seq2seq_lm", "speech_seq2seq", "ctc"):
        return {"labels": torch.randint(FIRST_WORD, LAST_WORD, (rows, 2 if head == "ctc" else 5), generator=generator)}
    return {"return_loss": True} if head == "zero_shot_image_classification" else {}


def _unless_padding(labels: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return labels.masked_fill(inputs["attention_mask"] == 0, IGNORED)
