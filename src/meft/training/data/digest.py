"""A digest of rows, by which a run that goes on knows the rows that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from .base import TaskData


def digests(data: TaskData) -> dict[str, str]:
    """SHA-256 of the rows of each split and of the names of their labels, whatever file or layout they came from."""
    return {split: _digest(rows, data.spec.labels) for split, rows in data.splits.items()}


def _digest(rows: Dataset, labels: Sequence[str]) -> str:
    found = hashlib.sha256()
    _feed(found, [*labels, *sorted(rows.column_names)])
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for row in table.to_pylist():
            _feed(found, row)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    """Hashes a value with its length before it, so that no two rows run into one another."""
    if isinstance(value, Mapping):
        # An image is its bytes, wherever they lie.
        names = ["bytes"] if isinstance(value.get("bytes"), bytes) else sorted(value)
        value = [part for name in names for part in (name, value[name])]
    if isinstance(value, list | tuple):
        found.update(b"[%d" % len(value))
        for part in value:
            _feed(found, part)
        return
    if not isinstance(value, bytes):
        value = (value if isinstance(value, str) else repr(value)).encode("utf-8", "surrogatepass")
    found.update(b"%d:" % len(value))
    found.update(value)
