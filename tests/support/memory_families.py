"""Configurations of small models of many families, and real steps of them, to hold estimates against."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from transformers import (
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    RobertaConfig,
    ViTConfig,
)

from meft.loading.tasks import TASK_MODELS
from meft.memory import MemoryReport, measure
from meft.memory.estimation.fake import offloaded
from meft.methods.registry import OFFLOAD, read_way

VOCABULARY = 300
TASKS = {
    "bert": "SEQ_CLS",
    "roberta": "TOKEN_CLS",
    "bart": "SEQ_2_SEQ_LM",
    "opt": "CAUSAL_LM",
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "vit": "IMAGE_CLS",
}


def small_config(family: str, *, layers: int = 3, width: int = 64, dropout: float = 0.0) -> PretrainedConfig:
    """A configuration of `TASKS[family]`; BART has `layers` layers in its encoder and in its decoder."""
    text: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
    wide = {"intermediate_size": 4 * width}
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if family in ("bert", "roberta"):
        kind = BertConfig if family == "bert" else RobertaConfig
        return kind(**text, **sizes, **wide, **drops, max_position_embeddings=162)
    if family == "bart":
        sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
                 {"layers": layers, "attention_heads": 4, "ffn_dim": 4 * width}.items()}  # fmt: skip
        return BartConfig(
            **text, **sides, d_model=width, dropout=dropout, max_position_embeddings=160, decoder_start_token_id=2
        )
    if family == "opt":
        return OPTConfig(**text, **sizes, ffn_dim=4 * width, word_embed_proj_dim=width, dropout=dropout)
    if family == "llama":
        return LlamaConfig(**text, **sizes, **wide, num_key_value_heads=2, max_position_embeddings=160)
    if family == "gpt2":
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        return GPT2Config(**text, **drops, n_embd=width, n_layer=layers, n_head=4, n_positions=160)
    return ViTConfig(**sizes, **wide, **drops, image_size=32, patch_size=4)


def real_step(
    family: str,
    method: str,
    *,
    batch_size: int = 2,
    seq_len: int = 96,
    dtype: torch.dtype = torch.float32,
    layers: int = 3,
    dropout: float = 0.0,
    padded: bool = False,
    attn_implementation: str | None = None,
    autocast: torch.dtype | None = None,
    **options: Any,
) -> MemoryReport:
    """Builds the model with random weights, trains a step by `method` on the CPU, and measures the next one."""
    config, task = small_config(family, layers=layers, dropout=dropout), TASKS[family]
    config.use_cache = False
    chosen = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    torch.manual_seed(0)
    way = read_way(method, options)
    model = way.apply(TASK_MODELS[task].from_config(config, dtype=dtype, **chosen), task).train()
    if family == "vit":
        batch = {"pixel_values": torch.randn(batch_size, 3, 32, 32, dtype=dtype)}
    else:
        batch = {"input_ids": torch.randint(3, VOCABULARY, (batch_size, seq_len))}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if padded:
            batch["attention_mask"][-1, -5:] = 0
    shape = (batch_size, seq_len) if task in ("TOKEN_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM") else (batch_size,)
    batch["labels"] = torch.zeros(shape, dtype=torch.long)

    def step() -> None:
        around = offloaded() if way.around == OFFLOAD else nullcontext()
        with torch.autocast("cpu", autocast, enabled=autocast is not None), around:
            loss = model(**batch).loss
        loss.backward()

    step()
    model.zero_grad()
    return measure(step, model=model)
