"""Every byte of the peak has a cause: on made-up timelines, where the causes are known, and on real steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import meft
from meft.memory import measure
from meft.memory.measurement.causes import (
    CAUSES,
    GRADIENTS,
    HEAD,
    OPTIMIZER_STATE,
    OTHER,
    RESIDUES,
    SAVED,
    STREAMS,
    WORKING,
    Attribution,
    phases_of,
)
from meft.memory.measurement.timeline import Allocation, build_timeline, peak_between
from meft.methods.registry import apply_method
from support.models import batch, build

FLOAT, INT, LONG = 4, 4, 8


def causes(found: dict[str, int]) -> dict[str, int]:
    assert tuple(found) == CAUSES
    return {cause: size for cause, size in found.items() if size}


def test_an_ordinary_step() -> None:
    timeline = build_timeline(
        [
            (1, 1),  # embeddings
            "forward 0.0",
            (2, 10),
            (3, 20),
            (3, -20),
            "forward end",
            (4, 100),  # logits
            (4, -100),
            "backward 0.0",
            (5, 1000),
            (6, 10000),
            "gradient 6:10000",
        ]
    )

    found = Attribution(timeline)

    assert causes(found.peak()) == {SAVED: 10, WORKING: 1000, GRADIENTS: 10000, OTHER: 1}
    assert causes(found.activations()) == {SAVED: 10, WORKING: 1000, OTHER: 1}
    assert [phase.kind for phase in found.phases] == ["between", "forward", "head", "backward"]
    peaks = [causes(phase.peak) for phase in found.phase_peaks()]
    assert peaks[:3] == [{OTHER: 1}, {WORKING: 30, OTHER: 1}, {SAVED: 10, HEAD: 100, OTHER: 1}]


def test_a_reversible_step() -> None:
    timeline = build_timeline(
        [
            "forward 0.0 reversible",
            (1, 1),  # residue
            "residue 1:1",
            (2, 10),  # streams
            (3, 1000),
            (3, -1000),
            "forward end",
            "forward 0.1 reversible",
            "forward end",
            (4, 100),
            "backward 0.1",
            (4, -100),
            (5, 300),  # gradients of the streams
            "backward 0.0",
            "backward end 0.1",  # from the input's hook, which comes after that of the same tensor as an output
            (6, 2000),
        ]
    )

    assert causes(Attribution(timeline).peak()) == {STREAMS: 310, RESIDUES: 1, WORKING: 2000}


def test_optimizer_state_and_what_it_makes() -> None:
    timeline = build_timeline([(1, 5), "gradient 1:5", "optimizer", (2, 7), (3, 11), (3, -11), "optimizer end"])

    found = Attribution(timeline, gradients={1}, state={2})

    assert causes(found.peak()) == {GRADIENTS: 5, OPTIMIZER_STATE: 18}
    assert causes(found.activations()) == {OPTIMIZER_STATE: 11}


def test_what_lies_on_the_host_does_not_count() -> None:
    timeline = build_timeline(["forward 0.0", (1, 1), "host", (2, 1000), "host end", "forward end", (3, 10)])

    assert causes(Attribution(timeline).peak()) == {SAVED: 1, HEAD: 10}


def test_a_gradient_that_was_released_in_the_step_is_one_still() -> None:
    timeline = build_timeline([(1, 5), "gradient 1:5", (1, -5), (1, 3)])

    assert causes(Attribution(timeline).peak()) == {GRADIENTS: 5}


def test_two_stacks_have_something_between_them() -> None:
    names = ["forward 0.0", "forward end", "forward 1.0", "forward end", "backward 1.0", "backward end 1.0"]
    names += ["backward 0.0", "backward end 0.0"]

    kinds = [phase.kind for phase in phases_of(build_timeline(names))]

    assert kinds == [
        *("between", "forward", "between", "forward", "head", "backward", "between", "backward", "between"),
    ]


def test_peaks_of_a_part_of_a_timeline() -> None:
    blocks = [Allocation(1, 10, 0, 4), Allocation(2, 20, 1, 2), Allocation(3, 5, 3, None)]

    assert peak_between(blocks, 0, None) == (30, 1)
    assert peak_between(blocks, 2, None) == (15, 3)
    assert peak_between(blocks, 4, None) == (5, 4)
    assert peak_between(blocks, 2, 3) == (10, 2)
    assert peak_between([], 0, None) == (0, 0)


METHODS = ("full", "lora", "adapter", "meft1", "meft2", "meft3", "momentum")


def step_of(model: Any, family: str, task: str) -> Any:
    inputs = batch(family, task, size=4, length=20, padding=None)

    def step() -> None:
        model.zero_grad()
        model(**inputs).loss.backward()

    step()
    model.zero_grad()
    return lambda: model(**inputs).loss.backward()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "task"), [("bert", "SEQ_CLS"), ("opt", "CAUSAL_LM"), ("bart", "SEQ_2_SEQ_LM")])
def test_causes_sum_to_the_peak(method: str, family: str, task: str) -> None:
    model = apply_method(build(family, task, hidden=16, attn_implementation="sdpa"), method, task_type=task)

    report = measure(step_of(model, family, task), model=model)

    assert sum(report.causes.values()) == report.peak_bytes
    assert sum(report.activation_causes.values()) == report.activation_peak_bytes
    assert report.activation_causes[GRADIENTS] == 0
    kept = {cause for cause in (SAVED, RESIDUES) if report.activation_causes[cause]}
    assert kept == ({RESIDUES} if method in meft.methods.table.COUPLED_METHODS else {SAVED})


@pytest.mark.parametrize(("fraction_bits", "integer"), [(16, INT), ("auto", LONG)])
@pytest.mark.parametrize("coupling", ["meft1", "momentum"])
def test_residues_are_counted_to_the_byte(coupling: str, fraction_bits: int | str, integer: int) -> None:
    layers, hidden = 5, 16
    task = "FEATURE_EXTRACTION"
    gamma = {"gamma": 1 / 4} if coupling == "momentum" else {}
    base = build("bert", task, layers=layers, hidden=hidden)
    # The paper's factors, which encoders like this one have by default.
    model = apply_method(base, coupling, task_type=task, fraction_bits=fraction_bits, **gamma)
    inputs = batch("bert", task, size=4, length=20, padding=None)

    report = measure(lambda: model(**inputs).last_hidden_state, model=model)

    elements = 4 * 20 * hidden
    bits = {"meft1": 4, "momentum": 2}[coupling]
    # The peak falls into the last layer, whose own residue is not made yet.
    assert report.causes[RESIDUES] == (layers - 1) * elements * bits // 8
    # Two streams of integers, the newest as the hidden state that the model holds, and a few numbers a step.
    assert report.causes[STREAMS] == pytest.approx(elements * (2 * integer + FLOAT), abs=130)


def test_a_checkpointed_layer_saves_its_input() -> None:
    layers, hidden = 6, 16
    model = build("bert", "SEQ_CLS", layers=layers, hidden=hidden)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})

    report = measure(step_of(model, "bert", "SEQ_CLS"), model=model)

    # All but the lowest layer's input come from a layer; states of random generators are held beside them.
    saved, generators = (layers - 1) * 4 * 20 * hidden * FLOAT, layers * (torch.get_rng_state().nbytes + 8)
    assert saved <= report.causes[SAVED] <= saved + generators
    assert report.causes[WORKING] > 0.5 * report.peak_bytes


def test_the_optimizer_has_its_share() -> None:
    model = build("bert", "SEQ_CLS", hidden=16)
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = batch("bert", "SEQ_CLS")

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()

    report = measure(step, model=model, optimizer=optimizer)

    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert report.gradient_bytes == weights
    assert report.causes[GRADIENTS] == weights
    assert report.causes[OPTIMIZER_STATE] > report.optimizer_bytes == 2 * weights + 4 * len(list(model.parameters()))


def test_without_a_model_only_gradients_have_a_cause() -> None:
    model = build("bert", "SEQ_CLS", hidden=16)

    report = measure(step_of(model, "bert", "SEQ_CLS"), parameters=model.parameters())

    assert set(causes(report.causes)) == {GRADIENTS, OTHER}
    assert sum(report.causes.values()) == report.peak_bytes


def test_hooks_are_gone_afterwards() -> None:
    model = build("bert", "SEQ_CLS", hidden=16)
    measure(step_of(model, "bert", "SEQ_CLS"), model=model, optimizer=torch.optim.SGD(model.parameters()))

    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_attribution_does_not_change_the_peak() -> None:
    model = build("opt", "CAUSAL_LM", hidden=16)
    step = step_of(model, "opt", "CAUSAL_LM")

    told_apart = measure(step, model=model).peak_bytes
    model.zero_grad()

    assert measure(step).peak_bytes == told_apart
