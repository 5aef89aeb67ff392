"""The tables of `run.py`: for its own Markdown file and for research/benchmarks.md, all computed from its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from measuring import title_of
from peers import BLOCKS, CHECKPOINTING, FULL, LAYERS, TILES

from meft.memory.measurement.causes import CAUSES

MIB, GIB = 2**20, 2**30
BITS_OF_RESIDUES, BITS_OF_CHECKPOINTS = 2 * 2, 16
_SAME = ("family", "layers", "width", "sequence", "batch", "dtype", "vocabulary")
Found = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """What was to be reached, and what was.

    Attributes:
        text: What it is about.
        limit: At most this was to be reached.
        reached: None if it was not measured.
        form: How both numbers are written.
        digits: Decimals that are compared; None for all.
    """

    text: str
    limit: float
    reached: float | None
    form: str
    digits: int | None = None

    @property
    def met(self) -> str:
        if self.reached is None:
            return "not measured"
        reached = self.reached if self.digits is None else round(self.reached, self.digits)
        return "yes" if reached <= self.limit else "no"


def targets(measured: Mapping[str, Found]) -> list[Target]:
    """The targets of this project's memory work, and what the results say of each."""
    found: list[Target] = []
    decoders, times = measured.get("decoders"), measured.get("times")
    if decoders is not None:
        for subject, of_full, of_lora in (("wide", 0.04, 0.45), ("deep", 0.025, 0.40)):
            shape = decoders[subject]
            for other, limit in ((FULL, of_full), (CHECKPOINTING, of_lora)):
                text = f"{title_of(shape)}: activations of {TILES}, of {other}"
                found.append(Target(text, limit, _share(decoders["rows"], shape, TILES, other), "{:.1%}"))
        for shape, bits in added_bits(decoders):
            if TILES in bits:
                text = f"{title_of(shape)}: bits an element that a further layer adds, {TILES}"
                # A few bytes a layer besides are for the check of the rebuilt streams, whatever their size.
                found.append(Target(text, BITS_OF_RESIDUES, bits[TILES], "{:.2f}", digits=2))
    for run in (times or {}).get("runs", ()):
        text = f"{title_of(run)}: time of a step of {TILES}, of {CHECKPOINTING}"
        found.append(Target(text, 1.1, run["ratios"][TILES], "{:.2f}"))
    for row in measured.get("classifier", {}).get("rows", ()):
        if row["method"] == "meft1":
            share = _share(measured["classifier"]["rows"], row, "meft1", FULL)
            found.append(Target(f"{title_of(row)}: activations of meft1 (exact), of full", 0.1, share, "{:.1%}"))
    return found


def targets_table(measured: Mapping[str, Found]) -> str:
    rows = [["target", "at most", "reached", "met"]]
    for target in targets(measured):
        reached = "" if target.reached is None else target.form.format(target.reached)
        rows.append([target.text, target.form.format(target.limit), reached, target.met])
    return table(rows)


def added_bits(decoders: Found) -> Iterator[tuple[Found, dict[str, float]]]:
    """Bits an element of the hidden state that one more layer adds at the peak, from two depths of one decoder."""
    rows = decoders["rows"]
    for subject in ("wide", "deep"):
        shape = decoders[subject]
        depths = sorted({row["layers"] for row in rows if _matches(row, shape, ("layers",))})
        if len(depths) < 2:
            continue
        low, high = ({**shape, "layers": depths[place]} for place in (-2, -1))
        bits = {}
        for method in _methods(rows):
            few, many = _bytes(rows, low, method), _bytes(rows, high, method)
            if few is not None and many is not None:
                elements = shape["batch"] * shape["sequence"] * shape["width"]
                bits[method] = 8 * (many - few) / (high["layers"] - low["layers"]) / elements
        yield {**high, "from": low["layers"]}, bits


def layers_table(decoders: Found) -> str:
    measured = list(added_bits(decoders))
    header = [f"{shape['width']} wide, {shape['from']} to {shape['layers']} layers" for shape, _ in measured]
    rows = [
        ["a further layer adds", *(f"{title}: {unit}" for title in header for unit in ("bytes", "bits an element"))]
    ]
    for method in _methods(decoders["rows"]):
        if not all(method in bits for _, bits in measured):
            continue
        cells = []
        for shape, bits in measured:
            elements = shape["batch"] * shape["sequence"] * shape["width"]
            cells += [f"{bits[method] * elements / 8:,.0f}", f"{bits[method]:.2f}"]
        rows.append([method, *cells])
    known = f"For comparison: two residues of 2 bits an element are {BITS_OF_RESIDUES}, a bfloat16 checkpoint "
    return f"{table(rows)}\n\n{known}{BITS_OF_CHECKPOINTS}."


