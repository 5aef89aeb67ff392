"""The models that the benchmarks run: shapes of known models with random weights, their batches and their losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

SEED = 0
HEAD_WIDTH = 64
SMALL_VOCABULARY = 1000
"""Of models without a vocabulary head, whose embeddings would only cost time to make."""


@dataclass(frozen=True)
class Subject:
    """A model of a shape on a batch of a shape.

    Attributes:
        family: "roberta" (a sentence classifier) or "llama" (a decoder).
        layers, width: Depth, and width of the hidden state; the feed-forward is 4 times as wide, a head 64 wide.
        sequence, batch: Tokens of a row, and rows.
        dtype: "float32" or "bfloat16".
        vocabulary: Entries of a language model's head; None for the hidden states alone.
    """

    family: str
    layers: int
    width: int
    sequence: int
    batch: int = 1
    dtype: str = "bfloat16"
    vocabulary: int | None = None

    @property
    def task_type(self) -> str:
        """PEFT's name of the task."""
        if self.family == "roberta":
            return "SEQ_CLS"
        return "FEATURE_EXTRACTION" if self.vocabulary is None else "CAUSAL_LM"

    @property
    def linear_layers(self) -> str:
        """A pattern for the names of all linear layers inside the transformer layers."""
        names = "query|key|value|dense" if self.family == "roberta" else r"\w+_proj"
        return rf".*\.layers?\.\d+\..*\b({names})|layers\.\d+\..*\b({names})"

    @property
    def elements(self) -> int:
        """Elements of one hidden state."""
        return self.batch * self.sequence * self.width

    def build(self) -> PreTrainedModel:
        """Builds the model with random weights, in training mode."""
        torch.manual_seed(SEED)
        model = self._roberta() if self.family == "roberta" else self._llama()
        return model.to(getattr(torch, self.dtype)).train()

    def inputs(self) -> dict[str, Tensor]:
        """Makes the batch, the same in every run."""
        generator = torch.Generator().manual_seed(SEED)
        size = (self.batch, self.sequence)
        ids = torch.randint(3, self.vocabulary or SMALL_VOCABULARY, size, generator=generator)
        if self.family == "roberta":
            labels = torch.randint(2, (self.batch,), generator=generator)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return {"input_ids": ids} if self.vocabulary is None else {"input_ids": ids, "labels": ids}

    def direction(self) -> Tensor:
        """The vector that the loss without a head projects hidden states on."""
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(self.width, generator=generator).to(getattr(torch, self.dtype))

    def _llama(self) -> PreTrainedModel:
        config = LlamaConfig(
            vocab_size=self.vocabulary or SMALL_VOCABULARY,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.width // HEAD_WIDTH),
            num_key_value_heads=max(1, self.width // HEAD_WIDTH),
            intermediate_size=4 * self.width,
            max_position_embeddings=max(4096, self.sequence),
            use_cache=False,
        )
        return LlamaModel(config) if self.vocabulary is None else LlamaForCausalLM(config)

    def _roberta(self) -> PreTrainedModel:
        config = RobertaConfig(
            vocab_size=SMALL_VOCABULARY,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.width // HEAD_WIDTH),
            intermediate_size=4 * self.width,
            max_position_embeddings=max(512, self.sequence) + 2,
            type_vocab_size=1,
        )
        return RobertaForSequenceClassification(config)


def loss_of(subject: Subject, model: nn.Module, batch: dict[str, Tensor], direction: Tensor) -> Tensor:
    """The loss of one forward pass: the model's own, or a projection of its last hidden states."""
    if "labels" in batch:
        return model(**batch).loss
    hidden = model(**batch)[0]
    return (hidden @ direction).float().mean()


def opt_1_3b(positions: int) -> PretrainedConfig:
    """The shape of OPT-1.3B, with as many positions as are asked for (its own are 2048)."""
    return OPTConfig(
        hidden_size=2048,
        word_embed_proj_dim=2048,
        ffn_dim=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        vocab_size=50272,
        max_position_embeddings=positions,
        attention_dropout=0.0,
    )


def llama_3_2_3b(positions: int = 131072) -> PretrainedConfig:
    """The shape of Llama-3.2-3B."""
    return _llama_3(3072, 28, 24, 8192, positions, tied=True)


def llama_3_1_8b(positions: int = 131072) -> PretrainedConfig:
    """The shape of Llama-3.1-8B."""
    return _llama_3(4096, 32, 32, 14336, positions, tied=False)


def small_llama(positions: int) -> PretrainedConfig:
    """A shape for trying out what runs large ones."""
    return _llama_3(64, 2, 4, 256, positions, tied=True, vocabulary=512, key_heads=2)


def _llama_3(
    width: int,
    layers: int,
    heads: int,
    intermediate: int,
    positions: int,
    *,
    tied: bool,
    vocabulary: int = 128256,
    key_heads: int = 8,
) -> PretrainedConfig:
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return LlamaConfig(
        **sizes,
        num_key_value_heads=key_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        use_cache=False,
    )
