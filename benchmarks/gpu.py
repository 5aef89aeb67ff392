"""What a step costs on an accelerator: python benchmarks/gpu.py [--output FILE] [--budget SECONDS] [--small].

Parts run one after the other, and the file is written after each, so that it is whole even where the time is up. With
--small everything runs on small shapes, on a processor as well: that shows that the script works, and nothing else.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from accelerator import longest
from measuring import in_turn, quiet
from peers import CHECKPOINTING, LORA, OFFLOAD, PEERS, Peer
from peft import LoraConfig, get_peft_model
from shapes import llama_3_2_3b, small_llama
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from meft import make_reversible
from meft.engine.couplings import Step
from meft.errors import MeftError
from meft.storage.files import write_json
from meft.storage.results import provenance

OURS, RANK = "LoRA on momentum", 32
LINEAR = r".*layers\.\d+\..*\b\w+_proj"
PUBLISHED = {LORA: {"gib": 20.8, "tokens_a_second": 3597}, CHECKPOINTING: {"gib": 12.6, "tokens_a_second": 2614}}
"""PEFT's own figures for its benchmark's shape (Llama-3.2-3B, 4 x 768, rank 32, bfloat16)."""
COUPLING = "meft coupling"


class Bench:
    """The shapes of a run, and the steps that its parts take."""

    def __init__(self, *, small: bool, device: torch.device) -> None:
        self.small, self.device = small, device
        self.batch, self.sequence = (2, 24) if small else (4, 768)
        self.rounds, self.steps = (2, 4) if small else (8, 1000)

    def config(self) -> PretrainedConfig:
        return small_llama(256) if self.small else llama_3_2_3b()

    def model(self, peer: Peer, *, compiled: bool = False, dropout: float = 0.0) -> tuple[nn.Module, Any]:
        """A model with random weights of the true shape, and its optimizer."""
        torch.manual_seed(0)
        config: Any = self.config()
        config.attention_dropout = dropout
        with self.device:
            base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with quiet():
            model = peer.build(base, "CAUSAL_LM", LINEAR).train().to(self.device)
        if compiled:
            base.compile()
        return model, torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])

    def step(self, model: Any, optimizer: Any, peer: Peer, ids: Tensor, **more: Tensor) -> float:
        """Takes one step and returns its seconds."""
        self.wait()
        begun = time.perf_counter()
        with quiet():
            with peer.surroundings(self.device.type):
                loss = model(input_ids=ids, labels=ids, **more).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        self.wait()
        return time.perf_counter() - begun

    def ids(self, batch: int | None = None, sequence: int | None = None) -> Tensor:
        shape = (batch or self.batch, sequence or self.sequence)
        return torch.randint(3, self.config().vocab_size, shape, device=self.device)

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)

    def peak(self) -> int | None:
        return None if self.device.type != "cuda" else torch.cuda.max_memory_allocated(self.device)

    def forget(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def lora(model: PreTrainedModel, task: str, linear: str) -> Any:
    config = LoraConfig(task_type=task, r=RANK, lora_alpha=RANK, target_modules=linear)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def momentum(model: PreTrainedModel, task: str, linear: str) -> Any:
    return make_reversible(lora(model, task, linear), coupling="momentum")


METHODS: dict[str, tuple[Peer, bool]] = {
    LORA: (Peer(lora), False),
    CHECKPOINTING: (PEERS[CHECKPOINTING], False),
    f"{CHECKPOINTING}, compiled": (PEERS[CHECKPOINTING], True),
    OFFLOAD: (PEERS[OFFLOAD], False),
    OURS: (Peer(momentum), False),
    f"{OURS}, residues on the host": (Peer(momentum, offloads=True), False),
}


def steps_of_peers(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Step time, tokens a second and peak, at the shape of PEFT's public benchmark; a method's steps in a row."""
    ids = bench.ids()
    model, optimizer = nn.Module(), None
    for name, (peer, compiled) in METHODS.items():
        bench.forget()
        try:
            model, optimizer = bench.model(peer, compiled=compiled and not bench.small)
            seconds = [bench.step(model, optimizer, peer, ids) for _ in range(bench.rounds + 2)][2:]
            row: dict[str, Any] = {
                "seconds": seconds,
                "tokens_a_second": ids.numel() / median(seconds),
                "peak": bench.peak(),
            }
        except torch.OutOfMemoryError as error:
            row = {"failed": str(error).splitlines()[0]}
        yield name, {**row, "published": PUBLISHED.get(name)}
        model, optimizer = nn.Module(), None


