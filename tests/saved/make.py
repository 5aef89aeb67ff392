"""Saves small adapters with their inputs and outputs, for later versions to load: run once, by version 0.1.0 (9e17dd8).

    PYTHONPATH=src python tests/saved/make.py tests/saved/0.1.0

Run in float64 and kept in float32, so that no processor's rounding shows in the bits.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import meft

SIZES: dict[str, Any] = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 12, "max_position_embeddings": 8}
BASES: dict[str, Any] = {"bert": (BertModel, BertConfig(**SIZES)), "llama": (LlamaModel, LlamaConfig(**SIZES))}

ADAPTERS: dict[str, dict[str, Any]] = {
    "meft1": {"coupling": "meft1"},
    "meft2": {"coupling": "meft2"},
    "meft3": {"coupling": "meft3"},
    "momentum": {"coupling": "momentum"},
    "momentum-block": {"coupling": "momentum", "granularity": "block"},
    "momentum-random": {"coupling": "momentum", "sign": "random"},
    "momentum-float": {"coupling": "momentum", "arithmetic": "float"},
    "adapter": {"coupling": "adapter"},
    "meft1-chosen": {"coupling": "meft1", "lam": 0.25, "beta": 0.5, "output": ("sum", 0.1), "fraction_bits": 12},
    "meft3-float": {"coupling": "meft3", "arithmetic": "float", "lam": 0.3},
}


def inputs() -> torch.Tensor:
    return torch.arange(10).view(2, 5) % 11


def main(folder: Path) -> None:
    for base, (kind, config) in BASES.items():
        torch.manual_seed(0)
        kind(config).save_pretrained(folder / base)
        outputs = {}
        for index, (name, options) in enumerate(ADAPTERS.items()):
            model = get_peft_model(
                kind.from_pretrained(folder / base).double(), meft.MeftConfig(bottleneck_dim=2, **options)
            ).float()
            generator = torch.Generator().manual_seed(index)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            model.save_pretrained(folder / base / name)
            (folder / base / name / "README.md").unlink()
            model = model.double().eval()
            with torch.no_grad():
                outputs[name] = model(input_ids=inputs()).last_hidden_state.float()
        save_file(outputs, folder / base / "outputs.safetensors")
    for place in folder.rglob("README.md"):
        place.unlink()


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    main(Path(sys.argv[1]))
