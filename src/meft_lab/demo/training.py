"""How `meft demo` trains: every method in turn, one step each, on the same batches.

All see the same batches in the same order with the same dropout seeds, and the times of their steps are those of the
same minutes, so that a ratio of medians means something. Training runs on the CPU, where the peak of the memory can be
counted exactly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from meft.errors import ConfigError
from meft.loading.arguments import ModelArguments
from meft.loading.models import load_tokenizer, read_model
from meft.memory.measurement.measure import measure
from meft.methods.registry import Way, count_parameters, read_way
from meft.verification.deployment import uncoupled
from meft_lab.tasks.docstrings import Docstrings, Example

# The best of a few tried for each method, over the default number of steps, on texts that the demo does not score.
LEARNING_RATES = {
    "full": 3e-4,
    "lora": 5e-3,
    "ia3": 5e-3,
    "bitfit": 2e-3,
    "adapter": 5e-3,
    "meft1": 5e-3,
    "meft2": 5e-3,
    "meft3": 5e-3,
    "momentum": 5e-3,
}
# The packaged model was trained with the mean of its last states, so the pooler in its checkpoint is a leftover that
# has never seen a task: it belongs to the head, which every method trains in full.
HEAD = ("pooler", "classifier")
WARMUP = 0.1  # share of the steps


@dataclass(frozen=True)
class Settings:
    """What all methods share: number of steps, texts a step, tokens a text, and the seed of everything random."""

    steps: int = 50
    batch_size: int = 16
    max_length: int = 48
    seed: int = 0


@dataclass
class Entrant:
    """One method with its model, and what was seen of it."""

    way: Way
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    correct: int = 0
    correct_deployed: int | None = None
    peak_activation_causes: dict[str, int] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return self.way.name


def units(task: Docstrings, settings: Settings, methods: Sequence[str]) -> int:
    """How often `compete` advances its bar: for every step, every scored batch, every measurement."""
    return len(methods) * (settings.steps + math.ceil(len(task.validation) / settings.batch_size) + 1)


def compete(
    pretrained: Path, task: Docstrings, settings: Settings, methods: Sequence[str], progress: Progress
) -> list[Entrant]:
    """Trains, scores and measures every method, advancing the one bar of `progress` as `units` says.

    Reseeds the global generator, so the caller sets that aside.
    """
    (bar,) = progress.task_ids
    train, validation = (_encode(pretrained, rows, settings) for rows in (task.train, task.validation))
    entrants = [_enter(method, pretrained, task, settings) for method in methods]
    for step, rows in enumerate(_batches(len(task.train), settings)):
        batch = _take(train, rows)
        # Whoever goes first meets a colder cache, so the order changes with every step.
        first = step % len(entrants)
        for entrant in entrants[first:] + entrants[:first]:
            progress.update(bar, description=f"step {step + 1}: {entrant.method}")
            # Whatever the companions: the result of a method does not depend on which others take part.
            torch.default_generator.manual_seed(settings.seed * 1_000_003 + step)
            _train_step(entrant, batch)
            progress.advance(bar)
    for entrant in entrants:
        progress.update(bar, description=f"scoring {entrant.method}")
        for rows in torch.arange(len(task.validation)).split(settings.batch_size):
            batch = _take(validation, rows)
            entrant.correct += _count_correct(entrant.model, batch)
            if entrant.way.under is not None:
                with uncoupled(entrant.model):
                    entrant.correct_deployed = (entrant.correct_deployed or 0) + _count_correct(entrant.model, batch)
            progress.advance(bar)
        progress.update(bar, description=f"memory of {entrant.method}")
        entrant.peak_activation_causes = _peak(
            entrant, _take(train, torch.arange(len(task.train))[: settings.batch_size])
        )
        progress.advance(bar)
    return entrants


def _enter(method: str, pretrained: Path, task: Docstrings, settings: Settings) -> Entrant:
    torch.default_generator.manual_seed(settings.seed)  # the same head for everyone
    base, _ = read_model(str(pretrained), AutoModelForSequenceClassification, num_labels=len(task.labels))
    way = read_way(method)
    if way.takes("modules_to_save"):
        way = read_way(method, {"modules_to_save": HEAD})
    model = way.apply(base, "SEQ_CLS").train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate(way), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, settings.steps))
    return Entrant(way, model, optimizer, scheduler)


def learning_rate(way: Way) -> float:
    """That of the method, with whatever is put under it."""
    return LEARNING_RATES[way.method.name]


def _standard_error(score: float, texts: int) -> float:
    return math.sqrt(score * (1 - score) / texts)


def _schedule(step: int, steps: int) -> float:
    """Linearly up over the first tenth of the steps, then linearly down to 0."""
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def _train_step(entrant: Entrant, batch: dict[str, Tensor]) -> None:
    start = time.perf_counter()
    loss = entrant.model(**batch).loss
    loss.backward()
    entrant.optimizer.step()
    entrant.optimizer.zero_grad()
    entrant.seconds.append(time.perf_counter() - start)
    entrant.scheduler.step()
    entrant.losses.append(loss.item())


def _count_correct(model: nn.Module, batch: dict[str, Tensor]) -> int:
    model.eval()
    with torch.no_grad():
        found = model(**batch).logits.argmax(-1)
    model.train()
    return int((found == batch["labels"]).sum())


def _peak(entrant: Entrant, batch: dict[str, Tensor]) -> dict[str, int]:
    """Bytes of activations at their peak in a step, by cause."""

    def step() -> None:
        entrant.model(**batch).loss.backward()

    peak = measure(step, model=entrant.model).activation_causes
    entrant.optimizer.zero_grad()
    return peak


def _encode(pretrained: Path, examples: Sequence[Example], settings: Settings) -> dict[str, Tensor]:
    """All texts as tensors of one shape, so that every step costs the same."""
    tokenizer = load_tokenizer(ModelArguments(str(pretrained)), str(pretrained))
    if settings.max_length > tokenizer.model_max_length:
        raise ConfigError(
            f"max_length is {settings.max_length}; this model takes at most {tokenizer.model_max_length} tokens."
        )
    texts = [example.text for example in examples]
    encoded = tokenizer(
        texts, truncation=True, max_length=settings.max_length, padding="max_length", return_tensors="pt"
    )
    return {**encoded, "labels": torch.tensor([example.label for example in examples])}


def _take(tensors: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: values[rows] for name, values in tensors.items()}


def _batches(texts: int, settings: Settings) -> Iterator[Tensor]:
    """Indices of the texts of each step: one shuffled pass after another."""
    generator = torch.Generator().manual_seed(settings.seed)
    passes = math.ceil(settings.steps * settings.batch_size / texts)
    order = torch.cat([torch.randperm(texts, generator=generator) for _ in range(passes)])
    yield from order[: settings.steps * settings.batch_size].split(settings.batch_size)


def rows_of(entrants: Sequence[Entrant], validation_texts: int) -> list[dict[str, Any]]:
    times = {entrant.method: median(entrant.seconds) for entrant in entrants}
    rows = []
    for entrant in entrants:
        trainable, total = count_parameters(entrant.model)
        score, deployed = entrant.correct / validation_texts, entrant.correct_deployed
        rows.append(
            {
                "method": entrant.method,
                "score": score,
                "score_standard_error": _standard_error(score, validation_texts),
                "score_deployed": None if deployed is None else deployed / validation_texts,
                "trainable_parameters": trainable,
                "total_parameters": total,
                "peak_activation_bytes": sum(entrant.peak_activation_causes.values()),
                "peak_activation_causes": entrant.peak_activation_causes,
                "step_seconds": times[entrant.method],
                "step_time_ratio_to_full": times[entrant.method] / times["full"] if "full" in times else None,
                "learning_rate": learning_rate(entrant.way),
                "losses": [loss if math.isfinite(loss) else None for loss in entrant.losses],
            }
        )
    return rows
