"""What gamma does to a language model that is trained: LoRA on `momentum` at several gammas beside LoRA alone.

    python benchmarks/gamma.py --model DIR --data_dir DIR [--task openbookqa] [--steps 30] [--questions 100]
    python benchmarks/gamma.py --model DIR --data_dir DIR --resume            # goes on where it was stopped
    python benchmarks/gamma.py --page                                         # the page's table and figure alone

Every way learns the answers of the same training questions, in the same order, from the same initial LoRA. The answers
of the same held-out questions are scored by their likelihood: as trained, and on the plain model. Differences to LoRA
are paired, question by question, which is what their standard errors are of.

Writes gamma.json (after every way), gamma.md and gamma.svg to benchmarks/results, or to --output.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, Any

import torch
from start import bits_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from meft.backbone.layers import ReversibleLayer
from meft.memory.measurement.measure import measure
from meft.methods.registry import read_way
from meft.storage.figures import save_figure
from meft.storage.files import write_json, write_text
from meft.storage.results import format_bytes, provenance
from meft.storage.terminal import markdown_table
from meft.verification.deployment import uncoupled
from meft_lab.checkout import commit
from meft_lab.tasks import load_multiple_choice
from meft_lab.tasks.answers import split_tokens
from meft_lab.tasks.multiple_choice import ANSWER, CHOICES, PROMPT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
NAME = "gamma"
TITLE = "Distance from the plain model before training, and loss of the answer after it, by gamma"
ZERO, LORA = "zero-shot", "lora"
# The default first and then the furthest from it, so that what is stopped early has the two that differ most.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    ZERO: ("lora", {}),
    LORA: ("lora", {}),
    "lora+momentum 1/32": ("lora+momentum", {"gamma": 1 / 32}),
    "lora+momentum 1/4": ("lora+momentum", {"gamma": 1 / 4}),
    "lora+momentum 1/16": ("lora+momentum", {"gamma": 1 / 16}),
    "meft1": ("meft1", {"bottleneck_dim": 64}),
}
_IGNORED, _SCORED_AT_ONCE = -100, 64
Pair = tuple[list[int], list[int]]


def main(words: Sequence[str] | None = None) -> Path:
    """Measures what is missing; returns the folder of the results."""
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / f"{NAME}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if (arguments.resume or arguments.page) else {"ways": []}
    if not arguments.page:
        given = [Path(word).name if "/" in word else word for word in (sys.argv[1:] if words is None else words)]
        command = shlex.join(["python", "benchmarks/gamma.py", *given])
        for row in run(arguments, found):
            row |= {"command": command, "commit": commit(), **provenance(command)}
            found["ways"].append(row)
            print(f"{row['way']}: {row['loss']:.4f}", flush=True)
            write_json(file, found)
    write_text(arguments.output / f"{NAME}.md", as_markdown(found))
    save_figure(figure(found), arguments.output / f"{NAME}.svg")
    return Path(arguments.output)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model with its tokenizer")
    parser.add_argument("--data_dir", help="folder of the question tasks")
    parser.add_argument("--task", default="openbookqa")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--questions", type=int, default=100, help="held-out questions that are scored")
    parser.add_argument("--loss_only", action="store_true", help="score right answers alone: no accuracy, in a quarter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of LoRA; adapters have twice that")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="keep what the result file holds, and add to it")
    parser.add_argument("--page", action="store_true", help="write the table and the figure of the result file alone")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(words)
    if not arguments.page and not (arguments.model and arguments.data_dir):
        parser.error("--model and --data_dir are needed, but for --page.")
    return arguments


def run(arguments: argparse.Namespace, found: dict[str, Any]) -> Any:
    """One row a way that the result does not have yet."""
    settings = {
        name: getattr(arguments, name)
        for name in ("task", "steps", "batch_size", "questions", "loss_only", "seed", "learning_rate", "dtype")
    } | {"model": Path(arguments.model).name}
    if found.setdefault("settings", settings) != settings:
        raise SystemExit(f"The result file has other settings: {found['settings']}. Give another --output.")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    data = load_multiple_choice(arguments.task, arguments.data_dir, ("train", "validation"))
    rows = data.splits["train"]
    right = [choices[answer] for choices, answer in zip(rows[CHOICES], rows[ANSWER], strict=True)]
    batches = _batches(split_tokens(tokenizer, rows[PROMPT], right), arguments)
    held_out = data.splits["validation"].select(range(arguments.questions))
    for name in arguments.ways:
        if name not in [row["way"] for row in found["ways"]]:
            yield _row(name, arguments, tokenizer, batches, held_out)


def _row(name: str, arguments: argparse.Namespace, tokenizer: Any, batches: list[list[Pair]], held_out: Any) -> Any:
    method, options = WAYS[name]
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    asked = [
        (question, choice)
        for question, prompt in enumerate(held_out[PROMPT])
        for choice in split_tokens(tokenizer, [prompt] * len(held_out[CHOICES][question]), held_out[CHOICES][question])
    ]
    answers = [[pair for number, pair in asked if number == question] for question in range(len(held_out))]
    known = [pairs[answer] for pairs, answer in zip(answers, held_out[ANSWER], strict=True)]

    def scores() -> dict[str, Any]:
        return _losses(model, known) if arguments.loss_only else _scores(model, answers, held_out)

    plain = None if name in (ZERO, LORA) else _predictions(base, known)
    torch.manual_seed(arguments.seed)
    way = read_way(method, options)
    model = way.apply(base, "CAUSAL_LM")
    row: dict[str, Any] = {"way": name, "bits": 0, "gamma": options.get("gamma"), "training_losses": []}
    if plain is not None:
        layers = [module for module in model.modules() if isinstance(module, ReversibleLayer)]
        placed = [placement for layer in layers if (placement := layer.placement()) is not None]
        row |= {"bits": bits_of(placed[0].reversible_stack.plan), "plan": str(placed[0].reversible_stack.plan)}
        row |= _start(plain, _predictions(model.eval(), known))
    if name != ZERO:
        rate = arguments.learning_rate * (1 if method != "meft1" else 2)
        row |= {"learning_rate": rate} | _train(model, way, batches, rate)
    model.eval()
    row |= scores()
    if way.under is not None:
        with uncoupled(model):
            row |= {f"deployed_{key}": value for key, value in scores().items()}
    return row


def _train(model: Any, way: Any, batches: list[list[Pair]], rate: float) -> dict[str, Any]:
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    losses, seconds, warmup = [], [], max(1, round(0.06 * len(batches)))
    first = _together(batches[0])

    def backward(batch: Mapping[str, Tensor]) -> float:
        with way.surroundings():
            loss = model(**batch).loss
        loss.backward()
        return float(loss.detach())

    causes = measure(lambda: backward(first), model=model).activation_causes
    optimizer.zero_grad()
    for step, pairs in enumerate(batches):
        share = min((step + 1) / warmup, (len(batches) - step) / max(1, len(batches) - warmup))
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        start = time.perf_counter()
        losses.append(backward(_together(pairs)))
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {
        "training_losses": losses,
        "step_seconds": median(seconds),
        "peak_activation_bytes": sum(causes.values()),
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
    }


def _batches(pairs: list[Pair], arguments: argparse.Namespace) -> list[list[Pair]]:
    """The rows of each step: drawn by the seed, then of like lengths together, in a drawn order."""
    generator = torch.Generator().manual_seed(arguments.seed)
    count = arguments.steps * arguments.batch_size
    if count > len(pairs):
        raise SystemExit(
            f"{arguments.steps} steps of {arguments.batch_size} need {count} rows; there are {len(pairs)}."
        )
    chosen = [pairs[place] for place in torch.randperm(len(pairs), generator=generator)[:count].tolist()]
    chosen.sort(key=_length)
    order = torch.randperm(arguments.steps, generator=generator).tolist()
    return [chosen[place * arguments.batch_size : (place + 1) * arguments.batch_size] for place in order]


def _length(pair: Pair) -> int:
    return len(pair[0]) + len(pair[1])


def _together(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Padded on the right, with a loss on the answers alone."""
    longest = max(map(_length, pairs))
    rests = [longest - _length(pair) for pair in pairs]
    return {
        "input_ids": torch.tensor([a + b + [0] * rest for (a, b), rest in zip(pairs, rests, strict=True)]),
        "attention_mask": torch.tensor([[1] * (longest - rest) + [0] * rest for rest in rests]),
        "labels": torch.tensor(
            [[_IGNORED] * len(a) + b + [_IGNORED] * rest for (a, b), rest in zip(pairs, rests, strict=True)]
        ),
    }


