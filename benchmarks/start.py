"""How far a coupled model starts from the plain one, by gamma, compensation and output rule, on real models.

    python benchmarks/start.py --language DIR --encoders DIR [DIR ...] --text validation.jsonl#support
    python benchmarks/start.py --language DIR --text FILE#NAME --quick --output /tmp/try

A causal language model is compared on `--tokens` tokens by its loss and by the KL divergence of its predictions from
the plain model's; an encoder by the relative change of its last hidden state and by the cosine of its mean. Beside
`momentum` stand `meft1`, `meft2` and `meft3` with adapters as they are initialised. Bits are those of the residues, an
element of the hidden state and layer.

Writes start.json, start.md and start.svg to benchmarks/results, or to --output.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import meft
from meft.backbone.layers import ReversibleLayer
from meft.storage.figures import save_figure
from meft.storage.files import write_json, write_text
from meft.storage.results import hardware, now, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
NAME = "start"
GAMMAS = (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)
FACTORS = (1 / 64, 1 / 128, 1 / 256)
# The two that are candidates first; the others only where gamma is large enough to tell them apart.
RULES = (
    (False, "newest"),
    (True, "weighted"),
    (False, "mean"),
    (False, "weighted"),
    (True, "newest"),
    (True, "mean"),
)
ROW = 512  # tokens of a row of text


def main(words: Sequence[str] | None = None) -> Path:
    """Measures everything; returns the folder of the results."""
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / f"{NAME}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if arguments.resume and file.is_file() else {"models": {}}
    for kind, folder in [(language, arguments.language), *((encoder, folder) for folder in arguments.encoders)]:
        if folder is None:
            continue
        dtype = arguments.dtype if kind is language else "float32"
        entry = found["models"].setdefault(f"{Path(folder).name}, {dtype}", {"ways": []})
        entry |= {"tokens": arguments.tokens, **provenance(sys.argv[1:] if words is None else words)}
        for step in kind(folder, arguments, entry):
            print(step, flush=True)
            write_json(file, found)
    write_text(arguments.output / f"{NAME}.md", as_markdown(found))
    save_figure(figure(found), arguments.output / f"{NAME}.svg")
    print(as_markdown(found))
    return arguments.output


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", help="folder of a causal language model with its tokenizer")
    parser.add_argument("--encoders", nargs="*", default=[], help="folders of encoders with their tokenizers")
    parser.add_argument("--text", required=True, metavar="FILE#NAME", help="a .jsonl file and the field to read")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens that are compared")
    parser.add_argument("--fraction_bits", type=int, help="explicit binary places; left out, the library's own choice")
    parser.add_argument("--dtype", default="bfloat16", help="of the language model: bfloat16 or float32")
    parser.add_argument("--resume", action="store_true", help="keep what the result file holds, and add to it")
    parser.add_argument("--quick", action="store_true", help="the defaults alone")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args(words)
    if not arguments.language and not arguments.encoders:
        parser.error("Neither --language nor --encoders names a model.")
    return arguments


def provenance(words: Sequence[str]) -> dict[str, Any]:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULTS)
    short = (word if word.startswith("--") else Path(word).name for word in words)
    return {
        "command": shlex.join(["python", "benchmarks/start.py", *short]),
        "commit": git.stdout.strip() or None,
        "date": now(),
        "hardware": hardware(),
        "versions": versions(),
    }


def ways(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The options of what is compared; an empty set is `make_reversible` as it comes."""
    yield {}
    for coupling in ("momentum", "adapter", *FACTOR_OF):
        yield {"coupling": coupling, "adapters": True}
    if arguments.quick:
        return
    for gamma in GAMMAS:
        for compensated, output in RULES if gamma >= 1 / 16 else RULES[:2]:
            yield {"gamma": gamma, "compensated": compensated, "output": output}
        yield {"gamma": gamma, "granularity": "block"}
    yield {"coupling": "momentum", "adapters": True, "adapter_init_std": 0.02}
    for coupling, name in FACTOR_OF.items():
        names = ("lam", "beta") if name == "both" else (name,)
        # meft2 with adapters that are nothing yet computes what meft1 computes.
        for factor in FACTORS if coupling != "meft2" else ():
            yield {"coupling": coupling, "adapters": True, **dict.fromkeys(names, factor), "output": "newest"}
        smallest = dict.fromkeys(names, FACTORS[-1])
        if coupling != "meft2":
            yield {"coupling": coupling, "adapters": True, **smallest, "output": "mean"}
        yield {"coupling": coupling, "adapters": True, **smallest, "output": "newest", "adapter_init_std": 0.02}
        paper = {"lam": 1.0 if name == "beta" else 0.1, "beta": 1.0 if name == "lam" else 0.1}
        yield {"coupling": coupling, "adapters": True, **paper, "output": "mean", "adapter_init_std": 0.02}


