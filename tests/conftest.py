"""What every test shares: one thread, and a known random state."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state, whatever ran before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def quick_collection() -> Iterator[None]:
    """The Trainer collects garbage at every start; most of a test would go into looking at what was imported."""
    gc.freeze()
    yield
    gc.unfreeze()
