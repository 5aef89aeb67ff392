"""Estimates against measured steps: every method, seven families, four dtypes, small shapes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from meft.backbone import layers
from meft.memory import MemoryEstimate, MemoryReport, estimate
from support.memory_families import TASKS, real_step, small_config

HALF, MIXED = torch.bfloat16, {"autocast": torch.bfloat16}

# (family, method, options of the step)
FAST: list[tuple[str, str, dict[str, Any]]] = [
    ("bert", "full", {}),
    ("bert", "lora", {"padded": True}),
    ("bert", "lora+checkpointing", {"batch_size": 4, "seq_len": 150}),
    ("bert", "lora+offload", {}),
    ("bert", "lora+momentum", {"dropout": 0.1}),
    ("bert", "ia3+momentum", {}),
    ("bert", "bitfit", {"dropout": 0.1}),
    ("bert", "meft1", {"dtype": HALF}),
    ("bert", "meft2", {"bottleneck_dim": 32}),
    ("bert", "meft3", {"dtype": torch.float64}),
    ("bert", "momentum", {"layers": 9}),
    ("bert", "momentum", {"granularity": "block"}),
    ("roberta", "full", {"layers": 8}),
    ("roberta", "lora", {"dtype": torch.float16, "lora_rank": 32}),
    ("roberta", "meft1", {"frozen_layers": 1, "cached_layers": 1}),
    ("roberta", "meft3", {"layers": 10}),
    ("roberta", "full+momentum", {"gamma": 0.125}),
    ("bart", "full", {}),
    ("bart", "lora+momentum", {"dtype": HALF}),
    ("bart", "momentum", {}),
    ("bart", "meft3", {"batch_size": 3}),
    ("opt", "full", {"attn_implementation": "eager"}),
    ("opt", "lora+checkpointing", {"dtype": HALF, "batch_size": 4, "layers": 8}),
    ("opt", "lora+offload", {"dtype": HALF}),
    ("opt", "lora+momentum", {}),
    ("opt", "meft1", {"arithmetic": "float"}),
    ("opt", "meft3", {"dtype": HALF}),
    ("opt", "adapter", {"dtype": HALF}),
    ("opt", "ia3", {"dtype": HALF}),
    ("opt", "bitfit+momentum", {}),
    ("llama", "full", {"dtype": HALF, "seq_len": 160, "batch_size": 1}),
    ("llama", "lora", {"dtype": HALF, "padded": True}),
    ("llama", "lora+momentum", {"dtype": HALF, "layers": 8}),
    ("llama", "lora+momentum", {"dtype": HALF, "granularity": "block", "tile_size": 32}),
    ("llama", "meft2", {"dtype": torch.float16}),
    ("llama", "momentum", {"batch_size": 5, "seq_len": 33}),
    ("gpt2", "full", {}),
    ("gpt2", "lora", {"dtype": HALF}),
    ("gpt2", "meft1", {"padded": True}),
    ("gpt2", "momentum", dict(MIXED)),
    ("vit", "full", {"batch_size": 3}),
    ("vit", "lora", {"dtype": HALF}),
    ("vit", "momentum", {"layers": 8}),
]
# An eighth of the tokens a tile, as in long steps; without the fused loss, whose gradient is not seen in float32.
PLAIN: dict[str, Any] = {"tile_size": 24, "fused_loss": False}
STAGES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "lora+momentum", {**PLAIN, "layers": 8}),
    ("llama", "lora+momentum", {"tile_size": 24, "dtype": HALF}),
    ("llama", "lora+momentum", {**PLAIN, "padded": True, "gamma": 0.25}),
    ("llama", "lora+momentum", {**PLAIN, "attn_implementation": "eager"}),
    ("llama", "lora+momentum", {"batch_size": 1, "seq_len": 1024, "dtype": HALF}),
    ("llama", "full+momentum", {**PLAIN, **MIXED}),
    ("llama", "meft1", PLAIN),
    ("llama", "meft2", {**PLAIN, "tile_size": 50, "batch_size": 3}),
    ("llama", "momentum", {**PLAIN, "frozen_layers": 1, "cached_layers": 1}),
    ("gpt2", "lora+momentum", PLAIN),
    ("bert", "lora+momentum", {"tile_size": 24}),
    ("bert", "meft1", {"tile_size": 24, "padded": True}),
]
SLOW: list[tuple[str, str, dict[str, Any]]] = [
    (family, method, {"dtype": dtype, "layers": 7, "batch_size": 4})
    for family in TASKS
    for method in ("full", "full+checkpointing", "lora", "lora+checkpointing", "lora+momentum", "meft1", "momentum")
    for dtype in (torch.float32, HALF)
    # At these sizes the workspace of oneDNN's bfloat16 weight gradients, which is not seen, is up to 7% of this peak.
    if (method, dtype) != ("full+checkpointing", HALF)
]


def name(case: tuple[str, str, dict[str, Any]]) -> str:
    family, method, options = case
    return "-".join([family, method, *(f"{key}={value}".replace("torch.", "") for key, value in options.items())])


def compare(family: str, method: str, options: dict[str, Any]) -> tuple[MemoryEstimate, MemoryReport]:
    """The estimate of a step, and the real one measured."""
    shape = {key: options[key] for key in ("layers", "dropout") if key in options}
    rest = {"batch_size": 2, "seq_len": 96, "dtype": torch.float32, **options}
    predicted = estimate(
        small_config(family, **shape),
        method=method,
        task_type=TASKS[family],
        device="cpu",
        **{key: value for key, value in rest.items() if key not in shape},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Float arithmetic rebuilt")
        return predicted, real_step(family, method, **options)


def check(family: str, method: str, options: dict[str, Any]) -> None:
    predicted, measured = compare(family, method, options)
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.05)
    assert predicted.activation_peak_bytes == pytest.approx(measured.activation_peak_bytes, rel=0.05)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.filterwarnings("ignore:seq_len is 1024:meft.errors.MeftWarning")  # longer than the small model's positions
@pytest.mark.parametrize("case", STAGES, ids=name)
def test_stages_within_one_percent(case: tuple[str, str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    make = layers.chain_of
    monkeypatch.setattr(layers, "chain_of", lambda *given: ran.append(case[1]) or make(*given))
    predicted, measured = compare(*case)
    assert ran
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)
    assert predicted.activation_peak_bytes == pytest.approx(measured.activation_peak_bytes, rel=0.01)


def test_enough_combinations() -> None:
    assert len({(family, method, options.get("dtype")) for family, method, options in FAST}) >= 30


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT, of GPT-2
@pytest.mark.parametrize("case", FAST, ids=name)
def test_within_five_percent(case: tuple[str, str, dict[str, Any]]) -> None:
    check(*case)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("case", SLOW, ids=name)
def test_within_five_percent_more(case: tuple[str, str, dict[str, Any]]) -> None:
    check(*case)