FACTOR_OF = {"meft1": "lam", "meft2": "beta", "meft3": "both"}


@contextmanager
def coupled(model: nn.Module, options: Mapping[str, Any], bits: int | None) -> Iterator[tuple[nn.Module, Any]]:
    """The model under some options, and its plan; plain again afterwards."""
    given = {name: value for name, value in options.items() if name != "adapters"}
    if bits is not None:
        given["fraction_bits"] = bits
    if options.get("adapters"):
        torch.manual_seed(0)
        adapted = get_peft_model(model, meft.MeftConfig(bottleneck_dim=64, **given))
        try:
            yield adapted.eval(), _plan(adapted)
        finally:
            adapted.unload()
    else:
        meft.make_reversible(model, **given)
        try:
            yield model.eval(), _plan(model)
        finally:
            meft.restore(model)


def _plan(model: nn.Module) -> Any:
    placed = [module.placement() for module in model.modules() if isinstance(module, ReversibleLayer)]
    return next(placement.reversible_stack.plan for placement in placed if placement is not None)


def language(folder: str, arguments: argparse.Namespace, entry: dict[str, Any]) -> Iterator[Any]:
    """Loss and KL of a causal language model under every way that the entry does not have yet."""
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    rows = read_tokens(arguments, folder).split(ROW)
    plain = [logits_of(model, row) for row in rows]
    loss = sum(distances(p, p, row)[0].item() for p, row in zip(plain, rows, strict=True)) / arguments.tokens
    entry |= {"kind": "language model", "plain_loss": loss}
    for options in tqdm(missing(arguments, entry), desc=Path(folder).name, disable=None):
        with coupled(model, options, arguments.fraction_bits) as (changed, plan):
            pairs = zip(plain, rows, strict=True)
            both = [distances(reference, logits_of(changed, row), row) for reference, row in pairs]
        loss, kl = (torch.stack(parts).sum().item() / arguments.tokens for parts in zip(*both, strict=True))
        entry["ways"].append(
            {"options": options, "plan": str(plan), "loss": loss, "kl": kl, "residue_bits": bits_of(plan)}
        )
        yield entry["ways"][-1]


