"""What two processes under DistributedDataParallel compute, held against one process: relative deviations."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import meft
from support import models
from support.peft_helpers import adapted

ROUNDS = 2
"""Batches of every process before a step of the optimizer."""


def meft1(**options: Any) -> nn.Module:
    return adapted("opt", "meft1", "CAUSAL_LM", **options)


def frozen(**options: Any) -> nn.Module:
    return adapted("bert", "meft1", frozen_layers=1, cached_layers=1, **options)


def lora(**options: Any) -> nn.Module:
    base = models.build("opt", "CAUSAL_LM", layers=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
    return meft.make_reversible(model, "momentum", **options).train()


def full(**options: Any) -> nn.Module:
    return meft.make_reversible(models.build("bart", "SEQ_2_SEQ_LM", layers=2), "momentum", **options)


CASES: dict[str, tuple[Callable[..., nn.Module], str, str]] = {
    "meft1": (meft1, "opt", "CAUSAL_LM"),
    "meft1, frozen and cached layers": (frozen, "bert", "SEQ_CLS"),
    "LoRA": (lora, "opt", "CAUSAL_LM"),
    "full": (full, "bart", "SEQ_2_SEQ_LM"),
}


def batches(family: str, task: str, count: int) -> list[dict[str, Tensor]]:
    """Batches with as many tokens each, so that the mean of their losses is that of all rows."""
    made = [models.batch(family, task, size=2, padding=None, seed=seed) for seed in range(count)]
    for one in made:
        # The last label of a text in BART's batches is left out of the loss.
        if task == "SEQ_2_SEQ_LM":
            one["labels"][-1, -1] = models.END
    return made


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def vector(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, f"no gradient for {missing[:3]}"
    return found


def alone(build: Callable[..., nn.Module], parts: list[dict[str, Tensor]], precision: str) -> tuple[float, Tensor]:
    """Loss and gradients of one process over all batches, with stored activations.

    In bfloat16 batch by batch, since its rounding depends on which rows stand together and on the scale of the loss.
    """
    model = build(backward="cached")
    groups, rounds = ([joined(parts)], 1) if precision == "no" else (parts, ROUNDS)
    losses = []
    for group in groups:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**group).loss
        (loss / rounds).backward()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean()), vector(gradients(model)) * rounds / len(groups)


def together(
    build: Callable[..., nn.Module], parts: list[dict[str, Tensor]], precision: str
) -> tuple[float, Tensor, float, float]:
    """Loss and gradients that every process has after accumulating its share of the batches.

    Besides, how far the processes' new weights are apart, and their gradients before the last batch.
    """
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=ROUNDS)
    model = build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(model, nn.parallel.DistributedDataParallel) and not model.find_unused_parameters
    losses, before = [], 0.0
    for part in parts[accelerator.process_index :: accelerator.num_processes]:
        with accelerator.accumulate(model):
            loss = model(**part).loss
            accelerator.backward(loss)
            losses.append(loss.detach())
            if not accelerator.sync_gradients:
                before = apart(accelerator.gather(vector(gradients(model.module))[None]))
    loss = accelerator.gather(torch.stack(losses)).mean()
    found = vector(gradients(model.module))
    optimizer.step()
    optimizer.zero_grad()
    parameters = [p.detach().flatten() for p in model.module.parameters() if p.requires_grad]
    return float(loss), found, apart(accelerator.gather(torch.cat(parameters)[None])), before


def apart(gathered: Tensor) -> float:
    """The largest difference between processes; one row for each."""
    return float((gathered - gathered[0]).abs().max())


def deviation(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape and expected.norm() > 0
    return float((actual - expected).norm() / expected.norm())


def main(findings: Path, *cases: str) -> None:
    PartialState(cpu=True)
    found: dict[str, dict[str, float]] = {}
    for name in cases:
        build, family, task = CASES[name]
        for precision in ("no", "bf16"):
            parts = batches(family, task, torch.distributed.get_world_size() * ROUNDS)
            loss, gradient, after, before = together(build, parts, precision)
            expected_loss, expected_gradient = alone(build, parts, precision)
            found[f"{name}, {precision}"] = {
                "loss": abs(loss - expected_loss) / expected_loss,
                "gradients": deviation(gradient, expected_gradient),
                "difference between processes": after,
                "difference before the last batch": before,
            }
    if torch.distributed.get_rank() == 0:
        findings.write_text(json.dumps({"processes": torch.distributed.get_world_size(), "cases": found}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
