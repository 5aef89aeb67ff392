"""The fastest setting that fits into a budget."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

import meft
from meft.cli import main
from meft.memory.estimation.fitting import fastest_setting
from meft.memory.estimation.report import BudgetError, MemoryEstimate

LAYERS, WEIGHTS, KEPT, LOWEST = 12, 1000, 100, 7


@cache
def config() -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=64, num_hidden_layers=6, **sizes)


@cache
def estimated() -> MemoryEstimate:
    return meft.estimate(config(), method="lora", seq_len=8, device="cpu")


@dataclass(frozen=True)
class Bytes:
    """An estimator of a model of twelve layers, whose bytes are those of a sum."""

    method: str
    options: Mapping[str, Any]

    @property
    def predictor(self) -> Any:
        return SimpleNamespace(depths=(LAYERS, 3))

    def at(self, batch_size: int, seq_len: int) -> MemoryEstimate:
        layers = LAYERS if self.method in ("lora", "adapter") else self.options.get("cached_layers", 0)
        residue = LOWEST if self.options.get("gamma", 1 / 32) < 0.25 else 2
        residues = 0 if self.options.get("residues") == "host" else residue * (LAYERS - layers)
        total = WEIGHTS + KEPT * layers + residues + batch_size * seq_len
        return replace(estimated(), method=self.method, total_bytes=total)


def found(budget: int, method: str = "lora", device: str = "cpu", **options: Any) -> tuple[MemoryEstimate, list[Any]]:
    report, tried = fastest_setting(Bytes, method, options, budget, device, 2, 5)  # type: ignore[arg-type]
    assert all(each.fits == (each.total_bytes <= budget) for each in tried)
    (best,) = {(each.method, str(each.options)) for each in tried if each.total_bytes == report.total_bytes}
    return report, [best, *tried]


def test_where_all_activations_fit_nothing_is_run_twice() -> None:
    report, (_, *tried) = found(WEIGHTS + KEPT * LAYERS + 10)
    assert report.method == "lora" and len(tried) == 1 and tried[0].fits


@pytest.mark.parametrize("cached", range(LAYERS))
def test_as_many_layers_keep_their_activations_as_fit(cached: int) -> None:
    least = WEIGHTS + KEPT * cached + LOWEST * (LAYERS - cached) + 10
    for budget in (least, least + KEPT - LOWEST - 1):
        report, _ = found(budget)
        assert report.method == "lora+momentum" and report.total_bytes == least


def test_beside_a_device_residues_go_to_the_host_before_anything_that_changes_what_is_learnt() -> None:
    _, (best, *_) = found(WEIGHTS + 10, device="cuda")
    assert best == ("lora+momentum", "{'residues': 'host'}")
    _, (best, *_) = found(WEIGHTS + 10 + LOWEST * LAYERS, device="cuda")
    assert best == ("lora+momentum", "{}")


def test_on_a_processor_fewer_bits_are_kept_instead() -> None:
    _, (best, *_) = found(WEIGHTS + 10 + 2 * LAYERS)
    assert best == ("lora+momentum", "{'gamma': 0.25}")


def test_settings_of_the_users_own_stay() -> None:
    _, (_, *tried) = found(WEIGHTS + 10 + LOWEST * LAYERS, gamma=0.125, cached_layers=0)
    assert [(each.method, each.options) for each in tried] == [("lora", {}), ("lora+momentum", {})]


@pytest.mark.parametrize(
    ("method", "least", "needed"),
    [
        ("lora", r"lora\+momentum, gamma=0.25", 2 * LAYERS),
        ("meft1", "meft1", LOWEST * LAYERS),
        ("adapter", "adapter", KEPT * LAYERS),
    ],
)
def test_a_budget_in_which_nothing_fits_says_what_the_least_setting_needs(method: str, least: str, needed: int) -> None:
    with pytest.raises(BudgetError, match=f"no setting fits 2 x 5 tokens: {least} needs") as caught:
        found(WEIGHTS, method)
    assert caught.value.needed == WEIGHTS + needed + 10


def test_estimate_and_the_command_say_it_with_the_lines_to_copy(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    config().save_pretrained(tmp_path)
    sizes = {"batch_size": 4, "seq_len": 64, "dtype": "float32", "optimizer": "sgd", "device": "cpu"}
    budget = meft.estimate(config(), method="lora+momentum", cached_layers=3, **sizes).total_bytes
    words = [f"--{name}={value}" for name, value in sizes.items()]
    with pytest.raises(SystemExit):
        main(["estimate", str(tmp_path), "--budget", f"{budget}B", *words])
    out = capsys.readouterr().out
    assert out.startswith(
        f"In {budget}B, batch 4 x 64: the fastest setting that fits is lora+momentum, cached_layers 3.\n"
    )
    rows = [row.split() for row in out.splitlines() if re.search("lora.* (yes|no) ", row)]
    # From the fastest to the slowest: what fits stands below what does not.
    assert [row[-2] for row in rows] == sorted(row[-2] for row in rows) and {row[-2] for row in rows} == {"yes", "no"}
    assert 'meft.make_reversible(model, coupling="momentum", cached_layers=3)' in out
