"""What two processes under FSDP2 compute, held against one process, and what is refused."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from ddp_worker import CASES, ROUNDS, alone, batches, deviation, vector
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import meft
from meft.backbone.layers import ReversibleLayer
from support import models

Batch = dict[str, Tensor]


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    """Every reversible layer a unit, and the rest of the model one."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in model.modules():
        if isinstance(module, ReversibleLayer):
            fully_shard(module, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def whole(model: nn.Module, **options: Any) -> nn.Module:
    """The model as a single unit."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)), **options)


def mine(parts: list[Batch]) -> list[Batch]:
    return parts[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def full_gradients(model: nn.Module) -> Tensor:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, p in trained.items() if p.grad is None]
    assert not missing, f"no gradient for {missing[:3]}"
    return vector({name: p.grad.full_tensor() for name, p in trained.items()})


def accumulated(model: nn.Module, parts: list[Batch], precision: str = "no") -> tuple[float, Tensor]:
    """Loss and gradients of all processes' batches, reduced with the last batch of each only."""
    losses = []
    for index, part in enumerate(mine(parts)):
        model.set_requires_gradient_sync(index == ROUNDS - 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**part).loss
        (loss / ROUNDS).backward()
        losses.append(loss.detach())
    mean = torch.stack(losses).mean()
    torch.distributed.all_reduce(mean)
    return float(mean) / torch.distributed.get_world_size(), full_gradients(model)


def compared(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> dict[str, float]:
    return {"loss": abs(found[0] - expected[0]) / expected[0], "gradients": deviation(found[1], expected[1])}


def equality(cases: list[str]) -> dict[str, dict[str, float]]:
    """The loss and the gradients of two processes against those of one, with stored activations."""
    found, world = {}, torch.distributed.get_world_size()
    for name in cases:
        build, family, task = CASES[name]
        parts = batches(family, task, world * ROUNDS)
        for precision in ("no", "bf16"):
            # A sharded head makes its logits whole, and in bfloat16 their gradients round otherwise than in tiles.
            expected = alone(partial(build, fused_loss=False), parts, precision)
            found[f"{name}, {precision}"] = compared(accumulated(sharded(build()), parts, precision), expected)
        kept = sharded(build(), reshard_after_forward=False)
        found[f"{name}, not resharded"] = compared(accumulated(kept, parts), alone(build, parts, "no"))
        found[f"{name}, one unit"] = compared(accumulated(whole(build()), parts), alone(build, parts, "no"))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        stored = accumulated(sharded(build(backward="cached"), mp_policy=policy), parts)
        found[f"{name}, bfloat16 weights"] = compared(accumulated(sharded(build(), mp_policy=policy), parts), stored)
    return found


class Counting(TorchDispatchMode):
    """Counts what is sent between processes within, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def collectives(cases: list[str]) -> dict[str, list[dict[str, int]]]:
    """How often a second step of training gathers and reduces, rebuilding activations and storing them."""
    found = {}
    for name in cases:
        build, family, task = CASES[name]
        part = mine(batches(family, task, torch.distributed.get_world_size()))[0]
        counts = []
        for backward in ("reversible", "cached"):
            model = sharded(build(backward=backward))
            model(**part).loss.backward()
            with Counting() as counting:
                model(**part).loss.backward()
            counts.append(dict(counting.counts))
        found[name] = counts
    return found


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, parts: list[Batch]) -> list[float]:
    losses = []
    for part in mine(parts):
        loss = model(**part).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def resuming(cases: list[str], folder: Path) -> dict[str, Any]:
    """A run that is saved in shards after two steps and gone on with by another model, and the weights for one process.

    The weights of what is trained go into an ordinary model of one process as well.
    """
    found, world = {}, torch.distributed.get_world_size()
    for name in cases:
        build, family, task = CASES[name]
        parts, place = batches(family, task, 4 * world), folder / f"resumed {name}"
        model = sharded(build())
        optimizer = optimizer_of(model)
        trained(model, optimizer, parts[: 2 * world])
        weights, state = get_state_dict(model, optimizer)
        checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=place)
        expected = trained(model, optimizer, parts[2 * world :])
        other = sharded(build())
        second = optimizer_of(other)
        weights, state = get_state_dict(other, second)
        checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=place)
        set_state_dict(other, second, model_state_dict=weights, optim_state_dict=state)
        losses = trained(other, second, parts[2 * world :])
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        together = get_model_state_dict(other, options=options)
        torch.distributed.barrier()
        single = build(backward="cached").eval()
        if torch.distributed.get_rank() == 0:
            single.load_state_dict(together)
        one, all_of_them = single(**parts[0]).loss, other.eval()(**parts[0]).loss
        found[name] = {
            "losses": [expected, losses],
            "in one process": abs(float(one) - float(all_of_them)) / float(one),
            "files": len(list(place.glob("*.distcp"))),
        }
    return found


def by_accelerate(cases: list[str], folder: Path) -> dict[str, dict[str, float]]:
    """The configuration file, as accelerate carries it out: which modules become units, and a step with them.

    Accelerate turns FSDP on for accelerators only, so on the CPU its state is told.
    """
    found = {}
    for name in cases:
        build, family, task = CASES[name]
        if family != "opt":
            continue  # accelerate shards the embeddings of BERT and BART twice, whoever trains these models
        parts = batches(family, task, torch.distributed.get_world_size())
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2, "the configuration file was not read"
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        model = build()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        loss = model(**mine(parts)[0]).loss
        accelerator.backward(loss)
        mean = accelerator.gather(loss.detach()[None]).mean()
        expected = alone(build, parts, "no")
        layers = [module for module in model.modules() if isinstance(module, ReversibleLayer)]
        found[name] = compared((float(mean), full_gradients(model)), expected) | {
            "layers that are units": sum(isinstance(layer, FSDPModule) for layer in layers) / len(layers),
            "weights that are shards": sum(isinstance(p, DTensor) for p in model.parameters())
            / len(list(model.parameters())),
        }
        optimizer.step()
        accelerator.save_state(str(folder / f"state {name}"))
        before = vector({n: p.full_tensor().detach().clone() for n, p in model.named_parameters() if p.requires_grad})
        optimizer.step()
        accelerator.load_state(str(folder / f"state {name}"))
        after = vector({n: p.full_tensor().detach() for n, p in model.named_parameters() if p.requires_grad})
        found[name]["after loading"] = deviation(after, before)
        found[name]["adapter in one process"] = saved_and_loaded(
            accelerator, model, parts[0], folder / f"adapter {name}"
        )
    return found


def saved_and_loaded(accelerator: Accelerator, model: nn.Module, batch: Batch, place: Path) -> float:
    """Saves the adapter as the Trainer does, and tells how far it is off when one process loads it."""
    accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    gathered = accelerator.get_state_dict(model)
    with torch.no_grad():
        expected = float(model.eval()(**batch).loss)
    if not accelerator.is_main_process:
        return 0.0
    model.save_pretrained(place, state_dict=gathered)
    loaded = PeftModel.from_pretrained(models.build("opt", "CAUSAL_LM", layers=3), place)
    if not isinstance(loaded.base_model, meft.MeftModel):
        meft.make_reversible(loaded)
    with torch.no_grad():
        return abs(float(loaded.eval()(**batch).loss) - expected) / expected


def refusals() -> dict[str, str]:
    """What each way to shard a model wrongly raises."""

    def inside(model: nn.Module, name: str) -> nn.Module:
        for path, module in list(model.named_modules()):
            if path.endswith(name):
                fully_shard(module)
        return sharded(model)

    def flat(model: nn.Module, **options: Any) -> nn.Module:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)

    def sharded_first(model: nn.Module) -> nn.Module:
        return meft.make_reversible(sharded(meft.restore(model)))

    found = {}
    meft1, lora = CASES["meft1"], CASES["LoRA"]
    attempts: dict[str, tuple[tuple[Callable[..., nn.Module], str, str], Callable[[nn.Module], nn.Module]]] = {
        "pretrained layer": (meft1, lambda model: inside(model, "base_layer")),
        "attention": (lora, lambda model: inside(model, "self_attn")),
        "FSDP1": (lora, lambda model: flat(model, use_orig_params=True)),
        "FSDP1, flat": (CASES["full"], lambda model: flat(model, use_orig_params=False)),
        "conversion afterwards": (lora, sharded_first),
        "restoring": (lora, lambda model: meft.restore(sharded(model))),
        "another adapter": (meft1, lambda model: sharded(model).add_adapter("other", model.peft_config["default"])),
    }
    for name, ((build, family, task), attempt) in attempts.items():
        try:
            attempt(build())(**batches(family, task, 1)[0])
        except meft.MeftError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main(findings: Path, *cases: str) -> None:
    PartialState(cpu=True)
    found = {
        "equality": equality(list(cases)),
        "collectives": collectives(list(cases)),
        "resuming": resuming(list(cases), findings.parent),
        "refusals": refusals(),
        "accelerate": by_accelerate(list(cases), findings.parent),
    }
    if torch.distributed.get_rank() == 0:
        findings.write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
