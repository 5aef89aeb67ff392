"""`sign="random"`: gamma with a sign for each sample in each step of training, and the plain model in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import meft
from engine.test_engine_vs_reference import CACHED, REVERSIBLE, compare, engine_model
from meft.engine.arithmetic import FixedPoint, FloatArithmetic
from meft.engine.couplings import Step, make_coupling
from meft.engine.engine import LayerCall, Tape, finish, run_layer
from meft.errors import ConfigError
from meft.methods.registry import apply_method, read_way
from support import models
from support.peft_helpers import (
    TASK_OF,
    adapted,
    assert_close,
    assert_equal,
    batch_of,
    gradients,
    llama,
    outputs,
    visible,
)
from support.reference import Coupled, couple, forward_streams, inverse_streams, rule_for, with_signs

GRANULARITIES = ("layer", "block")
FAMILIES = ("bert", "bart", "opt")


def base_of(family: str, **options: Any) -> nn.Module:
    return models.build(family, TASK_OF[family], **{"layers": 3, **options})


def reversible(family: str, *, dropout: float = 0.1, **options: Any) -> nn.Module:
    return meft.make_reversible(base_of(family, dropout=dropout), **{"sign": "random", **options})


def signs_of(seed: int, *shape: int) -> Tensor:
    """What one step draws."""
    torch.manual_seed(seed)
    step = make_coupling("momentum", sign="random").steps[0]
    signs = step.signs(torch.Size(shape), torch.device("cpu"))
    assert signs is not None
    return signs


# --- The equation -----------------------------------------------------------------------------------------------------


def test_the_equation_by_hand() -> None:
    """y1 = F(x2) - s * gamma * (x2 - x1), a row a sign: 110 - 2, 110 + 2, 110."""
    step = Step("F", 0, 1, 0.25, difference=True, sign="random")
    x1, x2, f = torch.full((3, 1, 2), 2.0), torch.full((3, 1, 2), 10.0), torch.full((3, 1, 2), 110.0)
    signs = torch.tensor([1, -1, 0], dtype=torch.int8).view(3, 1, 1)
    for arithmetic in (FloatArithmetic(), FixedPoint(16)):
        streams = (arithmetic.encode(x1), arithmetic.encode(x2))
        (y1, y2), _ = step.forward(arithmetic, streams, f, signs)
        assert arithmetic.decode(y1, torch.float32)[:, 0, 0].tolist() == [108.0, 112.0, 110.0]
        assert torch.equal(y2, streams[1])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 1 / 3, 1 / 4, 0.1, 1 / 256])
def test_exact_streams_come_back_bit_for_bit(gamma: float, in_place: bool) -> None:
    arithmetic, step = FixedPoint(16), Step("F", 0, 1, gamma, difference=True, sign="random")
    start = tuple(arithmetic.encode(10 * torch.randn(8, 3, 5)) for _ in range(2))
    f, signs = torch.randn(8, 3, 5), signs_of(3, 8, 3, 5)
    assert set(signs.flatten().tolist()) == {-1, 1}
    after, coupled = step.forward(arithmetic, start, f, signs)
    before = step.inverse(arithmetic, tuple(s.clone() for s in after), f, coupled.residue, signs, in_place=in_place)
    assert all(torch.equal(found, wanted) for found, wanted in zip(before, start, strict=True))
    wrong = step.inverse(arithmetic, after, f, coupled.residue, -signs)
    assert not torch.equal(wrong[0], start[0])


def test_a_sign_of_one_is_no_sign() -> None:
    """So a random sign costs no bit of what a fixed one computes."""
    arithmetic = FixedPoint(16)
    streams, f = tuple(arithmetic.encode(torch.randn(2, 3, 4)) for _ in range(2)), torch.randn(2, 3, 4)
    random, fixed = (make_coupling("momentum", sign=sign).steps[0] for sign in ("random", "fixed"))
    assert fixed.signs(torch.Size([2, 3, 4]), torch.device("cpu")) is None
    signed, plain = random.forward(arithmetic, streams, f, torch.ones(2, 1, 1, dtype=torch.int8)), None
    plain = fixed.forward(arithmetic, streams, f)
    assert torch.equal(signed[0][0], plain[0][0]) and torch.equal(signed[1].residue, plain[1].residue)


def test_a_draw_is_one_fair_sign_for_each_sample() -> None:
    signs = signs_of(0, 4000, 5, 6)
    assert signs.shape == (4000, 1, 1) and signs.dtype == torch.int8
    assert set(signs.flatten().tolist()) == {-1, 1}
    assert abs(float(signs.float().mean())) < 0.05
    assert torch.equal(signs, signs_of(0, 4000, 5, 6)) and not torch.equal(signs, signs_of(1, 4000, 5, 6))
    assert signs_of(0, 7, 6).shape == (7, 1)


# --- Against the reference, and against stored activations ------------------------------------------------------------


@pytest.mark.parametrize(("backward", "dropout"), [("cached", 0.2), ("reversible", 0.2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_against_the_reference(family: str, backward: str, dropout: float) -> None:
    """Which draws the same signs, where a layer begins."""
    task = {"bart": "SEQ_2_SEQ_LM"}.get(family, "FEATURE_EXTRACTION")
    options = {"backward": backward, "sign": "random", "dropout": dropout, "gamma": 1 / 4}
    model = engine_model(family, task, coupling="momentum", **options)
    batch = models.batch(family, task)
    tolerance = CACHED if backward == "cached" else REVERSIBLE
    compare(model, batch, tolerance, coupling="momentum", sign="random")
    with pytest.raises(AssertionError, match="relative error"):
        compare(model, batch, tolerance, coupling="momentum")


def test_the_reference_by_hand_and_inverted() -> None:
    layer, rule = nn.Linear(1, 1), rule_for("momentum")
    torch.manual_seed(2)
    signed = with_signs(rule, torch.zeros(16, 1, 1, dtype=torch.float64), layer)
    assert isinstance(signed.lam, Tensor) and set(signed.lam.flatten().tolist()) == {-0.25, 0.25}
    assert float(with_signs(rule, torch.zeros(1, 1, 1), layer.eval()).lam) == 0
    minus = rule_for("momentum", gamma=-0.25)
    x1, x2 = torch.tensor([[[2.0]]]), torch.tensor([[[10.0]]])
    assert float(couple(x1, x2, lambda x: 100 + x + 0.25 * x, torch.zeros_like, minus)[1]) == 112.0
    parts = [Coupled(one) for one in models.stacks(base_of("bert", dtype=torch.float64))["bert.encoder.layer"]]
    streams = tuple(torch.randn(2, 4, 32, dtype=torch.float64) for _ in range(2))
    out = forward_streams(parts, *streams, "momentum", minus, {})
    for found, wanted in zip(inverse_streams(parts, *out, "momentum", minus, {}), streams, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_stored_activations(family: str, granularity: str, arithmetic: str) -> None:
    """With dropout, and by blocks in tiles that cut through the samples."""
    options = {"granularity": granularity, "arithmetic": arithmetic, "tile_size": 5, "gamma": 1 / 4}
    options |= {"drift_tolerance": 1.0}
    found, stored, fixed = (
        gradients(reversible(family, **options, **changed), batch_of(family))
        for changed in ({}, {"backward": "cached"}, {"sign": "fixed"})
    )
    assert_close(found, stored, 1e-6 if arithmetic == "exact" else 5e-2)
    with pytest.raises(AssertionError):
        assert_close(found, fixed, 1e-1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rebuilt_bit_for_bit(granularity: str) -> None:
    for options in ({}, {"dtype": torch.bfloat16}):
        model = base_of("opt", dropout=0.1, **options)
        meft.make_reversible(model, granularity=granularity, sign="random", frozen_layers=1)
        report = meft.verify(model, batch_of("opt"))
        assert report.bitwise and report.passed(), report


def test_adapters_on_momentum() -> None:
    found, stored = (
        gradients(adapted("bert", "momentum", dropout=0.1, sign="random", backward=backward), batch_of("bert"))
        for backward in ("reversible", "cached")
    )
    assert_close(found, stored, 1e-6)


def test_streams_without_a_batch_dimension() -> None:
    """The first dimension counts the samples, whatever it is: here each token has its sign."""
    coupling, arithmetic = make_coupling("momentum", sign="random"), FixedPoint(16)
    weight = torch.randn(4, 4, requires_grad=True)
    found = []
    for keep in (False, True):
        torch.manual_seed(4)
        hidden = torch.linspace(-1, 1, 24).view(6, 4).requires_grad_()
        tape = Tape(coupling, arithmetic, hidden)
        for _ in range(2):
            run_layer(tape, LayerCall({"F": lambda x, _: torch.tanh(x @ weight)}, (weight,)), reversible=not keep)
        finish(tape).square().sum().backward()
        found.append({"hidden": hidden.grad, "weight": weight.grad})
        weight.grad = None
    assert_close(*found, 1e-6)


# --- Draws ------------------------------------------------------------------------------------------------------------


def observed_signs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    seen: list[Tensor] = []
    draw = Step.signs

    def signs(*args: Any, **kwargs: Any) -> Tensor | None:
        drawn = draw(*args, **kwargs)
        if drawn is not None:
            seen.append(drawn.flatten())
        return drawn

    monkeypatch.setattr(Step, "signs", signs)
    return seen


@pytest.mark.parametrize(("granularity", "draws"), [("layer", 3), ("block", 6)])
def test_drawn_once_for_each_sample_in_each_step(granularity: str, draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not again when the step is undone: a second draw would disturb what is drawn after it."""
    seen = observed_signs(monkeypatch)
    model = reversible("bert", granularity=granularity, dropout=0.0)
    batch = models.batch("bert", size=16)
    gradients(model, batch)
    assert len(seen) == draws and all(len(signs) == 16 for signs in seen)
    assert len({tuple(signs.tolist()) for signs in seen}) == draws
    model.eval()
    outputs(model, batch)
    assert len(seen) == draws


