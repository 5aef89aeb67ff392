"""What two processes under DeepSpeed compute: ZeRO-2 against one process, and what ZeRO-3 is refused with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
from ddp_worker import CASES, ROUNDS, alone, batches, deviation, vector
from torch import Tensor, nn

import meft


def started(model: nn.Module, stage: int) -> nn.Module:
    """An engine whose step takes the gradients of ROUNDS batches from the weights, as they are."""
    options = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ROUNDS,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=options)[0]


def weights(model: nn.Module) -> Tensor:
    return vector({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})


def main(findings: Path, *cases: str) -> None:
    deepspeed.init_distributed("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: dict[str, dict[str, float]] = {}
    refused: dict[str, str] = {}
    for name in cases:
        build, family, task = CASES[name]
        parts = batches(family, task, world * ROUNDS)
        model = build()
        before = weights(model)
        engine = started(model, 2)
        for part in parts[rank::world]:
            engine.backward(engine(**part).loss)
            engine.step()
        found[name] = {"gradients": deviation(before - weights(model), alone(build, parts, "no")[1])}
        engine = started(build(), 3)
        try:
            engine(**parts[0])
        except meft.MeftError as error:
            refused[name] = f"{type(error).__name__}: {error}"
    if rank == 0:
        findings.write_text(json.dumps({"equality": found, "refused": refused}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
