"""Tiny random models of every supported family, and batches that fit them.

Example:
    >>> model = build("bert", "SEQ_CLS", dtype=torch.float64)
    >>> model(**batch("bert", "SEQ_CLS")).loss.dtype
    torch.float64

The same seed gives the same weights whatever the dtype and the attention implementation, so two models that differ
only there can be compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

VOCABULARY = 40
LABELS = 3
POSITIONS = 24
PAD, START, END = 1, 0, 2
FIRST_WORD = 3

_HEADS = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": AutoModel,
}

_ENCODER_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "FEATURE_EXTRACTION")
_OPT_TASKS = ("SEQ_CLS", "QUESTION_ANS", "CAUSAL_LM", "FEATURE_EXTRACTION")

TASKS: dict[str, tuple[str, ...]] = {
    "bert": _ENCODER_TASKS,
    "roberta": _ENCODER_TASKS,
    "bart": ("SEQ_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"),
    "opt": _OPT_TASKS,
    "opt_350m": _OPT_TASKS,
}
"""The task heads Transformers has for each family."""

FAMILIES = tuple(TASKS)
FAMILY_TASKS = [(family, task) for family, tasks in TASKS.items() for task in tasks]


def config(family: str, task: str, *, layers: int, hidden: int, heads: int, dropout: float) -> PretrainedConfig:
    """The configuration of one tiny model; every dropout of the family is set to `dropout`."""
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "num_labels": 2 if task == "QUESTION_ANS" else LABELS,
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": END,
    }
    if family in ("bert", "roberta"):
        kind = BertConfig if family == "bert" else RobertaConfig
        return kind(
            **shared,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=2 * hidden,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            classifier_dropout=dropout,
            initializer_range=0.2,
            is_decoder=task == "CAUSAL_LM",
        )
    if family == "bart":
        return BartConfig(
            **shared,
            d_model=hidden,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=2 * hidden,
            decoder_ffn_dim=2 * hidden,
            dropout=dropout,
            attention_dropout=dropout,
            activation_dropout=dropout,
            classifier_dropout=dropout,
            adapter_init_std=0.2,
            decoder_start_token_id=END,
            forced_eos_token_id=None,
            is_decoder=task == "CAUSAL_LM",
            is_encoder_decoder=task != "CAUSAL_LM",
        )
    layout = {"word_embed_proj_dim": hidden, "do_layer_norm_before": True}
    if family == "opt_350m":
        layout = {"word_embed_proj_dim": hidden // 2, "do_layer_norm_before": False}
    return OPTConfig(
        **shared,
        **layout,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=2 * hidden,
        dropout=dropout,
        attention_dropout=dropout,
        adapter_init_std=0.2,
    )


def build(
    family: str,
    task: str = "SEQ_CLS",
    *,
    layers: int = 4,
    hidden: int = 32,
    heads: int = 4,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "eager",
    seed: int = 0,
) -> PreTrainedModel:
    """A tiny random model with the head of `task`, in training mode (so that reversible paths are taken).

    Args:
        family: one of `FAMILIES`; `opt` is pre-norm, `opt_350m` post-norm with projections around the stack.
        task: one of `TASKS[family]`.
        layers: depth; for `bart` of the encoder and of the decoder.
        dropout: probability of every dropout in the model.
        attn_implementation: "eager" or "sdpa". OPT's eager softmax runs in float32 even in a float64 model.
        seed: of the weights; the generator outside is left untouched.
    """
    if task not in TASKS[family]:
        raise ValueError(f"{family} has no head for {task!r}; it has {TASKS[family]}")
    settings = config(family, task, layers=layers, hidden=hidden, heads=heads, dropout=dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _HEADS[task].from_config(settings, attn_implementation=attn_implementation)
        # Norm weights of one and biases of zero would hide a norm or a bias that is left out or used twice.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).train()


def batch(
    family: str,
    task: str = "SEQ_CLS",
    *,
    size: int = 3,
    length: int = 7,
    padding: str | None = "right",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs with labels for `build(family, task)`; row i is padded by i tokens unless `padding` is None.

    Shapes: `input_ids`, `attention_mask` (size, length); `labels` (size,) for SEQ_CLS, (size, length) for TOKEN_CLS and
    CAUSAL_LM, (size, length - 2) for SEQ_2_SEQ_LM; `start_positions`, `end_positions` (size,) for QUESTION_ANS; none
    for FEATURE_EXTRACTION. The last real token of each row is the end token, as BART's classification head requires.
    """
    generator = torch.Generator().manual_seed(seed)

    def words(*shape: int) -> Tensor:
        return torch.randint(FIRST_WORD, VOCABULARY, shape, generator=generator)

    ids, mask = words(size, length), torch.ones(size, length, dtype=torch.long)
    for row in range(size):
        pads = 0 if padding is None else min(row, length - 2)
        empty = slice(length - pads, length) if padding == "right" else slice(0, pads)
        last = length - pads - 1 if padding == "right" else length - 1
        ids[row, empty], mask[row, empty] = PAD, 0
        ids[row, last] = END
    made = {"input_ids": ids, "attention_mask": mask}
    if task == "SEQ_CLS":
        made["labels"] = torch.randint(LABELS, (size,), generator=generator)
    elif task == "TOKEN_CLS":
        made["labels"] = torch.randint(LABELS, ids.shape, generator=generator).masked_fill(mask == 0, -100)
    elif task == "QUESTION_ANS":
        made["start_positions"] = torch.randint(0, 2, (size,), generator=generator)
        made["end_positions"] = torch.randint(2, 4, (size,), generator=generator)
    elif task == "CAUSAL_LM":
        made["labels"] = ids.masked_fill(mask == 0, -100)
    elif task == "SEQ_2_SEQ_LM":
        made["labels"] = words(size, length - 2)
        made["labels"][-1, -1] = -100
    elif family == "bart":
        made["decoder_input_ids"] = words(size, length - 2)
        made["decoder_attention_mask"] = torch.ones(size, length - 2, dtype=torch.long)
        made["decoder_attention_mask"][-1, -1] = 0
    return made


def stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The layer lists of a model by qualified name: two for BART (encoder, decoder; one for CAUSAL_LM), else one.

    Works on plain models and on models whose layers are wrapped, as long as the lists stay where they are.
    """
    return {
        name: child
        for name, child in model.named_modules()
        if isinstance(child, nn.ModuleList) and name.rsplit(".", 1)[-1] in ("layer", "layers")
    }
