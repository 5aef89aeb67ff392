"""Encoder-decoders: both stacks reversible, the decoder reading the encoder through cross-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from meft.backbone.conversion import layer_drop_unsaid
from meft.errors import UnsupportedModelError
from meft.loading.arguments import ModelArguments
from meft.loading.pretrained import load_pretrained
from meft.methods.registry import read_way
from meft.options import check_integer
from meft.parsing import option

from . import figures
from .base import Cell, Column, FolderArguments, Found, Request, Row, Study, Tick
from .probes import step_costs, unwarned, verified
from .report import number, ratio, size, yes_no

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VOCABULARY, WIDTH, LAYERS, HEADS = 96, 64, 4, 4
_TOKENS: Mapping[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 1, "eos_token_id": 2}
_DECODED: Mapping[str, Any] = {"decoder_start_token_id": 2, "bos_token_id": 0}
FIRST_WORD = 3
REFERENCE = "full"


@dataclass
class Grid:
    """The models and the methods."""

    _argument_group_name = "encoder-decoders"

    models: list[str] = field(
        default_factory=lambda: ["bart", "t5"],
        metadata={"help": "bart and t5 are small ones with random weights; else folders or names on the hub."},
    )
    methods: list[str] = field(
        default_factory=lambda: [REFERENCE, "lora", "lora+momentum", "meft1", "meft2", "meft3", "momentum"],
        metadata={"help": "Ways to train, as meft estimate names them."},
    )
    batch_size: int = option("Rows of the batch.", 8)
    seq_length: int = option("Tokens of a row.", 16)
    rounds: int = option("Timed steps.", 5)
    training_steps: int = option("Steps of the short training: to copy a text backwards.", 60)
    learning_rate: float = option("Of the short training.", 5e-3)

    def check(self) -> None:
        """Raises ConfigError if a value is not valid."""
        for name in ("batch_size", "rounds", "training_steps"):
            check_integer(name, getattr(self, name), 1)
        check_integer("seq_length", self.seq_length, 2)
        for method in self.methods:
            read_way(method, {})


def rows(request: Request) -> list[Row]:
    parsed = request.parsed()
    grid, seed = parsed[Grid], parsed[FolderArguments].seed
    grid.check()
    shared = {name: value for name, value in asdict(grid).items() if name not in ("models", "methods")}
    found = []
    for model in grid.models:
        name = Path(model).name
        for method in grid.methods:
            settings = {"encoder_decoder": {"model": model, "method": method, "seed": seed, **shared}}
            cell = Cell(f"{name}: {method}", settings, partial(_measure, grid, seed, model, method))
            found.append(Row({"model": name, "method": method}, (cell,)))
    return found


def _measure(grid: Grid, seed: int, model: str, method: str, tick: Tick) -> Found:
    build = partial(_trainable, seed, model)
    batch = _batch(grid, _base(model).config, seed)
    reference = None if method == REFERENCE else partial(build, REFERENCE)
    found = step_costs(build(method), batch, reference, grid.rounds)
    tick(0.3)
    coupled = read_way(method, {}).coupled
    if coupled:
        report = verified(build(method), batch)
        found |= {name: report[name] for name in ("bitwise", "gradient_error", "starting_point")}
    losses = _train(grid, build(method), batch, seed)
    tick(0.7)
    found |= {"first_loss": losses[0], "last_loss": losses[-1], "losses": losses}
    if coupled:
        stored = _train(grid, build(method, backward="cached"), batch, seed)
        found["loss_difference"] = max(abs(ours - theirs) for ours, theirs in zip(losses, stored, strict=True))
    return found


@layer_drop_unsaid()
def _trainable(seed: int, model: str, method: str, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return read_way(method, options).apply(_base(model), "SEQ_2_SEQ_LM").train()


def _base(model: str) -> PreTrainedModel:
    if model == "bart":
        side_sizes = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": 2 * WIDTH}
        sides: dict[str, Any] = {
            f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in side_sizes.items()
        }
        config = BartConfig(
            **_TOKENS, **_DECODED, **sides, d_model=WIDTH, max_position_embeddings=512, forced_eos_token_id=None
        )
        return BartForConditionalGeneration(config)
    if model == "t5":
        sizes: dict[str, Any] = {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": 2 * WIDTH, "num_heads": HEADS}
        return T5ForConditionalGeneration(T5Config(**_TOKENS, **_DECODED, **sizes, num_layers=LAYERS))
    loaded, _ = load_pretrained(ModelArguments(model), model, "SEQ_2_SEQ_LM")
    if not loaded.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{model} is no encoder-decoder. Give bart, t5, or a folder with such a model.")
    return loaded


def _batch(grid: Grid, config: PretrainedConfig, seed: int) -> dict[str, Tensor]:
    """Random texts, and the same backwards; the last row is padded by a half."""
    generator = torch.Generator().manual_seed(seed)
    shape = (grid.batch_size, grid.seq_length)
    ids = torch.randint(FIRST_WORD, min(config.vocab_size, VOCABULARY), shape, generator=generator)
    labels, mask = ids.flip(1).clone(), torch.ones_like(ids)
    half = grid.seq_length // 2
    ids[-1, half:], mask[-1, half:] = config.pad_token_id, 0
    labels[-1] = -100
    labels[-1, :half] = ids[-1, :half].flip(0)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _train(grid: Grid, model: nn.Module, batch: Mapping[str, Tensor], seed: int) -> list[float]:
    """Losses of a training on the one batch, dropout as the model has it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=grid.learning_rate)
    losses = []
    torch.manual_seed(seed)
    with unwarned():
        for _ in range(grid.training_steps):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def draw(found: Sequence[Found]) -> Figure:
    models = list(dict.fromkeys(row["model"] for row in found))
    figure = figures.new(11, 3.6 * len(models))
    grid = figure.subplots(len(models), 2, squeeze=False)
    for (memory, losses), model in zip(grid, models, strict=True):
        mine = [row for row in found if row["model"] == model]
        colours = [figures.METHOD_COLOURS.get(row["method"], figures.COLOURS[7]) for row in mine]
        names = [row["method"] for row in mine]
        figures.bars(memory, names, [row["activation_bytes"] / figures.MIB for row in mine], "{:.2f}", colours)
        memory.set_xlabel("peak of activations, MiB")
        memory.set_title(f"{model}: memory of a step", fontsize="medium")
        for index, row in enumerate(mine):
            dashed = "--" if row["method"] == "lora+momentum" else "-"
            losses.plot(row["losses"], color=colours[index], linestyle=dashed, linewidth=1.4, label=row["method"])
        losses.set_xlabel("step")
        losses.set_ylabel("loss, nats a token")
        losses.set_title(f"{model}: learning to copy a text backwards", fontsize="medium")
        losses.legend(fontsize="x-small", ncols=2)
        figures.tidy(losses)
    return figure


STUDY = Study(
    name="encoder-decoder",
    title="Encoder-decoders: memory, exactness and a short training",
    sentence="Measures BART and T5: memory, time, exactness, and a short training of every method.",
    grid=Grid,
    kind="sizes",
    rows=rows,
    columns=(
        Column("model", "model"),
        Column("method", "method"),
        Column("peak of activations", "activation_bytes", size),
        Column("time / full", "time_ratio", ratio),
        Column("streams bit-equal", "bitwise", yes_no),
        Column("error of gradients", "gradient_error", number),
        Column("first loss", "first_loss", number),
        Column("last loss", "last_loss", number),
        Column("largest difference to stored activations", "loss_difference", number),
    ),
    draw=draw,
    notes=(
        "Memory: exact peak of the live bytes of one step. Time: medians of alternating steps, as a ratio to full "
        "fine-tuning. Losses: of a training on one batch, which tells that gradients reach both stacks and no more; "
        "the last column compares each of its losses with those of the same training with stored activations.",
    ),
    quick={
        "models": ("t5",),
        "methods": (REFERENCE, "lora+momentum"),
        "batch_size": 2,
        "seq_length": 6,
        "rounds": 1,
        "training_steps": 2,
    },
)
