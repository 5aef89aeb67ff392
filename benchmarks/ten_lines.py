"""What the README's one line saves: LoRA on a language model with real weights, as it is and on a reversible backbone.

    python benchmarks/ten_lines.py DIR

DIR is a folder or a name of SmolLM2-135M-Instruct, or of another causal language model. One training step on the
README's own first tokens, LoRA on all linear layers; memory is the largest that activations took at once,
counted to the byte. Writes ten_lines.json to benchmarks/results and the table into the README, or both to --output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import meft
from meft.storage.files import read_json, write_json, write_text
from meft.storage.results import format_bytes, provenance

ROOT = Path(__file__).parents[1]
NAME, START, END = "ten_lines", "<!-- memory -->\n", "<!-- end of memory -->"
WAYS = {
    "LoRA": lambda model: model,
    "LoRA, gradient checkpointing": lambda model: model.gradient_checkpointing_enable() or model,
    "LoRA, `meft.make_reversible(model)`": meft.make_reversible,
}


def main(words: Sequence[str] | None = None) -> Path:
    """Measures every way; returns the file of the results."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=1024)
    # Many processors multiply bfloat16 a hundred times slower.
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args(words)
    found = {
        "model": Path(arguments.model).name,
        "tokens": arguments.tokens,
        "dtype": arguments.dtype,
        **provenance("python benchmarks/ten_lines.py " + " ".join(words)),
        "bytes": {
            name: measured(arguments.model, arguments.tokens, getattr(torch, arguments.dtype), way)
            for name, way in tqdm(WAYS.items(), desc="ways")
        },
    }
    file = (arguments.output or ROOT / "benchmarks" / "results") / f"{NAME}.json"
    write_json(file, found)
    page = ROOT / "README.md"
    write_text((arguments.output or ROOT) / "README.md", put_into(page.read_text(encoding="utf-8"), read_json(file)))
    return file


def measured(folder: str, tokens: int, dtype: torch.dtype, way: Any) -> int:
    """Peak bytes of activations in one training step."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = way(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))).train()
    text = (ROOT / "README.md").read_text(encoding="utf-8") * 2
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens)["input_ids"]

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    step()  # gradients and states that are made once
    model.zero_grad()
    return meft.measure(step, model=model).activation_peak_bytes


def put_into(page: str, found: Mapping[str, Any]) -> str:
    """The page with the table of these results."""
    before, rest = page.split(START)
    _, after = rest.split(END)
    bytes_of = found["bytes"]
    plain = bytes_of["LoRA"]
    rows = [f"| {name} | {format_bytes(size)} | {size / plain:.1%} |" for name, size in bytes_of.items()]
    said = f"One step of {found['model']} on {found['tokens']} tokens in {found['dtype']}, peak memory of activations"
    table = "\n".join(["| | activations | of LoRA |", "|---|---:|---:|", *rows])
    return f"{before}{START}{said} (`{found['command']}`):\n\n{table}\n{END}{after}"


if __name__ == "__main__":
    print(main())
