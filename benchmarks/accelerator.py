"""The longest sequence that fits on an accelerator, and tokens a second, by method."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from measuring import Progress, quiet
from peers import Peer
from shapes import llama_3_1_8b, llama_3_2_3b, small_llama
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "Llama-3.2-3B": llama_3_2_3b,
    "Llama-3.1-8B": llama_3_1_8b,
    "small Llama": lambda: small_llama(4096),
}
LINEAR = r".*layers\.\d+\..*\b\w+_proj"
SHORTEST, LONGEST = 512, 131072
_STEPS = 3


def why_not(budget: int) -> str | None:
    """Why nothing can be run here, or None."""
    if not torch.cuda.is_available():
        return "not run: there is no CUDA device here."
    free, total = torch.cuda.mem_get_info()
    if free < budget:
        return f"not run: {free / 2**30:.0f} GiB of {total / 2**30:.0f} GiB are free, {budget / 2**30:.0f} are needed."
    return None


def longest_sequences(
    configs: Mapping[str, Callable[[], PretrainedConfig]], peers: Mapping[str, Peer], budget: int, progress: Progress
) -> list[dict[str, Any]]:
    """Finds, for every model and method, the longest sequence within `budget` bytes and the pace there."""
    device = torch.device("cuda", torch.cuda.current_device())
    _, total = torch.cuda.mem_get_info(device)
    # The allocator then refuses what a card with so much memory could not hold.
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
    rows = []
    for name, make in configs.items():
        for method, peer in peers.items():
            progress(f"{name}: {method}")
            rows.append({"model": name, "method": method, **_one(make(), peer, budget, device)})
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def longest(fits: Callable[[int], bool], low: int = SHORTEST, high: int = LONGEST) -> int | None:
    """The longest of the multiples of `low` up to `high` that fits, to about a sixteenth; None if `low` does not.

    Doubling finds a bound, halving the rest: few trials, since each is a step on the device.
    """
    if not fits(low):
        return None
    best, above = low, None
    while above is None and best < high:
        size = min(2 * best, high)
        if fits(size):
            best = size
        else:
            above = size
    while above is not None and above - best > max(low, best // 16):
        size = (best + above) // 2 // low * low
        if size in (best, above):
            break
        if fits(size):
            best = size
        else:
            above = size
    return best


def _one(config: PretrainedConfig, peer: Peer, budget: int, device: torch.device) -> dict[str, Any]:
    try:
        model, optimizer = trained(config, peer, device)
        size = longest(lambda tokens: _fits(model, optimizer, peer, tokens, budget, device))
    except torch.OutOfMemoryError:
        size = None
    if size is None:
        return {"longest_sequence": None}
    torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(_STEPS):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        take_step(model, optimizer, peer, size, device)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return {
        "longest_sequence": size,
        "max_memory_allocated": torch.cuda.max_memory_allocated(device),
        "seconds": seconds,
        "tokens_a_second": size / median(seconds),
    }


def trained(config: PretrainedConfig, peer: Peer, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    with device:
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with quiet():
        model = peer.build(base, "CAUSAL_LM", LINEAR).train().to(device)
    return model, torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])


def _fits(
    model: nn.Module, optimizer: torch.optim.Optimizer, peer: Peer, tokens: int, budget: int, device: torch.device
) -> bool:
    torch.cuda.reset_peak_memory_stats(device)
    try:
        take_step(model, optimizer, peer, tokens, device)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) <= budget
    except torch.OutOfMemoryError:
        return False
    finally:
        optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()


def take_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, peer: Peer, tokens: int, device: torch.device
) -> None:
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), device=device)  # type: ignore[arg-type,union-attr]
    with quiet():
        with peer.surroundings(device.type):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
