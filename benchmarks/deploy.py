"""LoRA on a reversible backbone, deployed without it: the validation loss as trained and on the plain model.

    python benchmarks/deploy.py --model DIR --text FILE [FILE ...]
    python benchmarks/deploy.py --model DIR --text train.tsv#sentence1 --steps 20 --seeds 1 --output /tmp/try

Trains LoRA on all linear layers of a causal language model: on the plain model, and under `meft.make_reversible` with
`momentum` for every gamma, with its sign fixed and drawn at random. Each run sees the same batches from the same
initial weights. Then the loss on held-out text is taken as the model was trained (signs drawn where they were), and
after `meft.restore`, on the plain model with the same LoRA weights.

A FILE is plain text, a paragraph a line; FILE#NAME takes the column NAME of a table (.tsv with a header) or the field
NAME of a .jsonl. The last tenth of the paragraphs is held out.

Writes deploy.json, deploy.md and deploy.svg to benchmarks/results, or to --output.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.utils import logging

import meft
from meft.storage.figures import save_figure
from meft.storage.files import write_json, write_text
from meft.storage.results import hardware, now, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
NAME = "deploy"
GAMMAS = (1 / 4, 1 / 8, 1 / 16)
SIGNS = ("fixed", "random")
HELD_OUT = 0.1
DRAWS = 4  # of the signs in the loss as trained
WARM_UP = 0.1
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
_STYLES = {"fixed": ("#1f78b4", "o"), "random": ("#d95f02", "s")}


@dataclass(frozen=True)
class Way:
    """A way to train LoRA: on the plain model (gamma None), or on momentum."""

    gamma: float | None = None
    sign: str = "fixed"

    @property
    def name(self) -> str:
        return "LoRA, plain model" if self.gamma is None else f"LoRA on momentum, gamma {Fraction(self.gamma)}"


@dataclass(frozen=True)
class Losses:
    """Validation losses of one run, in nats a token."""

    trained: float
    deployed: float


WAYS = (Way(), *(Way(gamma, sign) for sign in SIGNS for gamma in GAMMAS))


def main(words: Sequence[str] | None = None) -> Path:
    """Trains and evaluates everything; returns the folder of the results."""
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    train, held_out = read_tokens(arguments)
    found: dict[str, Any] = {"before": loss_before_training(arguments, held_out), "runs": []}
    runs = [(way, seed) for seed in range(arguments.seeds) for way in WAYS]
    for way, seed in tqdm(runs, desc="runs", disable=None):
        losses = run(way, seed, arguments, train, held_out)
        found["runs"].append({**asdict(way), "seed": seed, **asdict(losses)})
    found |= {"held_out_tokens": held_out.numel(), "training_tokens": train.numel(), **settings(arguments)}
    found |= provenance(sys.argv[1:] if words is None else words)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / f"{NAME}.json", found)
    write_text(arguments.output / f"{NAME}.md", as_markdown(found))
    save_figure(figure(found), arguments.output / f"{NAME}.svg")
    print(as_markdown(found))
    return arguments.output


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a causal language model with its tokenizer")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE[#NAME]", help="text to train on and hold out")
    parser.add_argument("--steps", type=int, default=400, help="training steps of a run")
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch")
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a row")
    parser.add_argument("--learning_rate", type=float, default=5e-3, help="peak; warmed up, then falling linearly")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every way to train")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args(words)
    for name in ("steps", "batch", "sequence", "seeds", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be at least 1.")
    return arguments


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "batch", "sequence", "learning_rate", "seeds")
    return {
        "model": Path(arguments.model).name,
        "text": [Path(name).name for name in arguments.text],
        **{name: getattr(arguments, name) for name in names},
        "lora": LORA,
    }


def provenance(words: Sequence[str]) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", "benchmarks/deploy.py", *map(shortened, words)]),
        "date": now(),
        "hardware": hardware(),
        "versions": versions(),
    }


def shortened(word: str) -> str:
    """A path without the folders that only one machine has."""
    path, mark, field = word.partition("#")
    parts = Path(path).parts
    return "/".join(parts[-2:]) + mark + field if len(parts) > 2 and Path(path).exists() else word


# -- text ------------------------------------------------------------------------------------------------------------


def read_tokens(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The text as rows of tokens, (rows, sequence): those to train on, and those held out."""
    paragraphs = [text for name in arguments.text for text in read_text(name) if text]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    border = round(len(paragraphs) * (1 - HELD_OUT))
    parts = []
    for part in (paragraphs[:border], paragraphs[border:]):
        ids = [token for text in part for token in tokenizer(text)["input_ids"]]
        rows = len(ids) // arguments.sequence
        if rows < arguments.batch:
            sys.exit(f"There are {rows} rows of {arguments.sequence} tokens in a part of the text; give more text.")
        parts.append(torch.tensor(ids[: rows * arguments.sequence]).view(rows, arguments.sequence))
    return parts[0], parts[1]


def read_text(name: str) -> list[str]:
    """The lines of a file, or the column or field that is named behind a `#`."""
    path, _, field = name.partition("#")
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    if not field:
        return lines
    if path.endswith(".jsonl"):
        return [str(json.loads(line)[field]) for line in lines if line]
    column = lines[0].split("\t").index(field)
    return [line.split("\t")[column] for line in lines[1:]]


