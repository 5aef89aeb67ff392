"""Memory and time of every way to fine-tune, side by side.

    python benchmarks/run.py                       # everything
    python benchmarks/run.py --parts times         # one part; the others stay as they were measured
    python benchmarks/run.py --quick               # small shapes, seconds, to see that everything runs

`classifier`: a RoBERTa-large shape. `decoders`: Llama shapes over lengths and depths, bfloat16. `head`: one of them
with a vocabulary head. `times`: time of a step. `speed`: where it goes, and tokens a second in equal memory. `fake`:
shapes of known models on tensors without values. `gpu`: longest sequences on an accelerator, where there is one.

Memory is the peak of a forward and backward pass by `meft.measure`, the same in every run. Times are medians over
rounds of alternating steps, of the ratios within a round; only these ratios mean anything, and those of a busy machine
little: the result names its load.

Writes benchmarks.json, benchmarks.md and figures (SVG) to benchmarks/results, and puts the tables into
research/benchmarks.md. With --quick or --output they go to another folder, and the page stays as it is.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import save_figures
from measuring import use_threads
from parts import FULL_SIZES, PARTS, QUICK_SIZES, Sizes, count
from tables import as_markdown, put_into_page, section
from tqdm import tqdm
from transformers.utils import logging

from meft.storage.files import read_json, write_json, write_text
from meft.storage.results import hardware, now, versions

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "research" / "benchmarks.md"
NAME = "benchmarks"


def main(words: Sequence[str] | None = None) -> Path:
    """Runs the parts asked for and returns the folder of the results."""
    arguments = parse(words)
    use_threads(arguments.threads)
    logging.set_verbosity_error()
    sizes = QUICK_SIZES if arguments.quick else FULL_SIZES
    folder = arguments.output or (Path(tempfile.mkdtemp(prefix="meft-benchmarks-")) if arguments.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{NAME}.json"
    measured: dict[str, Any] = read_json(file) if file.is_file() else {}
    command = shlex.join(["python", "benchmarks/run.py", *(sys.argv[1:] if words is None else words)])
    for part in arguments.parts:
        measured[part] = run_part(part, sizes, command, arguments.rounds)
        print(f"\n{section(part, measured)}\n")
        # After every part: an hour's work is not lost by what comes later.
        write_results(measured, folder)
    print(section("targets", measured))
    print(f"\nWritten to {folder}")
    return folder


def run_part(part: str, sizes: Sizes, command: str, rounds: int | None) -> dict[str, Any]:
    """One part's results with their provenance; a bar on standard error says what is running."""
    if rounds is not None:
        sizes = Sizes(**{**vars(sizes), "rounds": rounds})
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    begun = time.perf_counter()
    with tqdm(total=count(part, sizes), desc=part, unit="step") as bar:

        def progress(words: str) -> None:
            bar.set_postfix_str(words)
            bar.update()

        found = PARTS[part](sizes, progress)
    return {
        **found,
        "part_seconds": round(time.perf_counter() - begun, 1),
        "command": command,
        "date": now(),
        "hardware": hardware() | {"load_before": load},
        "versions": versions(),
    }


def write_results(measured: dict[str, Any], folder: Path) -> None:
    """Every file is written beside its place and renamed."""
    write_json(folder / f"{NAME}.json", measured)
    write_text(folder / f"{NAME}.md", as_markdown(measured))
    save_figures(measured, folder)
    if folder == RESULTS and PAGE.is_file():
        write_text(PAGE, put_into_page(PAGE.read_text(encoding="utf-8"), measured))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure (all)")
    parser.add_argument("--quick", action="store_true", help="small shapes and few steps, into a temporary folder")
    parser.add_argument("--rounds", type=int, help=f"timed steps of each method ({FULL_SIZES.rounds})")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (2)")
    parser.add_argument("--output", type=Path, help="folder of the result files (benchmarks/results)")
    arguments = parser.parse_args(words)
    for name in ("rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; it must be at least 1.")
    return arguments


if __name__ == "__main__":
    main()