def causes_table(rows: Sequence[Found], shape: Found, methods: Sequence[str]) -> str:
    """What the peak of activations is made of, in MiB."""
    chosen = {method: row for method in methods if (row := _row(rows, shape, method)) is not None}
    lines = [["at the peak, MiB", *chosen]]
    for cause in CAUSES:
        sizes = [row["activation_causes"][cause] for row in chosen.values()]
        if any(sizes):
            lines.append([cause, *(f"{size / MIB:.2f}" for size in sizes)])
    lines.append(["sum", *(f"{row['activation_peak_bytes'] / MIB:.2f}" for row in chosen.values())])
    return table(lines)


def memory_table(rows: Sequence[Found], keys: Sequence[str] = _SAME) -> str:
    """Peaks of activations by method, one column a shape, each with its shares of full and LoRA + checkpointing."""
    shapes = list({tuple(row[key] for key in keys): row for row in rows}.values())
    lines = [["method", *(f"{row['sequence']} tokens, MiB (of full, of LoRA + ck.)" for row in shapes)]]
    for method in _methods(rows):
        cells = []
        for shape in shapes:
            found = _bytes(rows, shape, method, keys)
            shares = [_share(rows, shape, method, other, keys) for other in (FULL, CHECKPOINTING)]
            words = ", ".join("" if share is None else f"{share:.1%}" for share in shares)
            cells.append("" if found is None else f"{found / MIB:,.1f} ({words})")
        lines.append([method, *cells])
    return table(lines)


def classifier_section(found: Found) -> str:
    first = found["rows"][0]
    return (
        f"RoBERTa, {first['layers']} x {first['width']}, batch {first['batch']}, {first['dtype']}.\n\n"
        + memory_table(found["rows"])
    )


def decoders_section(found: Found) -> str:
    parts = []
    for subject in ("wide", "deep"):
        shape, rows = found[subject], found["rows"]
        lengths = [row for row in rows if _matches(row, shape, ("sequence",))]
        parts.append(f"Llama, {shape['layers']} x {shape['width']}, batch {shape['batch']}, {shape['dtype']}.")
        parts.append(memory_table(lengths))
        parts.append(f"The tensors of the peak by cause, {title_of(shape)}:")
        parts.append(causes_table(rows, shape, (FULL, CHECKPOINTING, LAYERS, BLOCKS, TILES)))
    return "\n\n".join([*parts, layers_table(found)])


def head_section(found: Found) -> str:
    first = found["rows"][0]
    causes = causes_table(found["rows"], first, _methods(found["rows"]))
    return f"{title_of(first)}.\n\n{memory_table(found['rows'])}\n\n{causes}"


def times_section(found: Found) -> str:
    parts = []
    for run in found["runs"]:
        rows = [["method", "step, s", f"of {run['reference']}"]]
        for method, seconds in run["seconds"].items():
            rows.append([method, f"{median(seconds):.3f}", f"{run['ratios'][method]:.3f}"])
        parts.append(f"{title_of(run)}, {run['dtype']}, {run['rounds']} rounds.\n\n{table(rows)}")
    return "\n\n".join(parts)


def speed_section(found: Found) -> str:
    parts = []
    for run in found["runs"]:
        rows = [["method", "step, s", f"of {run['reference']}", "processor, s", f"of {run['reference']}, processor"]]
        for method, seconds in run["seconds"].items():
            processor = median(run["processor_seconds"][method])
            ratios = [f"{run[key][method]:.3f}" for key in ("ratios", "processor_ratios")]
            rows.append([method, f"{median(seconds):.3f}", ratios[0], f"{processor:.3f}", ratios[1]])
        parts.append(f"{title_of(run)}, {run['dtype']}, {run['rounds']} rounds.\n\n{table(rows)}")
        methods = [method for method in run["work"] if method != run["reference"]]
        lines = [["seconds of the processor", *methods]]
        for label in run["work"][methods[0]]:
            lines.append([label, *(f"{run['work'][method][label]:.3f}" for method in methods)])
        parts.append(table(lines))
    for run in found["equal"]:
        rows = [["method", "sequences", "tokens a second", f"of {run['reference']}"]]
        for method, tokens in run["tokens_a_second"].items():
            rows.append([method, f"{run['batches'][method]}", f"{median(tokens):,.0f}", f"{run['ratios'][method]:.3f}"])
        parts.append(
            f"{title_of(run)}, within the {run['budget_bytes'] / MIB:.1f} MiB of activations that {run['reference']} "
            f"takes, {run['rounds']} rounds.\n\n{table(rows)}"
        )
    return "\n\n".join(parts)


