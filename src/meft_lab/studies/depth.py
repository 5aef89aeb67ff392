"""Depth: what a deep stack costs in memory and time, and what of its activations is rebuilt rightly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from meft.methods.registry import read_way
from meft.options import check_integer
from meft.parsing import option

from . import figures
from .base import Cell, Column, FolderArguments, Found, Request, Row, Study, Tick
from .probes import step_costs, verified
from .report import number, ratio, size, yes_no

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VOCABULARY, HEADS = 256, 4
REFERENCE = "full"


@dataclass
class Grid:
    """The shapes and the methods."""

    _argument_group_name = "depth"

    depths: list[int] = field(default_factory=lambda: [12, 24, 48, 96], metadata={"help": "Layers."})
    methods: list[str] = field(
        default_factory=lambda: [REFERENCE, "lora", "lora+checkpointing", "lora+momentum", "meft1", "meft2", "meft3"],
        metadata={"help": "Ways to train, as meft estimate names them."},
    )
    width: int = option(f"Width of the hidden state, a multiple of {2 * HEADS}.", 64)
    batch_size: int = option("Rows of the batch.", 2)
    seq_length: int = option("Tokens of a row.", 64)
    rounds: int = option("Timed steps.", 3)

    def check(self) -> None:
        """Raises ConfigError if a value is not valid."""
        for depth in self.depths:
            check_integer("depths", depth, 1)
        for name in ("batch_size", "rounds"):
            check_integer(name, getattr(self, name), 1)
        check_integer("seq_length", self.seq_length, 2)
        check_integer("width", self.width, 2 * HEADS)
        for method in self.methods:
            read_way(method, {})


def rows(request: Request) -> list[Row]:
    parsed = request.parsed()
    grid, seed = parsed[Grid], parsed[FolderArguments].seed
    grid.check()
    shared = {name: value for name, value in asdict(grid).items() if name not in ("depths", "methods")}
    found = []
    for depth in grid.depths:
        for method in grid.methods:
            values = {"layers": depth, "method": method}
            settings = {"depth": values | shared | {"seed": seed}}
            run = partial(_measure, grid, seed, depth, method)
            found.append(Row(values, (Cell(f"{depth} layers: {method}", settings, run),)))
    return found


def _measure(grid: Grid, seed: int, depth: int, method: str, tick: Tick) -> Found:
    batch = _batch(grid, seed)
    coupled = read_way(method, {}).coupled
    reference = None if method == REFERENCE else lambda: _trainable(grid, seed, depth, REFERENCE)
    found = step_costs(_trainable(grid, seed, depth, method), batch, reference, grid.rounds)
    tick(0.5)
    if not coupled:
        return found
    exact = verified(_trainable(grid, seed, depth, method), batch)
    tick(0.75)
    drifted = verified(_trainable(grid, seed, depth, method, arithmetic="float"), batch)
    return {
        **found,
        "bitwise": exact["bitwise"],
        "gradient_error": exact["gradient_error"],
        "float_reconstruction_error": drifted["reconstruction_error"],
        "float_gradient_error": drifted["gradient_error"],
    }


def _trainable(grid: Grid, seed: int, depth: int, method: str, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=grid.width,
        intermediate_size=3 * grid.width,
        num_hidden_layers=depth,
        num_attention_heads=HEADS,
        max_position_embeddings=grid.seq_length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return read_way(method, options).apply(LlamaForCausalLM(config), "CAUSAL_LM").train()


def _batch(grid: Grid, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (grid.batch_size, grid.seq_length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def draw(found: Sequence[Found]) -> Figure:
    figure = figures.new(13.5, 4.4)
    memory, time, error = figure.subplots(1, 3)
    for index, method in enumerate(dict.fromkeys(row["method"] for row in found)):
        mine = [row for row in found if row["method"] == method]
        depths = [row["layers"] for row in mine]
        style: dict[str, Any] = {
            "color": figures.METHOD_COLOURS.get(method, figures.COLOURS[index % 8]),
            "marker": figures.MARKERS[index % 8],
            "label": method,
        }
        memory.loglog(depths, [row["activation_bytes"] / figures.MIB for row in mine], **style)
        time.semilogx(depths, [row["time_ratio"] for row in mine], **style)
        if "float_reconstruction_error" in mine[0]:
            heights = [_ceiled(row["float_reconstruction_error"]) for row in mine]
            error.loglog(depths, heights, **{**style, "label": f"{method}, float"})
    exact = [row for row in found if row.get("bitwise")]
    error.plot(
        [row["layers"] for row in exact], [FLOOR] * len(exact), "*", color="black", label="exact: 0, bit for bit"
    )
    memory.set_ylabel("peak of activations, MiB")
    time.set_ylabel("time of a step / full fine-tuning")
    error.set_ylabel(f"relative error of rebuilt streams, at most {CEILING:g}")
    ticks = sorted({row["layers"] for row in found})
    for axes, title in ((memory, "Memory"), (time, "Time"), (error, "Exactness, float32")):
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("layers")
        axes.set_title(title, fontsize="medium")
        figures.tidy(axes)
    error.legend(fontsize="small")
    handles, labels = memory.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small", frameon=False)
    return figure


CEILING, FLOOR = 1e6, 1e-9


def _ceiled(value: float | None) -> float:
    return CEILING if value is None else min(max(value, FLOOR), CEILING)


STUDY = Study(
    name="depth",
    title="Depth: memory, time and exactness",
    sentence="Measures memory, time and exactness of random narrow decoders of 12 to 96 layers.",
    grid=Grid,
    kind="sizes",
    rows=rows,
    columns=(
        Column("layers", "layers", str),
        Column("method", "method"),
        Column("peak of activations", "activation_bytes", size),
        Column("time / full", "time_ratio", ratio),
        Column("exact: streams bit-equal", "bitwise", yes_no),
        Column("exact: error of gradients", "gradient_error", number),
        Column("float: error of streams", "float_reconstruction_error", number),
        Column("float: error of gradients", "float_gradient_error", number),
    ),
    draw=draw,
    notes=(
        "Random Llama in float32. Memory: exact peak of the live bytes of one step, gradients of weights left out. "
        "Time: medians of alternating steps in one process, as a ratio to full fine-tuning. Errors: largest relative "
        "error of the rebuilt streams of any layer, and of the gradient of any parameter, by `meft.verify`. Layers "
        "this narrow spend most of a step in calls rather than in arithmetic, so that ratios of times are larger than "
        "those of models in use.",
    ),
    quick={"depths": (2, 3), "methods": (REFERENCE, "meft1"), "width": 16, "seq_length": 8, "rounds": 1},
)
