from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from meft.memory import measure
from meft.training.costs import measure_costs
from support.models import batch, build


def test_costs_of_a_step_and_its_reference() -> None:
    model, inputs = build("bert", dropout=0.1), batch("bert", size=3, length=7)
    costs = measure_costs(model, inputs, steps=3, reference=lambda: build("bert", layers=12), reference_name="deeper")
    assert (costs.rows, costs.tokens, costs.steps, costs.reference) == (3, 7, 3, "deeper")
    report = measure(lambda: model(**inputs).loss.backward(), model=model)
    assert costs.peak_activation_bytes == report.activation_peak_bytes
    assert costs.reference_peak_activation_bytes is not None
    assert costs.reference_peak_activation_bytes > 2 * costs.peak_activation_bytes
    assert costs.step_time_ratio == pytest.approx(costs.step_seconds / costs.reference_step_seconds)
    assert 0 < costs.step_time_ratio < 0.8


def test_without_a_reference_there_is_no_ratio() -> None:
    costs = measure_costs(build("bert", layers=1), batch("bert"), steps=1)
    assert costs.step_seconds > 0
    assert costs.step_time_ratio is None and costs.reference is None


def test_a_reference_that_does_not_fit_is_left_out() -> None:
    def build_huge() -> torch.nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory")

    costs = measure_costs(build("bert", layers=1), batch("bert"), steps=1, reference=build_huge, reference_name="huge")
    assert costs.peak_activation_bytes > 0
    assert costs.reference is None and costs.step_time_ratio is None


def test_measuring_leaves_no_trace() -> None:
    model = build("bert", layers=1, dropout=0.1).eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    gradient = torch.ones_like(model.classifier.bias)
    model.classifier.bias.grad = gradient
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    measure_costs(model, batch("bert"), steps=2, reference=lambda: build("bert", seed=5))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]
    assert not model.training
    assert model.classifier.bias.grad is gradient and gradient.eq(1).all()
    assert all(value.grad is None for name, value in model.named_parameters() if name != "classifier.bias")
    assert all(weights[name].equal(value) for name, value in model.state_dict().items())


def test_steps_run_in_the_context_given() -> None:
    seen: list[bool] = []
    model = build("bert", layers=1)
    model.classifier.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    measure_costs(model, batch("bert"), steps=1, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert seen and all(seen)