def fake_section(found: Found) -> str:
    parts = []
    for name in dict.fromkeys(row["model"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["model"] == name]
        first = rows[0]
        parts.append(f"{name}, batch {first['batch']}, {first['dtype']}: activations.")
        parts.append(memory_table(rows, ("model", "sequence")))
        lengths = list(dict.fromkeys(row["sequence"] for row in rows))
        lines = [["method", *(f"{length} tokens, GiB" for length in lengths)]]
        for method in _methods(rows):
            sizes = [_row(rows, {"model": name, "sequence": n}, method, ("model", "sequence")) for n in lengths]
            lines.append([method, *("" if row is None else f"{row['total_bytes'] / GIB:.2f}" for row in sizes)])
        parts += [f"The same with weights, gradients and the state of {first['optimizer']}.", table(lines)]
    return "\n\n".join(parts)


def gpu_section(found: Found) -> str:
    if "skipped" in found:
        return f"The part for an accelerator was {found['skipped']}"
    rows = [["model", "method", "longest sequence", "tokens a second", "max_memory_allocated, GiB"]]
    for row in found["rows"]:
        if row["longest_sequence"] is None:
            rows.append([row["model"], row["method"], "does not fit", "", ""])
            continue
        cells = [f"{row['tokens_a_second']:,.0f}", f"{row['max_memory_allocated'] / GIB:.1f}"]
        rows.append([row["model"], row["method"], f"{row['longest_sequence']:,}", *cells])
    return f"Within {found['budget_bytes'] / GIB:.0f} GiB.\n\n{table(rows)}"


SECTIONS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "classifier": ("A sentence classifier", classifier_section),
    "decoders": ("Decoders", decoders_section),
    "head": ("With a vocabulary head", head_section),
    "times": ("Time of a step", times_section),
    "speed": ("Where the time goes", speed_section),
    "fake": ("Known shapes, estimated", fake_section),
    "gpu": ("On an accelerator", gpu_section),
}
TARGETS = "targets"


def section(part: str, measured: Mapping[str, Found]) -> str:
    """One part's tables, and where they come from."""
    if part == TARGETS:
        return targets_table(measured)
    found = measured[part]
    machine = ", ".join(f"{name} {value}" for name, value in found["hardware"].items())
    libraries = ", ".join(f"{name} {value}" for name, value in found["versions"].items())
    source = f"Measured {found['date'][:10]} by `{found['command']}` on {machine}; {libraries}."
    return f"{SECTIONS[part][1](found)}\n\n{source}"


def as_markdown(measured: Mapping[str, Found]) -> str:
    parts = [f"## Targets\n\n{section(TARGETS, measured)}\n"]
    parts += [f"## {title}\n\n{section(part, measured)}\n" for part, (title, _) in SECTIONS.items() if part in measured]
    return "# Benchmarks\n\n" + "\n".join(parts)


def put_into_page(page: str, measured: Mapping[str, Found]) -> str:
    """Replaces what stands between `<!-- part -->` and `<!-- end of part -->` for every part that was measured."""
    for part in (TARGETS, *SECTIONS):
        if part == TARGETS or part in measured:
            begin, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
            before, rest = page.split(begin)
            page = f"{before}{begin}\n{section(part, measured)}\n{end}{rest.split(end)[1]}"
    return page


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    words = ("seconds of the processor", "target", "met", "model", "method", "at the peak, MiB", "a further layer adds")
    alignment = ["---" if name in words else "---:" for name in head]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, alignment, *body])


def _methods(rows: Sequence[Found]) -> list[str]:
    """In the order in which they were measured first."""
    return list(dict.fromkeys(row["method"] for row in sorted(rows, key=lambda row: -_count(rows, row))))


def _count(rows: Sequence[Found], row: Found) -> int:
    """How many methods were measured on what this row was: where all were, they stand in their order."""
    keys = [key for key in ("model", *_SAME) if key in row]
    return sum(_matches(other, row, (), keys) for other in rows)


def _matches(row: Found, shape: Found, but: Sequence[str], keys: Sequence[str] = _SAME) -> bool:
    return all(row[key] == shape[key] for key in keys if key not in but)


def _row(rows: Sequence[Found], shape: Found, method: str, keys: Sequence[str] = _SAME) -> Found | None:
    return next((row for row in rows if row["method"] == method and _matches(row, shape, (), keys)), None)


def _bytes(rows: Sequence[Found], shape: Found, method: str, keys: Sequence[str] = _SAME) -> int | None:
    row = _row(rows, shape, method, keys)
    return None if row is None else row["activation_peak_bytes"]


def _share(rows: Sequence[Found], shape: Found, method: str, other: str, keys: Sequence[str] = _SAME) -> float | None:
    ours, theirs = _bytes(rows, shape, method, keys), _bytes(rows, shape, other, keys)
    return None if ours is None or theirs is None else ours / theirs