def missing(arguments: argparse.Namespace, entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The ways that were not measured in an earlier run."""
    known = [way["options"] for way in entry["ways"]]
    return [options for options in ways(arguments) if options not in known]


def logits_of(model: nn.Module, row: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=row[None]).logits[0]
    return logits


def distances(plain: Tensor, logits: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of a row of the loss, and of KL(plain || coupled)."""
    p, q = plain.float().log_softmax(-1), logits.float().log_softmax(-1)
    scale = len(row) / (len(row) - 1)  # the last token of a row predicts nothing that is known
    loss = nn.functional.nll_loss(q[:-1], row[1:], reduction="sum") * scale
    return loss, nn.functional.kl_div(q, p, log_target=True, reduction="sum")


def encoder(folder: str, arguments: argparse.Namespace, entry: dict[str, Any]) -> Iterator[Any]:
    """Change of the last hidden state of an encoder under every way that the entry does not have yet, in float32."""
    model = AutoModel.from_pretrained(folder).eval()
    rows = read_tokens(arguments, folder).split(128)
    with torch.no_grad():
        plain = torch.cat([model(input_ids=row[None]).last_hidden_state for row in rows])
    entry["kind"] = "encoder"
    for options in tqdm(missing(arguments, entry), desc=Path(folder).name, disable=None):
        with coupled(model, options, arguments.fraction_bits) as (changed, plan), torch.no_grad():
            states = torch.cat([changed(input_ids=row[None]).last_hidden_state for row in rows])
        change = ((states - plain).norm() / plain.norm()).item()
        cosine = nn.functional.cosine_similarity(states.mean(1), plain.mean(1)).mean().item()
        figures = {"change": change, "cosine": cosine, "residue_bits": bits_of(plan)}
        entry["ways"].append({"options": options, "plan": str(plan), **figures})
        yield entry["ways"][-1]


def read_tokens(arguments: argparse.Namespace, folder: str) -> Tensor:
    """The first tokens of the passages, one after the other."""
    path, _, field = arguments.text.partition("#")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens: list[int] = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        text = json.loads(line)[field]
        tokens += tokenizer(text, add_special_tokens=False).input_ids if text else []
        if len(tokens) >= arguments.tokens:
            return torch.tensor(tokens[: arguments.tokens])
    raise SystemExit(f"{path} has {len(tokens)} tokens in {field!r}; {arguments.tokens} are needed.")


def bits_of(plan: Any) -> int:
    """Bits that a layer's residues take, an element of the hidden state."""
    if plan.coupling is None:
        return 0
    return sum((round(1 / step.factor) - 1).bit_length() for step in plan.coupling.steps)


def as_markdown(found: Mapping[str, Any]) -> str:
    """One table a model."""
    lines: list[str] = []
    for name, model in found["models"].items():
        if model["kind"] == "encoder":
            head, keys = ["change of the hidden state", "cosine of the mean"], ("change", "cosine")
            lines += [name, ""]
        else:
            head, keys = ["loss", "KL, nats"], ("loss", "kl")
            lines += [f"{name}, {model['tokens']} tokens; loss of the plain model {model['plain_loss']:.4f}", ""]
        lines += ["| options | bits a layer | " + " | ".join(head) + " |", "|---|---|" + "---|" * len(head)]
        for way in model["ways"]:
            figures = [f"{way[key]:.4f}" for key in keys]
            if "loss" in way:
                figures[0] += f" ({way['loss'] - model['plain_loss']:+.4f})"
            lines.append(f"| {described(way['options'])} | {way['residue_bits']} | {' | '.join(figures)} |")
        machine, packages = model["hardware"]["processor"], model["versions"]
        libraries = ", ".join(f"{package} {version}" for package, version in packages.items())
        lines += ["", f"Measured {model['date'][:10]} by `{model['command']}` on {machine}; {libraries}.", ""]
    return "\n".join(lines) + "\n"


def described(options: Mapping[str, Any]) -> str:
    """`momentum, gamma 1/16, newest` for options as `ways` makes them."""
    named = []
    for name, value in options.items():
        if name in ("lam", "beta", "gamma"):
            named.append(f"{name} {Fraction(value).limit_denominator(256)}")
        elif name == "compensated":
            named += ["compensated"] if value else []
        elif name == "adapter_init_std":
            named.append(f"adapters from N(0, {value:g}²)")
        elif name == "adapters":
            continue
        else:
            named.append(str(value))
    return ", ".join(named) or "make_reversible as it comes"


def figure(found: Mapping[str, Any]) -> Figure:
    """Distance from the plain model against gamma, one panel a model."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4.2 * len(found["models"]), 3.6), layout="constrained")
    panels = drawn.subplots(1, len(found["models"]), squeeze=False)[0]
    for axes, (name, model) in zip(panels, found["models"].items(), strict=True):
        key = "change" if model["kind"] == "encoder" else "kl"
        for (compensated, output), style in _STYLES.items():
            points = [
                (way["options"]["gamma"], way[key])
                for way in model["ways"]
                if way["options"].get("compensated") is compensated and way["options"].get("output") == output
            ]
            label = f"{'compensated' if compensated else 'momentum'}, {output}"
            axes.plot(*zip(*points, strict=True), style, label=label) if points else None
        axes.set(title=name, xlabel="gamma", ylabel="change of the hidden state" if key == "change" else "KL, nats")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    return drawn


_STYLES = {
    (False, "newest"): "o-",
    (False, "mean"): "s:",
    (False, "weighted"): "^--",
    (True, "newest"): "v--",
    (True, "mean"): "D:",
    (True, "weighted"): "P-",
}


if __name__ == "__main__":
    main()