def test_a_seed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = reversible("bert", dropout=0.0), batch_of("bert")
    assert_equal(gradients(model, batch, seed=1), gradients(model, batch, seed=1))
    found = {float(sum(g.sum() for g in gradients(model, batch, seed=seed).values())) for seed in range(6)}
    assert len(found) > 1


def test_the_backward_pass_leaves_the_generator_alone() -> None:
    model, batch = reversible("bert"), batch_of("bert")
    loss = model(**batch).loss
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fixed_sign_draws_nothing() -> None:
    """What dropout draws is what it drew before there were signs."""
    model, batch = reversible("bert", dropout=0.0, sign="fixed"), batch_of("bert")
    state = torch.get_rng_state()
    model(**batch)
    assert torch.equal(torch.get_rng_state(), state)


# --- Evaluation: the plain model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_evaluation_it_is_the_plain_model(family: str, granularity: str) -> None:
    plain = base_of(family).eval()
    model, batch = reversible(family, granularity=granularity).eval(), batch_of(family)
    expected = outputs(plain, batch)
    assert torch.equal(outputs(model, batch), expected)
    assert not torch.equal(outputs(model.train(), batch), expected)
    assert torch.equal(outputs(meft.restore(model.eval()), batch), expected)


def test_lora_in_evaluation_is_the_restored_model() -> None:
    model = get_peft_model(base_of("opt"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    meft.make_reversible(model, sign="random").eval()
    found = outputs(model, batch_of("opt"))
    with model.disable_adapter():
        assert torch.equal(outputs(model, batch_of("opt")), outputs(base_of("opt").eval(), batch_of("opt")))
    assert torch.equal(outputs(meft.restore(model), batch_of("opt")), found)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_adapters_in_evaluation_run_on_ordinary_layers(granularity: str) -> None:
    """As `coupling="adapter"` runs them, beside the feed-forward and behind the layer."""
    model = adapted("bert", "momentum", sign="random", granularity=granularity).eval()
    twin = adapted("bert", "adapter").eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(outputs(model, batch_of("bert")), outputs(twin, batch_of("bert")))


def test_gradients_in_evaluation() -> None:
    found = []
    for model in (reversible("opt"), base_of("opt")):
        model.eval()
        found.append(gradients(model, batch_of("opt")))
    assert_equal(*found)


def test_generation_in_evaluation() -> None:
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    model, plain = meft.make_reversible(llama(), sign="random").eval(), llama().eval()
    found, expected = (one.generate(**prompt, max_new_tokens=6, do_sample=False) for one in (model, plain))
    assert torch.equal(found, expected)


def test_hidden_states_in_evaluation() -> None:
    model, plain, batch = reversible("bert").eval(), base_of("bert").eval(), batch_of("bert")
    seen: list[Tensor] = []
    model.bert.encoder.layer[1].register_forward_hook(lambda module, args, output: seen.append(output))
    found, expected = (one(**batch, output_hidden_states=True).hidden_states for one in (model, plain))
    assert len(found) == len(expected) == 4
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(seen) == 1


@pytest.mark.parametrize("in_evaluation", [[0], [1], [2], [0, 1], [1, 2]])
def test_some_layers_in_evaluation(in_evaluation: list[int]) -> None:
    """To switch their dropout off: the stack is in training, and all of it is rebuilt."""
    for sign in ("random", "fixed"):
        found = []
        for backward in ("reversible", "cached"):
            model = reversible("opt", backward=backward, sign=sign)
            for index in in_evaluation:
                model.model.decoder.layers[index].eval()
            found.append(gradients(model, batch_of("opt")))
        assert_close(*found, 1e-6)


def test_after_a_pass_that_was_cut_short() -> None:
    model, batch = reversible("bert"), batch_of("bert")

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        raise InterruptedError

    handle = model.bert.encoder.layer[1].register_forward_hook(fail)
    with pytest.raises(InterruptedError):
        model(**batch)
    handle.remove()
    plain = base_of("bert").eval()
    assert torch.equal(outputs(model.eval(), batch), outputs(plain, batch))


def test_training_mode_without_gradients_draws_as_well() -> None:
    """As dropout does."""
    model, batch = reversible("bert", dropout=0.0), batch_of("bert")
    assert len({float(outputs(model, batch, seed=seed).sum()) for seed in range(6)}) > 1
    with torch.no_grad():
        torch.manual_seed(1)
        silent = visible(model(**batch))
    torch.manual_seed(1)
    assert torch.equal(visible(model(**batch)).detach(), silent)


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sign": "plus"}, r"sign='plus' does not go with coupling='momentum'. Valid: \"fixed\", and for \"momentum\""),
        ({"sign": "always"}, "sign='always' does not go with"),
        ({"sign": "random", "coupling": "meft1"}, "sign='random' does not go with coupling='meft1'"),
        ({"sign": "random", "coupling": "meft3"}, "sign='random' does not go with coupling='meft3'"),
        ({"sign": "random", "output": "mean"}, "output='mean' does not go with sign=\"random\".*Leave output out"),
    ],
)
def test_bad_options(options: dict[str, Any], text: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: meft.make_reversible(base_of("bert"), **options),
        lambda: meft.MeftConfig(**{"coupling": "momentum", **options}),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=text):
            call()


def test_the_adapter_method_has_no_sign() -> None:
    with pytest.raises(ConfigError, match=r"sign='random' was given, but coupling=\"adapter\" couples nothing"):
        meft.MeftConfig(coupling="adapter", sign="random")


def test_as_an_option_of_a_method() -> None:
    model = apply_method(models.build("bert"), "momentum", task_type="SEQ_CLS", sign="random")
    assert model.peft_config["default"].sign == "random"
    with pytest.raises(ConfigError, match="sign is 'random', but method 'meft1' has no such option"):
        read_way("meft1", {"sign": "random"})


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = adapted("bert", "momentum", sign="random")
    model.save_pretrained(tmp_path)
    assert meft.MeftConfig.from_pretrained(tmp_path).sign == "random"
