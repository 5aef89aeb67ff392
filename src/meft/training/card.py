"""The model card of what was trained: README.md beside the weights, with what `results.json` knows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from meft.storage.results import format_bytes, format_metric

FILE = "README.md"
_HOW = {
    "conversations": "conversations, learnt token by token (TRL's SFTTrainer)",
    "completions": "prompts with completions, learnt token by token (TRL's SFTTrainer)",
    "text": "plain texts, learnt token by token (TRL's SFTTrainer)",
    "preferences": "pairs of a chosen and a rejected answer, learnt by DPO (TRL's DPOTrainer)",
}
_TRAINER_OPTIONS = (
    *("learning_rate", "warmup_steps", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "max_seq_length", "packing", "completion_only_loss", "dpo_beta", "bf16", "fp16"),
    *("seed",),
)


def model_card(results: Mapping[str, Any], *, adapter: bool) -> str:
    """The card, in Markdown.

    Args:
        results: What `results.json` holds.
        adapter: Whether the folder holds an adapter; else a whole model.
    """
    model = str(results["model"])
    # The hub takes names of its own alone here.
    named = model if not Path(model).exists() and model.count("/") <= 1 else None
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    head |= {"base_model": named} if named else {}
    head["tags"] = ["meft", *(["lora"] if results["method"].startswith("lora") else [])]
    task = results["task"]
    if task in _HOW:
        head["pipeline_tag"] = "text-generation"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {Path(model).name}, fine-tuned by {results['method']}",
        f"{'An adapter for' if adapter else 'Fine-tuned from'} `{model}`, trained with "
        f"[meft](https://pypi.org/project/meft/) {results['versions'].get('meft', '')} on {_HOW.get(task, task)}.",
        *_loading(results, adapter),
        "## How it was trained",
        *_table(_training(results)),
        "## What came out",
        *_table(_scores(results)),
        *([str(results["verdict"])] if results.get("verdict") else []),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _loading(results: Mapping[str, Any], adapter: bool) -> list[str]:
    if results["task"] not in _HOW:
        return []
    kind, library = ("AutoPeftModelForCausalLM", "peft") if adapter else ("AutoModelForCausalLM", "transformers")
    lines = [
        f"from {library} import {kind}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {kind}.from_pretrained("this folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this folder")',
    ]
    if results["coupling"] and not results["method"].partition("+")[2]:
        lines.insert(0, "import meft  # which makes the method known to PEFT")
    return ["\n".join(["```python", *lines, "```"])]


def _training(results: Mapping[str, Any]) -> dict[str, str]:
    arguments, data = results["arguments"], results.get("data") or {}
    found = {"base model": f"`{results['model']}`", "method": f"{results['method']}: {results['trains']}"}
    options = {name: arguments.get(name) for name in _TRAINER_OPTIONS}
    found |= {"rows": ", ".join(f"{count} {split}" for split, count in results["rows"].items())}
    if arguments.get("train_file"):
        found["data"] = f"`{Path(str(arguments['train_file'])).name}`"
    if data.get("columns"):
        found["columns"] = ", ".join(data["columns"])
    if results.get("settings"):
        found["coupling"] = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    if results["method"].startswith("lora"):
        options |= {name: arguments.get(name) for name in ("lora_rank", "lora_alpha", "lora_dropout")}
    elif results["coupling"] is not None and "+" not in results["method"]:
        options["bottleneck_dim"] = arguments.get("bottleneck_dim")
    if results["task"] != "preferences":
        del options["dpo_beta"]
    found |= {name: str(value) for name, value in options.items() if value not in (None, False, -1, -1.0)}
    found["steps"] = str(results["steps"])
    found["trained parameters"] = f"{results['trainable_parameters']:,} of {results['total_parameters']:,}"
    return found


def _scores(results: Mapping[str, Any]) -> dict[str, str]:
    before, after = results.get("metrics_before") or {}, results["metrics"]
    deployed = results.get("deployed_metrics") or {}
    found = {}
    for name, value in (deployed or after).items():
        was = f" (before training {format_metric(before[name])})" if name in before else ""
        found[f"validation {name.replace('_', ' ')}"] = f"{format_metric(value)}{was}"
    for name, value in after.items() if deployed else ():
        found[f"validation {name.replace('_', ' ')} as trained, with the coupling"] = format_metric(value)
    costs = results.get("costs") or {}
    if costs:
        found["memory of a step (activations)"] = format_bytes(costs["peak_activation_bytes"])
        if costs.get("reference"):
            theirs = costs["reference_peak_activation_bytes"]
            found[f"the same of {costs['reference']}"] = format_bytes(theirs)
    return found


def _table(rows: Mapping[str, str]) -> list[str]:
    if not rows:
        return ["Nothing was measured."]
    cells = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return ["\n".join(["| | |", "|---|---|", *cells])]
