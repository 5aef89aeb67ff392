"""How near `meft.estimate` comes to measured steps, on the combinations that the tests check.

    python benchmarks/estimates.py          # seven families, every method, a minute
    python benchmarks/estimates.py --slow   # all the others as well, ten minutes

Both sides are peaks above what was live before the step: one of a real forward and backward pass on the CPU, by
`meft.measure`; one of tensors without values, by `meft.estimate`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

from meft.storage.files import write_json, write_text
from meft.storage.results import hardware, now, versions

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="the slow combinations as well")
    arguments = parser.parse_args()
    # The combinations and the real steps are those of the tests.
    sys.path.insert(0, str(ROOT / "tests"))
    from memory.test_accuracy import FAST, SLOW, compare, name  # type: ignore[import-not-found]

    warnings.simplefilter("ignore")
    cases = [*FAST, *(SLOW if arguments.slow else [])]
    rows = [row(name(case), *compare(*case)) for case in cases]
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "date": now(),
        "largest_error": max(abs(found["peak_error"]) for found in rows),
        "within_one_percent": sum(abs(found["peak_error"]) < 0.01 for found in rows),
        "combinations": rows,
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(RESULTS / "estimates.json", result)
    text = markdown(result)
    write_text(RESULTS / "estimates.md", text)
    print(text)


def row(case: str, predicted: Any, measured: Any) -> dict[str, Any]:
    return {
        "case": case,
        "predicted_peak_bytes": predicted.peak_bytes,
        "measured_peak_bytes": measured.peak_bytes,
        "peak_error": predicted.peak_bytes / measured.peak_bytes - 1,
        "predicted_causes": predicted.causes,
        "measured_causes": measured.causes,
    }


def markdown(result: dict[str, Any]) -> str:
    rows = result["combinations"]
    lines = [
        "# Estimated against measured peaks",
        "",
        f"Of {len(rows)} combinations {result['within_one_percent']} are estimated within 1%, and none is further off "
        f"than {result['largest_error']:.1%}.",
        "",
        "| combination | measured, KiB | estimated, KiB | error |",
        "|---|---:|---:|---:|",
        *(
            f"| {found['case']} | {found['measured_peak_bytes'] / 1024:.1f} | "
            f"{found['predicted_peak_bytes'] / 1024:.1f} | {found['peak_error']:+.2%} |"
            for found in rows
        ),
        "",
        f"- command: `{result['command']}`",
        f"- date: {result['date']}",
        f"- hardware: {', '.join(f'{name} {value}' for name, value in result['hardware'].items())}",
        f"- versions: {', '.join(f'{name} {value}' for name, value in result['versions'].items())}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
