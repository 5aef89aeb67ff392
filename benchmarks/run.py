"""Peak activation memory and step time of every way to fine-tune, on one BERT with random weights.

    python benchmarks/run.py                # 12 layers x 256, 8 sequences of 128 tokens
    python benchmarks/run.py --quick        # 4 layers x 64, a few seconds, to see that everything runs

One process holds all models. Memory is that of one forward and backward pass, measured by `meft.measure` with the
gradients of the weights set apart; the same in every run. Time is the median over rounds in which every method
takes one step, each round beginning with another method, so that other load on the machine falls on all alike. Only
ratios within a run mean anything, and those of a busy machine little: the result names its load.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peers import PEERS, Shape, batch_of
from torch import nn

from meft import measure
from meft.methods import count_parameters
from meft.results import hardware, versions
from meft.storage import write_json, write_text

RESULTS = Path(__file__).parent / "results"
REFERENCES = ("full", "lora+checkpointing")
MIB = 2**20


@dataclass(frozen=True)
class Measurement:
    """What one method costs; bytes and seconds of a forward and backward pass."""

    trainable_parameters: int
    peak_activation_bytes: int
    peak_bytes: int
    gradient_bytes: int
    step_seconds: float


def main() -> None:
    arguments = parse()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    shape = Shape(arguments.layers, arguments.width, arguments.sequence, arguments.batch, arguments.dtype)
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    measured = compare(shape, arguments.methods, arguments.steps)
    result = {
        "shape": asdict(shape),
        "steps": arguments.steps,
        "command": f"python {shlex.join(sys.argv)}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware() | {"load_before": load},
        "versions": versions(),
        "methods": {name: asdict(measurement) for name, measurement in measured.items()},
    }
    text = as_markdown(result, measured)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / f"{shape}.json", result)
    write_text(arguments.output / f"{shape}.md", text)
    print(text)
    print(f"Written to {arguments.output / str(shape)}.json and .md")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape and few steps, unless given as well")
    parser.add_argument("--layers", type=int, help="number of layers (12; quick: 4)")
    parser.add_argument("--width", type=int, help="hidden size, a multiple of 64 (256; quick: 64)")
    parser.add_argument("--sequence", type=int, help="tokens a sequence (128; quick: 32)")
    parser.add_argument("--batch", type=int, help="sequences a batch (8; quick: 4)")
    parser.add_argument("--steps", type=int, help="timed steps of each method (15; quick: 3)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (its own choice)")
    parser.add_argument(
        "--methods", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="METHOD", help=", ".join(PEERS)
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"folder of the result files ({RESULTS.name})")
    arguments = parser.parse_args()
    usual = {"layers": (12, 4), "width": (256, 64), "sequence": (128, 32), "batch": (8, 4), "steps": (15, 3)}
    for name, (full, quick) in usual.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else full)
        elif getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be at least 1.")
    if arguments.width % 64 and arguments.width > 64:
        parser.error(f"--width is {arguments.width}; it must be a multiple of 64, the width of an attention head.")
    return arguments


def compare(shape: Shape, methods: list[str], steps: int) -> dict[str, Measurement]:
    batch = batch_of(shape)
    models = {name: PEERS[name](shape).train() for name in methods}

    def step_of(model: nn.Module) -> Callable[[], None]:
        return lambda: model(**batch).loss.backward()

    reports = {}
    for name, model in models.items():
        seconds_of(step_of(model), model)  # a first step allocates what later ones find ready
        model.zero_grad()
        reports[name] = measure(step_of(model), model=model)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(steps):
        first = turn % len(methods)
        for name in methods[first:] + methods[:first]:
            seconds[name].append(seconds_of(step_of(models[name]), models[name]))
    return {
        name: Measurement(
            trainable_parameters=count_parameters(model)[0],
            peak_activation_bytes=reports[name].activation_peak_bytes,
            peak_bytes=reports[name].peak_bytes,
            gradient_bytes=reports[name].gradient_bytes,
            step_seconds=median(seconds[name]),
        )
        for name, model in models.items()
    }


def seconds_of(step: Callable[[], None], model: nn.Module) -> float:
    model.zero_grad()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def as_markdown(result: dict[str, Any], measured: dict[str, Measurement]) -> str:
    references = [name for name in REFERENCES if name in measured]
    header = ["method", "trainable parameters", "peak activations, MiB"]
    header += [f"of {name}" for name in references]
    header += ["with gradients, MiB", "step, ms", *(f"against {name}" for name in references)]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, found in measured.items():
        memory = [f"{found.peak_activation_bytes / measured[other].peak_activation_bytes:.1%}" for other in references]
        times = [f"{found.step_seconds / measured[other].step_seconds:.2f}" for other in references]
        activations, peak = f"{found.peak_activation_bytes / MIB:.2f}", f"{found.peak_bytes / MIB:.2f}"
        milliseconds = f"{found.step_seconds * 1000:.1f}"
        rows.append([name, f"{found.trainable_parameters:,}", activations, *memory, peak, milliseconds, *times])
    shape, machine = result["shape"], result["hardware"]
    lines = [
        f"# BERT, {shape['layers']} layers x {shape['width']}, {shape['batch']} sequences of {shape['sequence']} "
        f"tokens, {shape['dtype']}",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "Peak of live bytes during a forward and backward pass above what was live before it; gradients of the weights "
        f"set apart in the first column. Times: medians of {result['steps']} alternating steps in one process.",
        "",
        f"- command: `{result['command']}`",
        f"- date: {result['date']}",
        f"- hardware: {', '.join(f'{name} {value}' for name, value in machine.items())}",
        f"- versions: {', '.join(f'{name} {value}' for name, value in result['versions'].items())}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
