from __future__ import annotations

import pytest
import torch

from meft.backbone.plan import Plan
from meft.engine.arithmetic import FixedPoint, FloatArithmetic
from meft.engine.couplings import COUPLINGS, make_coupling
from meft.errors import ConfigError

X1, X2 = torch.tensor([2.0]), torch.tensor([10.0])


def run(name: str, **options: object) -> tuple[float, float]:
    """One layer with F(x) = 100 + x and G(x) = 1000 + x, after switching."""
    coupling, streams = make_coupling(name, **options), (X1, X2)
    functions = {"F": lambda x: 100 + x, "G": lambda x: 1000 + x}
    for step in coupling.steps:
        streams, _ = step.forward(FloatArithmetic(), streams, functions[step.function](streams[step.source]))
    x1, x2 = coupling.switched(streams)
    return float(x1), float(x2)


def test_the_equations_by_hand() -> None:
    # y1 = 0.1 * 2 + 110; y2 = 10 + 1000 + y1; switched.
    assert run("meft1") == pytest.approx((1120.2, 110.2))
    # y1 = 2 + 110; y2 = 0.1 * 10 + 1000 + 112; switched.
    assert run("meft2") == pytest.approx((1113.0, 112.0))
    # y1 = 0.2 + 110; y2 = 1 + 1000 + y1; not switched.
    assert run("meft3") == pytest.approx((110.2, 1111.2))
    # y1 = 110 - 0.25 * (10 - 2); y2 = x2; switched.
    assert run("momentum", gamma=0.25) == pytest.approx((10.0, 108.0))
    # y1 = 10 + 1.25 * 100 - 0.25 * (10 - 2), since F adds 100 to its input.
    assert run("momentum", gamma=0.25, compensated=True) == pytest.approx((10.0, 133.0))


def test_factors_replace_the_defaults() -> None:
    assert run("meft1", lam=0.5, beta=0.5) == pytest.approx((5 + 1000 + 111, 111.0))
    assert run("momentum", gamma=0.5) == pytest.approx((10.0, 106.0))


@pytest.mark.parametrize(("name", "newest"), [("meft1", 1), ("meft2", 0), ("meft3", 1), ("momentum", 1)])
def test_the_newest_stream_is_the_one_with_the_layers_output(name: str, newest: int) -> None:
    assert make_coupling(name).newest == newest


@pytest.mark.parametrize("name", COUPLINGS)
def test_output_rules(name: str) -> None:
    x1, x2 = torch.tensor([1.0]), torch.tensor([5.0])
    newest, older = (x1, x2) if make_coupling(name).newest == 0 else (x2, x1)
    assert torch.equal(make_coupling(name, output="newest").read(x1, x2), newest)
    assert torch.equal(make_coupling(name, output="mean").read(x1, x2), torch.tensor([3.0]))
    assert torch.equal(make_coupling(name, output=("sum", 0.5)).read(x1, x2), newest + 0.5 * older)


def test_default_output_rules() -> None:
    assert [make_coupling(name).output for name in COUPLINGS] == [(0.5, 0.5)] * 3 + [(0.0, 1.0)]


@pytest.mark.parametrize("name", COUPLINGS)
def test_inverse_of_forward_in_both_arithmetics(name: str) -> None:
    coupling = make_coupling(name)
    for arithmetic in (FloatArithmetic(), FixedPoint(16)):
        start = tuple(arithmetic.encode(torch.randn(4, 6, dtype=torch.float64)) for _ in range(2))
        streams, trail = start, []
        for step in coupling.steps:
            f = torch.randn(4, 6, dtype=torch.float64)
            streams, coupled = step.forward(arithmetic, streams, f)
            trail.append((step, f, coupled.residue))
        for step, f, residue in reversed(trail):
            streams = step.inverse(arithmetic, streams, f, residue)
        for found, wanted in zip(streams, start, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0 if arithmetic.exact else 1e-12)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"coupling": "meft4"}, r"coupling='meft4' is unknown. Valid: 'meft1', 'meft2', 'meft3', 'momentum'"),
        ({"coupling": "meft1", "gamma": 0.5}, r"gamma=0.5 was given, but coupling='meft1' has no gamma"),
        ({"coupling": "momentum", "lam": 0.5}, r"lam=0.5 was given, but coupling='momentum' has no lam"),
        ({"coupling": "meft1", "output": "last"}, r"output='last' is no output rule"),
        ({"coupling": "meft1", "output": ("sum", "x")}, r"is no output rule. Valid: \"mean\""),
        ({"coupling": "meft1", "lam": 0.0, "arithmetic": "float"}, r"lam=0.0 cannot be inverted"),
        ({"coupling": "meft1", "beta": 0}, r"beta=0 cannot be used in exact arithmetic"),
        ({"coupling": "meft1", "lam": 0.3}, r"lam=0.3 has no integer inverse .* lam=1/3 .* lam=1/4"),
        ({"coupling": "meft1", "arithmetic": "fixed"}, r"arithmetic='fixed' is unknown. Valid: 'exact', 'float'"),
        ({"coupling": "meft1", "backward": "yes"}, r"backward='yes' is unknown"),
        (
            {"coupling": "meft1", "fraction_bits": 3},
            r"fraction_bits=3 is out of range. Valid: an integer, 4 to 24 or 'auto'",
        ),
        ({"coupling": "meft1", "fraction_bits": 25}, r"fraction_bits=25 is out of range"),
        ({"coupling": "meft1", "fraction_bits": 16.0}, r"fraction_bits=16.0 is a float"),
        ({"coupling": "meft1", "frozen_layers": -1}, r"frozen_layers=-1 is out of range. Valid: .*at least 0"),
        ({"coupling": "meft1", "cached_layers": True}, r"cached_layers=True is a bool"),
        ({"coupling": "meft1", "anchor_every": 0}, r"anchor_every=0 is out of range. Valid: an integer, at least 1"),
        ({"coupling": "meft1", "drift_tolerance": -1}, r"drift_tolerance=-1 is no relative error"),
    ],
)
def test_bad_options_are_refused_by_name_and_value(options: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        Plan.make(**options)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"frozen_layers": 4}, "frozen_layers=4 leaves nothing to train: the stack has 4 layers. Use at most"),
        ({"frozen_layers": 9}, "frozen_layers=9 leaves nothing to train"),
        ({"frozen_layers": 2, "cached_layers": 3}, "are more than the 4 layers of the stack"),
        ({"cached_layers": 5}, "use at most cached_layers=4"),
    ],
)
def test_a_stack_too_shallow_is_refused(options: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Plan.make(coupling="meft1", **options).check_depth("the stack", 4)


def test_all_layers_may_be_cached() -> None:
    Plan.make(coupling="meft1", frozen_layers=1, cached_layers=3).check_depth("the stack", 4)
