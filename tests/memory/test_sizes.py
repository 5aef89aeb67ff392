from __future__ import annotations

import pytest

from meft.errors import ConfigError
from meft.memory.estimation.search import largest
from meft.memory.estimation.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("24000MiB", 24000 * 2**20),
        (" 1.5 gib ", 3 * 2**29),
        ("0.5kB", 500),
        (".5KiB", 512),
        ("7B", 7),
        (1024, 1024),
        (2.0, 2),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "24", "24GiBs", "24 G", "-1GiB", "0GiB", "0.1B", "1,5GiB", 0, -5, True, "nan", float("inf")]
)
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text)

    assert str(caught.value) == (
        f"budget is {text!r}, which is no size. Give a number above 0 with a unit, for example 24GiB, 24GB or 24000MiB "
        "(1 GiB = 1024**3 bytes, 1 GB = 1000**3 bytes)."
    )


@pytest.mark.parametrize("need", [lambda n: 7 * n + 100, lambda n: n * n + 3 * n, lambda n: n // 10 * 50, lambda n: 5])
@pytest.mark.parametrize("budget", [5, 107, 130, 999, 12345, 10**6])
@pytest.mark.parametrize(("low", "high"), [(1, 1000), (2, 3), (4, 4)])
def test_the_largest_that_fits(need, budget: int, low: int, high: int) -> None:
    fitting = [size for size in range(low, high + 1) if need(size) <= budget]

    assert largest(need, budget, low, high) == (max(fitting, default=None), need(low))


def test_few_sizes_are_tried() -> None:
    tried: list[int] = []

    def need(size: int) -> int:
        tried.append(size)
        return 2 * size * size + 300 * size + 10**6

    assert largest(need, 10**9, 2, 2**20)[0] == 22274
    assert len(tried) <= 16
