"""Rows of a step shared out among processes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from meft.errors import ConfigError
from meft.training.batches import share_batch
from support import tiny


def arguments(processes: int, size: int, accumulated: int = 1) -> Any:
    return SimpleNamespace(
        world_size=processes, n_gpu=0, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated
    )


@pytest.mark.parametrize(("total", "processes", "size", "steps"), [(32, 1, 8, 4), (32, 4, 8, 1), (24, 3, 4, 2)])
def test_rows_of_a_step(total: int, processes: int, size: int, steps: int) -> None:
    given = arguments(processes, size)
    share_batch(total, given)
    assert given.gradient_accumulation_steps == steps


def test_nothing_is_asked_for() -> None:
    given = arguments(3, 8, accumulated=5)
    share_batch(None, given)
    assert given.gradient_accumulation_steps == 5


@pytest.mark.parametrize(
    ("total", "processes", "size", "message"),
    [
        (
            32,
            3,
            4,
            "total_train_batch_size is 32, which 3 processes with per_device_train_batch_size 4 cannot share evenly: "
            "it must be a multiple of 12. Take 24 or 36, another per_device_train_batch_size, or another number of "
            "processes.",
        ),
        (4, 1, 8, "which 1 process with per_device_train_batch_size 8 cannot share evenly: it must be a multiple of 8. "
                  "Take 8, another"),
        (0, 2, 1, "must be a multiple of 2. Take 2, another"),
    ],
)  # fmt: skip
def test_a_world_size_that_does_not_divide(total: int, processes: int, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        share_batch(total, arguments(processes, size))


def test_two_ways_to_say_it() -> None:
    with pytest.raises(ConfigError, match="is 32 and gradient_accumulation_steps 2, but the second follows"):
        share_batch(32, arguments(1, 8, accumulated=2))


def test_meft_train_takes_it(tmp_path: Path) -> None:
    model, rte = tiny.make_model(tmp_path / "model"), tiny.make_rte(tmp_path / "RTE")
    words = ["--max_steps=1", "--per_device_train_batch_size=2", "--method=lora"]
    data = ["--task=rte", f"--data_dir={rte}"]
    found = tiny.train(model, data, tmp_path / "run", *words, "--total_train_batch_size=6")
    assert found["arguments"]["gradient_accumulation_steps"] == 3
    with pytest.raises(ConfigError, match="Take 4 or 6, another"):
        tiny.train(model, data, tmp_path / "other", *words, "--total_train_batch_size=5")


def test_accumulated_batches_make_the_step_of_one_batch(tmp_path: Path) -> None:
    """Also in size: the loss of a classifier is a mean over rows, however many batches they come in."""
    model, rte = tiny.make_model(tmp_path / "model"), tiny.make_rte(tmp_path / "RTE")
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    words = ["--method=meft1", "--max_steps=1", "--optim=sgd", "--learning_rate=1", "--max_grad_norm=0"]
    words += ["--total_train_batch_size=8", "--lr_scheduler_type=constant"]
    found = []
    for size in (8, 2):
        run = tmp_path / str(size)
        tiny.train(model, ["--task=rte", f"--data_dir={rte}"], run, *words, f"--per_device_train_batch_size={size}")
        found.append(load_file(run / "adapter_model.safetensors"))
    # Fresh biases are zero, so they hold nothing but the step.
    whole, accumulated = (torch.cat([t.flatten() for name, t in sorted(f.items()) if "bias" in name]) for f in found)
    assert whole.norm() > 0 and (whole - accumulated).norm() <= 1e-4 * whole.norm()