def _of_each(model: Any, pairs: Sequence[Pair], take: Callable[[Tensor, Tensor], Any]) -> list[Any]:
    """What `take` makes of the log-probabilities at each answer and its tokens, in batches of like lengths."""
    found: list[Any] = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda place: _length(pairs[place]))
    for start in range(0, len(order), _SCORED_AT_ONCE):
        places = order[start : start + _SCORED_AT_ONCE]
        batch = _together([pairs[place] for place in places])
        del batch["labels"]
        with torch.no_grad():
            logits = model(**batch).logits
        for place, each in zip(places, logits, strict=True):
            question, answer = pairs[place]
            end = len(question) + len(answer)
            known = each[len(question) - 1 : end - 1].float().log_softmax(-1)
            found[place] = take(known, torch.tensor(answer))
    return found


def _predictions(model: Any, known: Sequence[Pair]) -> list[tuple[Tensor, Tensor]]:
    return _of_each(model, known, lambda logs, answer: (logs, answer))


def _start(plain: Sequence[tuple[Tensor, Tensor]], coupled: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """KL of the coupled model's predictions from the plain model's over the answers' tokens, and change of the loss."""
    p, q = (torch.cat([logs for logs, _ in each]) for each in (plain, coupled))
    answer = torch.cat([tokens for _, tokens in plain])[:, None]
    divergence = nn.functional.kl_div(q, p, log_target=True, reduction="sum").item() / len(p)
    return {"start_kl": divergence, "start_loss_change": (p - q).gather(1, answer).mean().item()}


def _losses(model: Any, known: Sequence[Pair]) -> dict[str, Any]:
    """The loss of the right answer, question by question."""
    losses = _of_each(model, known, lambda logs, answer: -logs.gather(1, answer[:, None]).mean().item())
    return {"loss": fmean(losses), "by_question": {"loss": losses}}


def _scores(model: Any, answers: Sequence[Sequence[Pair]], held_out: Any) -> dict[str, Any]:
    """Accuracy as lm-eval has it, and the loss of the right answer, question by question."""
    flat = [pair for pairs in answers for pair in pairs]
    likely = iter(_of_each(model, flat, lambda logs, answer: logs.gather(1, answer[:, None]).sum().item()))
    acc, norm, losses = [], [], []
    for pairs, texts, answer in zip(answers, held_out[CHOICES], held_out[ANSWER], strict=True):
        sums = [next(likely) for _ in pairs]
        scaled = [total / len(text) for total, text in zip(sums, texts, strict=True)]
        acc.append(float(sums.index(max(sums)) == answer))
        norm.append(float(scaled.index(max(scaled)) == answer))
        losses.append(-sums[answer] / len(pairs[answer][1]))
    return {
        "acc": fmean(acc),
        "acc_norm": fmean(norm),
        "loss": fmean(losses),
        "by_question": {"acc": acc, "acc_norm": norm, "loss": losses},
    }


def error_of(values: Sequence[float]) -> float:
    """The standard error of a mean."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def compared(row: Mapping[str, Any], other: Mapping[str, Any], key: str, prefix: str = "") -> tuple[float, float]:
    """The mean difference to another row, question by question, and its standard error."""
    pairs = zip(row[f"{prefix}by_question"][key], other["by_question"][key], strict=True)
    differences = [ours - theirs for ours, theirs in pairs]
    return fmean(differences), error_of(differences)


def as_markdown(found: Mapping[str, Any]) -> str:
    """The table, and what it says as far as the standard errors go."""
    settings, ways = found["settings"], found["ways"]
    reference = next((row for row in ways if row["way"] == LORA), None)
    heads = ["", "bits a layer", "start: KL, nats", "start: loss", "acc", "acc_norm", "loss of the answer", "to lora"]
    heads += ["plain model: acc_norm", "plain model: loss", "plain model: to lora", "peak activations", "step"]
    lines = []
    for row in ways:
        line = [
            row["way"],
            str(row["bits"] or ""),
            _number(row, "start_kl"),
            _number(row, "start_loss_change", "{:+.3f}"),
        ]
        line += [_with_error(row, key) for key in ("acc", "acc_norm", "loss")] + [_to(row, reference)]
        line += [_with_error(row, key, "deployed_") for key in ("acc_norm", "loss")] + [
            _to(row, reference, "deployed_")
        ]
        seconds = row.get("step_seconds")
        line += [format_bytes(row.get("peak_activation_bytes")), "" if seconds is None else f"{seconds:.1f} s"]
        lines.append(line)
    missing = [name for name in WAYS if name not in [row["way"] for row in ways]]
    notes = [
        f"{settings['model']}, {settings['dtype']}, {settings['task']}: {settings['steps']} steps of "
        f"{settings['batch_size']} questions, seed {settings['seed']}, LoRA of rank 8 at a rate of "
        f"{settings['learning_rate']:g}; {settings['questions']} held-out questions.",
        "Losses in nats a token, mean over the questions.",
        "One seed: what another would change is in none of the errors.",
        "±: one standard error over the questions; 'to lora': mean of the differences question by question, in nats.",
        "Cut short for time: the recipe qa-smollm2 takes 200 steps and all questions. Times are of a busy machine.",
        *([f"Not run, for time: {', '.join(missing)}."] if missing else []),
        *(verdict(row, reference) for row in ways if reference is not None and row["gamma"]),
    ]
    made = list(dict.fromkeys((row["command"], row["commit"], row["date"][:10]) for row in ways))
    machine = ways[0]["hardware"]
    libraries = ", ".join(f"{package} {version}" for package, version in ways[0]["versions"].items())
    measured = [
        f"Measured {date} by `{command}` at commit {str(at)[:9]} on {machine['processor']}, {machine['cores']} cores, "
        f"{machine['threads']} thread; {libraries}."
        for command, at, date in made
    ]
    kept = [place for place in range(len(heads)) if any(line[place] for line in lines)]  # what some row has
    shown = markdown_table([heads[place] for place in kept], [[line[place] for place in kept] for line in lines])
    return (
        "\n".join(
            [
                *shown,
                "",
                *(f"- {note}" for note in notes),
                "",
                f"![{TITLE}]({NAME}.svg)",
                "",
                *measured,
            ]
        )
        + "\n"
    )


def verdict(row: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """What can be said of a row against LoRA, and no more: two standard errors or nothing."""
    told = []
    for prefix, what in (("", "as trained"), ("deployed_", "on the plain model")):
        difference, error = compared(row, reference, "loss", prefix)
        if abs(difference) > 2 * error:
            told.append(f"{what} its loss is {'above' if difference > 0 else 'below'} LoRA's by {abs(difference):.3f}")
        else:
            told.append(f"{what} no difference to LoRA beyond two standard errors ({2 * error:.3f}) was seen")
    return f"{row['way']}: {'; '.join(told)}."


def _with_error(row: Mapping[str, Any], key: str, prefix: str = "") -> str:
    if f"{prefix}{key}" not in row:
        return ""
    return f"{row[f'{prefix}{key}']:.3f} ± {error_of(row[f'{prefix}by_question'][key]):.3f}"


def _to(row: Mapping[str, Any], reference: Mapping[str, Any] | None, prefix: str = "") -> str:
    if reference is None or row["way"] == LORA or f"{prefix}by_question" not in row:
        return ""
    difference, error = compared(row, reference, "loss", prefix)
    return f"{difference:+.3f} ± {error:.3f}"


def _number(row: Mapping[str, Any], key: str, form: str = "{:.4f}") -> str:
    return form.format(row[key]) if key in row else ""


def figure(found: Mapping[str, Any]) -> Figure:
    """Start and loss after training against gamma, as trained and deployed, with LoRA's."""
    from matplotlib.figure import Figure

    rows = sorted((row for row in found["ways"] if row["gamma"]), key=lambda row: row["gamma"])
    reference = next((row for row in found["ways"] if row["way"] == LORA), None)
    drawn = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    gammas = [row["gamma"] for row in rows]
    left.plot(gammas, [row["start_kl"] for row in rows], "o-", color="#0072b2")
    for row in rows:
        note = f"{row['bits']} bits"
        left.annotate(note, (row["gamma"], row["start_kl"]), (6, -4), textcoords="offset points", fontsize="small")
    left.set(title="before training", ylabel="KL from the plain model, nats")
    if reference is not None:
        for prefix, style, label in (("", "o", "as trained"), ("deployed_", "s", "on the plain model")):
            both = [compared(row, reference, "loss", prefix) for row in rows]
            shift = 1.04 if prefix else 1 / 1.04  # side by side
            right.errorbar(
                [gamma * shift for gamma in gammas],
                [difference for difference, _ in both],
                yerr=[2 * error for _, error in both],
                fmt=style,
                capsize=3,
                label=label,
            )
        right.axhline(0, color="black", linewidth=0.8)
        right.legend(fontsize="small")
    right.set(title="after training (bars: two standard errors)", ylabel="loss of the answer, to LoRA's, nats")
    if not rows:  # an axis without points has no logarithm
        return drawn
    left.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(gammas, [str(Fraction(gamma).limit_denominator(256)) for gamma in gammas])
        axes.set_xlabel("gamma")
        axes.grid(alpha=0.3)
    return drawn


if __name__ == "__main__":
    main()