def step_ratio(bench: Bench) -> Iterator[tuple[str, Any]]:
    """A step against LoRA with checkpointing: the median of alternating steps in one process."""
    names, times, ids = (CHECKPOINTING, OURS), dict[str, list[float]](), bench.ids()
    made = {name: bench.model(METHODS[name][0]) for name in names}
    for name in in_turn(names, bench.rounds):
        model, optimizer = made[name]
        times.setdefault(name, []).append(bench.step(model, optimizer, METHODS[name][0], ids))
    yield "ratio", median(times[OURS][1:]) / median(times[CHECKPOINTING][1:])


@contextmanager
def marked() -> Iterator[None]:
    """Lets a profiler see which work is the coupling's."""

    def within(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            with record_function(COUPLING):
                return function(*args, **keywords)

        return call

    with (
        mock.patch.object(Step, "forward", within(Step.forward)),
        mock.patch.object(Step, "inverse", within(Step.inverse)),
    ):
        yield


def coupling_share(bench: Bench) -> Iterator[tuple[str, Any]]:
    """The share of coupling and its inverse in the device's time of a step."""
    peer, ids = METHODS[OURS][0], bench.ids()
    model, optimizer = bench.model(peer)
    bench.step(model, optimizer, peer, ids)
    cpu = bench.device.type == "cpu"
    with profile(activities=[ProfilerActivity.CPU, *([] if cpu else [ProfilerActivity.CUDA])]) as profiled, marked():
        bench.step(model, optimizer, peer, ids)
    events = profiled.key_averages()
    kind = "cpu_time_total" if cpu else "device_time_total"
    own = "self_cpu_time_total" if cpu else "self_device_time_total"
    coupling = sum(getattr(event, kind) for event in events if event.key == COUPLING)
    yield "share", coupling / sum(getattr(event, own) for event in events if cpu or event.key != COUPLING)


def longest_sequence(bench: Bench) -> Iterator[tuple[str, Any]]:
    """The longest sequence of one row that fits; on a processor, whatever is tried."""
    low, high = (16, 64) if bench.small else (512, 131072)
    for name in (CHECKPOINTING, OURS):
        bench.forget()
        model, optimizer = bench.model(METHODS[name][0])

        def fits(tokens: int, model: Any = model, optimizer: Any = optimizer, peer: Peer = METHODS[name][0]) -> bool:
            try:
                bench.step(model, optimizer, peer, bench.ids(1, tokens))
                return True
            except torch.OutOfMemoryError:
                return False
            finally:
                bench.forget()

        yield name, longest(fits, low, high)
        del model, optimizer, fits


def no_wrong_bit(bench: Bench) -> Iterator[tuple[str, Any]]:
    """Many steps with dropout and packed rows: every one is checked, and a wrong bit raises."""
    peer = METHODS[OURS][0]
    model, optimizer = bench.model(peer, dropout=0.1)
    length = bench.sequence // 3
    positions = torch.arange(bench.sequence, device=bench.device).remainder(length).expand(1, -1)
    for done in range(1, bench.steps + 1):
        try:
            bench.step(model, optimizer, peer, bench.ids(1), position_ids=positions)
        except MeftError as error:
            yield "stopped", f"step {done}: {type(error).__name__}: {error}"
            return
        if done == bench.steps or done % 50 == 0:
            yield "steps without a wrong bit", done


PARTS: dict[str, Callable[[Bench], Iterator[tuple[str, Any]]]] = {
    "PEFT's public shape": steps_of_peers,
    "step against LoRA + checkpointing": step_ratio,
    "coupling": coupling_share,
    "longest sequence": longest_sequence,
    "dropout and packing": no_wrong_bit,
}


def main(words: list[str] | None = None) -> int:
    """Runs all parts that the time is enough for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds after which nothing new is begun")
    parser.add_argument("--small", action="store_true", help="small shapes, to see that the script runs")
    given = parser.parse_args(words)
    if not torch.cuda.is_available() and not given.small:
        print("There is no CUDA device here, so that there is nothing to measure. --small shows that the script runs.")
        return 2
    end = time.monotonic() + given.budget
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(small=given.small, device=device)
    command = shlex.join(["python", "benchmarks/gpu.py", *(sys.argv[1:] if words is None else words)])
    found: dict[str, Any] = {**provenance(command), "small": given.small, "device": str(device), "parts": {}}
    for part, run in PARTS.items():
        rows = found["parts"].setdefault(part, {})
        bench.forget()
        try:
            for name, value in run(bench) if time.monotonic() < end else ():
                rows[name] = value
                print(f"{part}: {name}: {value}")
                write_json(given.output, found)
                if time.monotonic() >= end:
                    rows["cut off"] = "the time was up"
                    break
        except Exception as error:  # one part that fails leaves the others
            rows["failed"] = f"{type(error).__name__}: {error}"[:500]
        if not rows:
            rows["cut off"] = "the time was up before it began"
    write_json(given.output, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
