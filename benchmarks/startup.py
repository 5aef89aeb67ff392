"""How long it takes until a command says something: the median of some runs, each in a process of its own.

python benchmarks/startup.py --runs 5

A benchmark and no test, since it depends on the machine and on what else it does; what may be imported is tested
(tests/project/test_imports.py). `python -X importtime` shows where the time goes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

STATEMENTS = {
    "python": "pass",
    "import meft": "import meft",
    "meft --help": "import sys; sys.argv = ['meft', '--help']; from meft.cli import main; main()",
    "meft run --help": "import sys; sys.argv = ['meft', 'run', '--help']; from meft.cli import main; main()",
    "meft train --help": "import sys; sys.argv = ['meft', 'train', '--help']; from meft.cli import main; main()",
}


def seconds(statement: str) -> float:
    """From the start of a process to its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Prints a line a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    for name, statement in STATEMENTS.items():
        times = [seconds(statement) for _ in range(runs)]
        print(f"{name}: {statistics.median(times):.2f} s (from {min(times):.2f} to {max(times):.2f})")


if __name__ == "__main__":
    main()
