"""What a run says at its end: the table on the screen and `results.json`."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import torch
from rich.table import Table

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "scikit-learn", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python, `meft` and the libraries that decide a run's figures."""
    found = {"python": platform.python_version()}
    for name in ("meft", *_PACKAGES):
        with suppress(metadata.PackageNotFoundError):  # those that only some tasks need
            found[name] = metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """The machine: processor, usable cores, threads of PyTorch, and the GPU if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"processor": _processor(), "cores": cores, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def provenance(command: str) -> dict[str, Any]:
    """What every file of results says of where it comes from: the command, the time, the versions, the machine."""
    return {"command": command, "date": now(), "versions": versions(), "hardware": hardware()}


def summary_table(results: Mapping[str, Any]) -> Table:
    """The table printed at the end of a run."""
    table = Table(title=f"{results['method']} on {results['task']}", title_justify="left")
    table.add_column("")
    table.add_column(results["method"], justify="right")
    costs = results.get("costs") or {}
    reference = costs.get("reference")
    if reference:
        table.add_column(reference, justify="right")
    for label, ours, theirs in _rows(results, costs):
        table.add_row(label, ours, *([theirs] if reference else []))
    return table


def metrics_table(metrics: Mapping[str, float | None], title: str) -> Table:
    """The table printed by `meft evaluate`."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in metrics.items():
        table.add_row(name.replace("_", " "), format_metric(value))
    return table


def format_metric(value: float | None) -> str:
    """Four digits, enough for the last row of any GLUE task to show."""
    return "undefined" if value is None else f"{value:.4f}"


def format_bytes(count: int | None) -> str:
    """`1536` as `1.5 KiB`."""
    if count is None:
        return ""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _rows(results: Mapping[str, Any], costs: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    trainable, total = results["trainable_parameters"], results["total_parameters"]
    rows = [(name.replace("_", " "), format_metric(value), "") for name, value in results["metrics"].items()]
    deployed = results.get("deployed_metrics") or {}
    rows += [
        (f"{name.replace('_', ' ')} on the plain model", format_metric(value), "") for name, value in deployed.items()
    ]
    rows.append(("trainable parameters", f"{trainable:,} ({trainable / total:.2%})", ""))
    if costs:
        ours, theirs = costs["peak_activation_bytes"], costs["reference_peak_activation_bytes"]
        rows.append(("peak activation memory", format_bytes(ours), format_bytes(theirs)))
        rows += _cause_rows(costs.get("peak_activation_causes"), costs.get("reference_peak_activation_causes"))
        seconds, their_seconds = costs["step_seconds"], costs["reference_step_seconds"]
        ratio = results["step_time_ratio"]
        rows.append(("time of a step", _seconds(seconds), _seconds(their_seconds)))
        if ratio is not None:
            rows.append(("  as a ratio", f"{ratio:.2f}", "1"))
    return rows


def _cause_rows(ours: Mapping[str, int] | None, theirs: Mapping[str, int] | None) -> list[tuple[str, str, str]]:
    """What the memory is for, under its sum."""
    rows = []
    for cause, size in (ours or {}).items():
        other = (theirs or {}).get(cause, 0)
        if size or other:
            rows.append((f"  {cause}", format_bytes(size or None), format_bytes(other or None)))
    return rows


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
