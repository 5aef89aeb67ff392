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


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> None:
    """Collecting garbage looks at what the tests of one module made, and not again at every imported library.

    The Trainer collects at every start, and Python whenever enough was made: with PyTorch, Transformers and TRL in
    memory a fifth of a short test would go into it.
    """
    gc.collect()
    gc.freeze()