# -- training --------------------------------------------------------------------------------------------------------


def run(way: Way, seed: int, arguments: argparse.Namespace, train: Tensor, held_out: Tensor) -> Losses:
    """Trains in one way, and takes the losses as trained and as deployed."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(arguments.model), LoraConfig(**LORA))
    if way.gamma is not None:
        meft.make_reversible(model, coupling="momentum", gamma=way.gamma, sign=way.sign)
    fit(model.train(), batches(train, arguments, seed), arguments)
    # In training mode, in which signs are drawn; there is no dropout.
    trained = fmean(validation_loss(model, held_out, arguments) for _ in range(DRAWS if way.sign == "random" else 1))
    if way.gamma is not None:
        meft.restore(model)
    return Losses(trained, validation_loss(model.eval(), held_out, arguments))


def loss_before_training(arguments: argparse.Namespace, held_out: Tensor) -> float:
    return validation_loss(AutoModelForCausalLM.from_pretrained(arguments.model).eval(), held_out, arguments)


def batches(train: Tensor, arguments: argparse.Namespace, seed: int) -> Iterator[Tensor]:
    """Batches without end, the same for every way to train."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(train), generator=generator).split(arguments.batch):
            if len(rows) == arguments.batch:
                yield train[rows]


def fit(model: nn.Module, data: Iterator[Tensor], arguments: argparse.Namespace) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=arguments.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARM_UP * arguments.steps), arguments.steps)
    for _ in range(arguments.steps):
        ids = next(data)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def validation_loss(model: nn.Module, rows: Tensor, arguments: argparse.Namespace) -> float:
    """Mean over all tokens of the rows but their first."""
    with torch.no_grad():
        parts = rows.split(4 * arguments.batch)
        losses = [float(model(input_ids=ids, labels=ids, use_cache=False).loss) * len(ids) for ids in parts]
    return sum(losses) / len(rows)


# -- what is written -------------------------------------------------------------------------------------------------


def averaged(found: Mapping[str, Any]) -> dict[Way, tuple[Losses, float]]:
    """Means over the seeds, and the largest distance of a run's loss as deployed from its mean."""
    table = {}
    for way in WAYS:
        runs = [run for run in found["runs"] if (run["gamma"], run["sign"]) == (way.gamma, way.sign)]
        mean = Losses(fmean(run["trained"] for run in runs), fmean(run["deployed"] for run in runs))
        table[way] = mean, max(abs(run["deployed"] - mean.deployed) for run in runs)
    return table


def as_markdown(found: Mapping[str, Any]) -> str:
    table = averaged(found)
    plain = table[WAYS[0]][0].deployed
    lines = [
        "# LoRA on a reversible backbone, as trained and as deployed",
        "",
        f"Validation loss (nats a token) of {found['model']} after {found['steps']} steps of {found['batch']} x "
        f"{found['sequence']} tokens of {', '.join(found['text'])}; {found['before']:.3f} before training. Means of "
        f"{found['seeds']} seeds; spread is the largest distance of a run from the mean as deployed.",
        "",
        "| trained | sign of gamma | as trained | as deployed | deployed against plain LoRA | spread |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for way, (losses, spread) in table.items():
        sign = "" if way.gamma is None else way.sign
        cells = (f"{losses.trained:.3f}", f"{losses.deployed:.3f}", f"{losses.deployed - plain:+.3f}", f"{spread:.3f}")
        lines.append(f"| {way.name} | {sign} | {' | '.join(cells)} |")
    machine = found["hardware"]
    named = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines += [
        "",
        f"{machine['processor']}, {machine['threads']} thread(s); {named}; {found['date']}.",
        f"Command: `{found['command']}`",
    ]
    return "\n".join(lines) + "\n"


def figure(found: Mapping[str, Any]) -> Figure:
    """Loss against gamma, as trained and as deployed, one panel a kind of sign."""
    from matplotlib.figure import Figure

    table = averaged(found)
    drawn = Figure(figsize=(9, 3.8), layout="constrained")
    panels = drawn.subplots(1, len(SIGNS), sharey=True)
    for axes, sign in zip(panels, SIGNS, strict=True):
        colour, marker = _STYLES[sign]
        for label, line in (("trained", "--"), ("deployed", "-")):
            heights = [getattr(table[Way(gamma, sign)][0], label) for gamma in GAMMAS]
            axes.plot(GAMMAS, heights, line, color=colour, marker=marker, label=f"as {label}")
        axes.axhline(table[WAYS[0]][0].deployed, color="0.4", linewidth=0.9, linestyle=":", label="plain LoRA")
        axes.set_xscale("log", base=2)
        axes.set_xticks(GAMMAS, [str(Fraction(gamma)) for gamma in GAMMAS])
        axes.minorticks_off()
        axes.set_xlabel("gamma in training")
        axes.set_title(f"{sign} sign")
        axes.grid(axis="y", color="0.92")
        axes.legend(fontsize="small")
    panels[0].set_ylabel("validation loss, nats a token")
    return drawn


if __name__ == "__main__":
    main()
