"""The ways to fine-tune that the benchmarks put side by side, each built on the same randomly drawn BERT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from meft import make_reversible
from meft.methods import apply_method

SEED = 0
HEAD_WIDTH = 64


@dataclass(frozen=True)
class Shape:
    """A BERT of `layers` layers, `width` wide, on `batch` sequences of `sequence` tokens."""

    layers: int
    width: int
    sequence: int
    batch: int
    dtype: str
    vocabulary: int = 30522

    def __str__(self) -> str:
        return f"bert-{self.layers}x{self.width}-b{self.batch}-s{self.sequence}-{self.dtype}"


def base_model(shape: Shape) -> BertForSequenceClassification:
    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.width // HEAD_WIDTH),
        intermediate_size=4 * shape.width,
        max_position_embeddings=max(512, shape.sequence),
    )
    return BertForSequenceClassification(config).to(getattr(torch, shape.dtype)).train()


def batch_of(shape: Shape) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.sequence), generator=generator)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": torch.randint(2, (shape.batch,), generator=generator),
    }


def with_method(method: str) -> Callable[[Shape], nn.Module]:
    def build(shape: Shape) -> nn.Module:
        return apply_method(base_model(shape), method, task_type="SEQ_CLS")

    return build


def lora_with_checkpointing(shape: Shape) -> nn.Module:
    model: Any = base_model(shape)
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # its name before Transformers 5.23
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return apply_method(model, "lora", task_type="SEQ_CLS")


def lora_on_momentum(shape: Shape) -> nn.Module:
    return make_reversible(apply_method(base_model(shape), "lora", task_type="SEQ_CLS"), coupling="momentum")


PEERS: dict[str, Callable[[Shape], nn.Module]] = {
    "full": with_method("full"),
    "lora": with_method("lora"),
    "lora+checkpointing": lora_with_checkpointing,
    "adapter": with_method("adapter"),
    "meft1": with_method("meft1"),
    "meft2": with_method("meft2"),
    "meft3": with_method("meft3"),
    "momentum": with_method("momentum"),
    "lora on momentum": lora_on_momentum,
}
