"""The ledger of the CUDA allocator's figures, on readings whose causes are known."""

from __future__ import annotations

import torch
from torch import nn

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
)
from meft.memory.measurement.cuda import Ledger, Reading


def ledger(*readings: tuple[str, int, int]) -> Ledger:
    return Ledger([Reading("", 1000, 1000), *(Reading(mark, now, most) for mark, now, most in readings)], older={7})


def causes(found: dict[str, int]) -> dict[str, int]:
    assert tuple(found) == CAUSES
    return {cause: size for cause, size in found.items() if size}


def test_a_forward_pass_that_saves() -> None:
    found = ledger(
        ("forward 0.0", 1001, 1001),
        ("forward end", 1011, 1051),
        ("forward 0.1", 1011, 1011),
        ("forward end", 1021, 1061),
        ("", 1121, 1121),
    )

    assert causes(found.peak) == {OTHER: 1, SAVED: 20, HEAD: 100} == causes(found.activations)


def test_the_peak_in_a_layer() -> None:
    found = ledger(
        ("forward 0.0", 1001, 1001),
        ("forward end", 1011, 1051),
        ("backward 0.0", 1031, 1036),
        ("", 1000, 1500),
    )

    assert causes(found.peak) == {OTHER: 1, SAVED: 10, HEAD: 20, WORKING: 469}
    assert sum(found.peak.values()) == 500


def test_a_backward_pass_takes_back_what_was_saved() -> None:
    found = ledger(
        ("forward 0.0", 1000, 1000),
        ("forward end", 1100, 1100),
        ("forward 0.1", 1100, 1100),
        ("forward end", 1200, 1200),
        ("backward 0.1", 1200, 1200),
        ("gradient 8:30", 1240, 1240),  # made while the layer's activations are there still
        ("backward 0.0", 1135, 1240),  # 100 released, 30 of a gradient and 5 on their way to the layer below
        ("", 1135, 1900),
    )

    assert causes(found.peak) == {SAVED: 100, GRADIENTS: 30, STREAMS: 5, WORKING: 765}
    assert causes(found.activations) == {SAVED: 100, STREAMS: 5, WORKING: 765}


def test_reversible_layers_keep_residues_and_streams() -> None:
    found = ledger(
        ("forward 0.0 reversible", 1000, 1000),
        ("residue 1:10 2:5", 1040, 1040),
        ("forward end", 1055, 1300),
        ("", 1056, 1400),
    )

    assert causes(found.peak) == {RESIDUES: 15, STREAMS: 40, HEAD: 345}


def test_gradients_that_are_older_and_the_optimizer() -> None:
    found = ledger(
        ("gradient 7:500", 1000, 1000),
        ("gradient 8:50", 1050, 1050),
        ("optimizer", 1050, 1050),
        ("", 1150, 1170),
    )

    assert causes(found.peak) == {GRADIENTS: 50, OPTIMIZER_STATE: 120}
    assert causes(found.activations) == {OTHER: 50}  # the gradient, before it was known to be one


def test_measure_takes_readings_at_marks(monkeypatch) -> None:
    state = {"allocated": 1024, "highest": 1024}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state["highest"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: state.update(highest=state["allocated"]))
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight])

    def allocate(size: int) -> None:
        state["allocated"] += size
        state["highest"] = max(state["highest"], state["allocated"])

    def step() -> None:
        allocate(1000)
        weight.sum().backward()
        optimizer.register_step_post_hook(lambda *_: allocate(30))
        optimizer.step()
        allocate(-1030)

    report = measure(step, device="cuda:0", parameters=[weight], optimizer=optimizer)

    assert report.peak_bytes == sum(report.causes.values()) == 1030
    assert report.causes[GRADIENTS] == weight.nbytes
    assert report.causes[OTHER] == 1000 + 30 - weight.nbytes
    assert report.retained_bytes == 0
