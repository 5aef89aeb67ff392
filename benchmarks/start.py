"""How far a coupled model starts from the plain one, by gamma, compensation and output rule, on real models.

    python benchmarks/start.py --language DIR --encoders DIR [DIR ...] --text validation.jsonl#support
    python benchmarks/start.py --language DIR --text FILE#NAME --quick --output /tmp/try

A causal language model is compared on `--tokens` tokens by its loss and by the KL divergence of its predictions from
the plain model's; an encoder by the relative change of its last hidden state and by the cosine of its mean. Beside
`momentum` stand `meft1`, `meft2` and `meft3` with adapters as they are initialised. Bits are those of the residues, an
element of the hidden state and layer; bytes the residues of one training step, as the engine saved them.

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
from meft.engine.tape import residues_told_to
from meft.storage.files import write_json, write_text
from meft.storage.results import hardware, now, versions
from meft.verification.figure import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
NAME = "start"
GAMMAS = (1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)
FACTORS = (1 / 16, 1 / 64, 1 / 256)
ROW = 512  # tokens of a row of text


def main(words: Sequence[str] | None = None) -> Path:
    """Measures everything; returns the folder of the results."""
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found: dict[str, Any] = {"tokens": arguments.tokens, "models": {}} | provenance(
        sys.argv[1:] if words is None else words
    )
    if arguments.language:
        found["models"][Path(arguments.language).name] = language(arguments)
    for folder in arguments.encoders:
        found["models"][Path(folder).name] = encoder(folder, arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / f"{NAME}.json", found)
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
        for compensated in (False, True):
            for output in ("newest", "mean", "weighted"):
                yield {"gamma": gamma, "compensated": compensated, "output": output}
        yield {"gamma": gamma, "granularity": "block"}
    yield {"coupling": "momentum", "adapters": True, "init_std": 0.02}
    for coupling, name in FACTOR_OF.items():
        for factor in FACTORS:
            names = ("lam", "beta") if name == "both" else (name,)
            for output in ("newest", "mean"):
                yield {"coupling": coupling, "adapters": True, **dict.fromkeys(names, factor), "output": output}
        yield {"coupling": coupling, "adapters": True, "init_std": 0.02}
        paper = {"lam": 0.1, "beta": 0.1 if name != "lam" else 1.0, "output": "mean", "init_std": 0.02}
        yield {"coupling": coupling, "adapters": True, **paper, **({"lam": 1.0} if name == "beta" else {})}


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
    layer = next(module for module in model.modules() if isinstance(module, meft.backbone.layers.ReversibleLayer))
    return layer.placement().reversible_stack.plan


def language(arguments: argparse.Namespace) -> dict[str, Any]:
    """Loss and KL of a causal language model under every way."""
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(arguments.language, dtype=dtype).eval()
    rows = read_tokens(arguments, arguments.language).split(ROW)
    plain = [logits_of(model, row) for row in rows]
    found = []
    for options in tqdm(list(ways(arguments)), desc=Path(arguments.language).name, disable=None):
        with coupled(model, options, arguments.fraction_bits) as (changed, plan):
            both = [
                distances(reference, logits_of(changed, row), row) for reference, row in zip(plain, rows, strict=True)
            ]
            loss, kl = (torch.stack(parts).sum().item() / arguments.tokens for parts in zip(*both, strict=True))
            found.append({"options": options, "plan": str(plan), "loss": loss, "kl": kl, "residue_bits": bits_of(plan)})
            print(found[-1], flush=True)
    loss = sum(distances(p, p, row)[0].item() for p, row in zip(plain, rows, strict=True)) / arguments.tokens
    return {"kind": "language model", "dtype": arguments.dtype, "plain_loss": loss, "ways": found}


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


def encoder(folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Change of the last hidden state of an encoder under every way, in float32."""
    model = AutoModel.from_pretrained(folder).eval()
    rows = read_tokens(arguments, folder).split(128)
    with torch.no_grad():
        plain = [model(input_ids=row[None]).last_hidden_state[0] for row in rows]
    found = []
    for options in tqdm(list(ways(arguments)), desc=Path(folder).name, disable=None):
        with coupled(model, options, arguments.fraction_bits) as (changed, plan), torch.no_grad():
            states = [changed(input_ids=row[None]).last_hidden_state[0] for row in rows]
        change = torch.cat(states).sub(torch.cat(plain)).norm() / torch.cat(plain).norm()
        means = [(one.mean(0), other.mean(0)) for one, other in zip(states, plain, strict=True)]
        cosine = torch.stack([nn.functional.cosine_similarity(a, b, dim=0) for a, b in means]).mean()
        entry = {"options": options, "plan": str(plan), "change": change.item(), "cosine": cosine.item()}
        found.append({**entry, "residue_bits": bits_of(plan)})
        print(found[-1], flush=True)
    return {"kind": "encoder", "ways": found}


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


if __name__ == "__main__":
    main()
