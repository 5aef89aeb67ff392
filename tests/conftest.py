"""What every test shares: one thread, and a known random state."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--unmended", action="store_true", help="run what tests/unmended.txt lists, and nothing else")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps apart what tests/unmended.txt lists: files, and functions with all their parameters."""
    lines = (Path(__file__).parent / "unmended.txt").read_text(encoding="utf-8").splitlines()
    listed = {line.partition("#")[0].strip() for line in lines} - {""}
    unmended = [
        item for item in items if item.nodeid.partition("[")[0] in listed or item.nodeid.partition("::")[0] in listed
    ]
    mended = [item for item in items if item not in set(unmended)]
    kept, left_out = (unmended, mended) if config.getoption("--unmended") else (mended, unmended)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state, whatever ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
