"""Starts two processes, as `accelerate launch` does for users, and reads what they found.

>>> found = launch("ddp_worker.py", tmp_path)
>>> found["meft1"]["gradients"]
2.1e-07
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "examples"
CONFIGURATIONS = EXAMPLES / "accelerate"
LAUNCHER = ("-m", "accelerate.commands.launch")


def environment() -> dict[str, str]:
    """One thread a process, the loopback device for gloo, the CPU for accelerate, and the tests' own modules."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def launch(
    script: str | Path,
    folder: Path,
    *arguments: str,
    configuration: str = "ddp.yaml",
    processes: int = 2,
    seconds: int = 300,
) -> dict[str, Any]:
    """Runs a worker of `tests/support` under `accelerate launch`; it is given a file to write its findings to.

    Returns:
        What the worker wrote: a JSON object.

    Raises:
        AssertionError: a process failed, with the end of what they printed.
    """
    findings = folder / "findings.json"
    command = launcher(configuration, processes)
    run([*command, str(TESTS / "support" / script), str(findings), *arguments], seconds)
    return json.loads(findings.read_text())


def launcher(configuration: str = "ddp.yaml", processes: int = 2) -> list[str]:
    """The command up to the script: a configuration that users are given, with two processes on one machine."""
    file = CONFIGURATIONS / configuration
    return [sys.executable, *LAUNCHER, f"--config_file={file}", f"--num_processes={processes}", "--main_process_port=0"]


def run(command: Sequence[str], seconds: int = 300) -> str:
    """Runs a command to its end; its children end with it."""
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode == 0, output[-9000:]
    return output
