"""The tables of `exactness.py`, for its own Markdown file and for research/exactness.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

FIGURE_MODEL = "BERT, pretrained, repeated"
# Errors above this are no longer those of rounding: the layers see other inputs.
SMALL = 1e-2


def errors_table(found: dict[str, Any]) -> str:
    header = ["model", "coupling", "streams", "after 1 layer", f"after {found['depth']}", "growth a layer"]
    header += ["layers within 1%", "gradients"]
    rows = [header]
    for model, couplings in found["models"].items():
        for coupling, runs in couplings.items():
            for arithmetic, run in runs.items():
                errors = [math.inf if error is None else error for error in run["relative"]]
                within = next((depth for depth, error in enumerate(errors) if error > SMALL), len(errors))
                gradients = math.inf if run["gradient_error"] is None else run["gradient_error"]
                cells = [number(errors[0]), number(errors[-1]), growth(errors), str(within), number(gradients)]
                rows.append([model, coupling, arithmetic, *cells])
    return table(rows)


def growth(errors: Sequence[float]) -> str:
    """The mean factor from layer to layer while the error is small; empty where there is none."""
    small = [error for error in errors if 0 < error <= SMALL]
    if len(small) < 2:
        return ""
    return f"{(small[-1] / small[0]) ** (1 / (len(small) - 1)):.1f}"


def bytes_table(found: dict[str, Any]) -> str:
    rows = [["coupling", "1/factors", "bits an element a layer", "of a 16 bit hidden state"]]
    for row in found["rows"]:
        kept = row["bytes_an_element_a_layer"]
        inverses = ", ".join(map(str, row["inverse_factors"]))
        rows.append([row["coupling"], inverses, f"{8 * kept:g}", f"{kept / found['hidden_state']:.0%}"])
    return table(rows)


def times_table(found: dict[str, Any]) -> str:
    ours: dict[str, dict[str, float]] = {}
    for entry in found["ratios"]:
        ours.setdefault(entry["of"], {})[entry["to"]] = entry["wall"]
    rows = [["method", "step, s", "against float", "against LoRA + checkpointing"]]
    for name, seconds in found["seconds"].items():
        ratios = ours.get(name, {})
        to_float = next((f"{value:.3f}" for other, value in ratios.items() if other.endswith("float")), "")
        to_lora = next((f"{value:.3f}" for other, value in ratios.items() if other.startswith("LoRA +")), "")
        rows.append([name, f"{median(seconds):.3f}", to_float, to_lora])
    return table(rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "errors": errors_table,
    "bytes": bytes_table,
    "times": times_table,
}
_NOTES = {
    "errors": "`meft.verify` on two short texts, dropout 0.1: relative error of the rebuilt streams, its mean growth "
    "from layer to layer while it is below 1%, how many layers are rebuilt within 1%, and the largest relative "
    'difference of a gradient to `backward="cached"`.',
    "bytes": "What the autograd node of a reversible layer saves; a call that draws random numbers keeps the state of "
    "the generators besides ({generator_state:,} bytes on the CPU).",
    "times": "Forward and backward pass of a BERT with {shape[layers]} layers x {shape[width]} in {shape[dtype]} on "
    "{shape[batch]} x {shape[sequence]} tokens: medians of {rounds} alternating steps in one process, of the times and "
    "of the ratios within a round.",
}


def section(part: str, found: dict[str, Any]) -> str:
    """One part's table, what it shows, and where it comes from."""
    machine = ", ".join(f"{name} {value}" for name, value in found["hardware"].items())
    libraries = ", ".join(f"{name} {value}" for name, value in found["versions"].items())
    lines = [TABLES[part](found), "", _NOTES[part].format(**found), ""]
    lines += [f"Measured {found['date'][:10]} by `{found['command']}` on {machine}; {libraries}."]
    return "\n".join(lines)


def as_markdown(measured: dict[str, Any]) -> str:
    titles = {"errors": "Error against depth", "bytes": "Bytes kept", "times": "Time of a step"}
    parts = [f"## {titles[part]}\n\n{section(part, measured[part])}\n" for part in TABLES if part in measured]
    return "# Exactness\n\n" + "\n".join(parts)


def put_into_page(page: str, measured: dict[str, Any]) -> str:
    """Replaces what stands between `<!-- part -->` and `<!-- end of part -->` for every part that was measured."""
    for part in TABLES:
        if part in measured:
            begin, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
            block = f"{begin}\n{section(part, measured[part])}\n{end}"
            before, rest = page.split(begin)
            page = before + block + rest.split(end)[1]
    return page


def curves(found: dict[str, Any]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The figure's panels: by coupling, (layers rebuilt, error) by arithmetic, the exact ones as one by their worst."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for coupling, runs in found["models"][FIGURE_MODEL].items():
        panel: dict[str, list[float]] = {}
        for name, run in runs.items():
            errors = [math.inf if error is None else error for error in run["relative"]]
            label = "exact (float32, bfloat16)" if name.startswith("exact") else name
            panel[label] = [max(pair) for pair in zip(errors, panel.get(label, errors), strict=True)]
        panels[coupling] = {label: list(enumerate(errors, start=1)) for label, errors in panel.items()}
    return panels


def number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.0e}" if math.isfinite(value) else "not finite"


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    alignment = [
        "---" if head[index] in ("model", "coupling", "streams", "method") else "---:" for index in range(len(head))
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, alignment, *body])
