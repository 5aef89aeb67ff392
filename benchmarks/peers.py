"""The ways to fine-tune that the benchmarks put side by side; the BERT that `exactness.py` tries some of them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from meft import MeftConfig, make_reversible
from meft.memory.estimation.fake import offloaded
from meft.methods.registry import apply_method

SEED = 0
HEAD_WIDTH = 64
RANK, ALPHA = 8, 16
_NO_TILES = 2**24  # larger than any sequence; `meft.estimate` reads None as "not given"

FULL, LORA, CHECKPOINTING = "full", "LoRA", "LoRA + checkpointing"
OFFLOAD = "LoRA + checkpointing + offload"
LAYERS, BLOCKS, TILES = "LoRA on momentum: layers", "LoRA on momentum: blocks", "LoRA on momentum: blocks, tiles"


@dataclass(frozen=True)
class Peer:
    """One way to fine-tune.

    Attributes:
        build: Makes a model trainable so, given its task for PEFT and a pattern for its linear layers.
        estimate: What `meft.estimate` calls it, and its options.
        offloads: Whether what is saved for the backward pass is moved to the host.
    """

    build: Callable[[PreTrainedModel, str, str], nn.Module]
    estimate: tuple[str, Mapping[str, Any]] = field(default=("full", {}))
    offloads: bool = False

    def surroundings(self, device: str = "cpu") -> AbstractContextManager[Any]:
        """What a forward pass runs in. On the CPU copies are made all the same, and marked as bytes of the host."""
        if not self.offloads:
            return nullcontext()
        return offloaded() if device == "cpu" else torch.autograd.graph.save_on_cpu(pin_memory=True)


def _full(model: PreTrainedModel, task_type: str, linear: str) -> nn.Module:
    return model.requires_grad_(True)


def _lora(model: PreTrainedModel, task_type: str, linear: str) -> nn.Module:
    config = LoraConfig(task_type=task_type, r=RANK, lora_alpha=ALPHA, target_modules=linear)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def _checkpointed(model: PreTrainedModel, task_type: str, linear: str) -> nn.Module:
    trained = _lora(model, task_type, linear)
    # Under its older name it is deprecated in Transformers 5.23.
    enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    return trained


def _coupled(model: PreTrainedModel, task_type: str, linear: str, coupling: str) -> nn.Module:
    config = MeftConfig(task_type=task_type, coupling=coupling)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def _lora_on_momentum(model: PreTrainedModel, task_type: str, linear: str, **options: Any) -> nn.Module:
    return make_reversible(_lora(model, task_type, linear), coupling="momentum", gamma=1 / 4, **options)


def _on_momentum(granularity: str, tile_size: str | None, **options: Any) -> Peer:
    build = partial(_lora_on_momentum, granularity=granularity, tile_size=tile_size, **options)
    estimated = {"granularity": granularity, "tile_size": tile_size or _NO_TILES, "gamma": 1 / 4, **options}
    return Peer(build, ("lora+momentum", estimated))


PEERS: dict[str, Peer] = {
    FULL: Peer(_full),
    LORA: Peer(_lora, ("lora", {})),
    CHECKPOINTING: Peer(_checkpointed, ("lora+checkpointing", {})),
    OFFLOAD: Peer(_checkpointed, ("lora+offload", {}), offloads=True),
    "meft1": Peer(partial(_coupled, coupling="meft1"), ("meft1", {})),
    "meft2": Peer(partial(_coupled, coupling="meft2"), ("meft2", {})),
    "meft3": Peer(partial(_coupled, coupling="meft3"), ("meft3", {})),
    "momentum": Peer(partial(_coupled, coupling="momentum"), ("momentum", {})),
    LAYERS: _on_momentum("layer", None),
    BLOCKS: _on_momentum("block", None),
    TILES: _on_momentum("block", "auto"),
}
PLAIN_HEAD = f"{TILES}, plain head"
HEADS: dict[str, Peer] = {
    FULL: PEERS[FULL],
    LORA: PEERS[LORA],
    CHECKPOINTING: PEERS[CHECKPOINTING],
    PLAIN_HEAD: _on_momentum("block", "auto", fused_loss=False),
    TILES: PEERS[TILES],
}
"""Those that a vocabulary head is put on."""


@dataclass(frozen=True)
class Shape:
    """A BERT of `layers` layers, `width` wide, on `batch` sequences of `sequence` tokens."""

    layers: int
    width: int
    sequence: int
    batch: int
    dtype: str
    vocabulary: int = 30522


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


def lora_with_checkpointing(shape: Shape) -> nn.Module:
    model: Any = base_model(shape)
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # its name before Transformers 5.23
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return apply_method(model, "lora", task_type="SEQ_CLS")
