from __future__ import annotations

import copy
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import meft
from meft import cli
from meft.backbone.layers import ReversibleLayer
from meft.cli.verify import verify_command
from meft.errors import CheckpointError, ConfigError, DataError, StreamOverflowError
from meft.verification import LayerError, VerifyReport, verify
from meft.verification.batches import random_batch
from meft.verification.figure import error_against_depth
from meft.verification.gradients import relative_differences
from meft.verification.report import curve
from support import models
from support.tiny import make_model

COUPLINGS = ("meft1", "meft2", "meft3", "momentum")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def reversible(family: str = "bert", task: str = "SEQ_CLS", **options: Any) -> nn.Module:
    """A tiny model with dropout on a reversible stack; options of the model stand beside those of the coupling."""
    built = {name: options.pop(name) for name in ("layers", "dtype", "dropout") if name in options}
    return meft.make_reversible(models.build(family, task, **{"layers": 3, "dropout": 0.1, **built}), **options)


def adapted(family: str = "bert", task: str = "SEQ_CLS", **options: Any) -> nn.Module:
    return get_peft_model(models.build(family, task, layers=3, dropout=0.1), meft.MeftConfig(task_type=task, **options))


def layers_of(report: VerifyReport) -> dict[str, list[int]]:
    return {name: [error.layer for error in errors] for name, errors in report.reconstruction_error.items()}


# -- exact arithmetic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(("family", "task"), [("bert", "SEQ_CLS"), ("opt", "CAUSAL_LM"), ("bart", "SEQ_2_SEQ_LM")])
def test_exact_streams_are_rebuilt_bit_for_bit(family: str, task: str, coupling: str) -> None:
    report = verify(adapted(family, task, coupling=coupling), models.batch(family, task))
    expected = {name: [0, 1, 2] for name in models.stacks(models.build(family, task, layers=3))}
    assert layers_of(report) == expected
    assert report.bitwise and report.exact and report.integrity_error is None
    assert all(error.bitwise and error.elements for errors in report.reconstruction_error.values() for error in errors)
    assert report.worst_reconstruction == 0
    assert report.gradient_error <= 1e-6
    assert report.passed()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_full_fine_tuning_in_every_dtype(coupling: str, dtype: torch.dtype) -> None:
    model = reversible(coupling=coupling, dtype=dtype)
    report = verify(model, models.batch("bert"))
    assert report.bitwise and report.passed(), report
    assert report.precision == str(dtype).removeprefix("torch.")
    assert set(report.gradient_errors) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    model = reversible(coupling="meft1")
    with torch.autocast("cpu", dtype):
        report = verify(model, models.batch("bert"))
        # Autocast keeps the weights that it has cast: those of the evaluation would have no gradient.
        meft.restore(model)
        model(**models.batch("bert")).loss.backward()
    assert report.bitwise and report.passed(), report
    assert report.precision == str(dtype).removeprefix("torch.")
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_lora_under_a_coupling() -> None:
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], lora_dropout=0.1)
    report = verify(
        meft.make_reversible(get_peft_model(models.build("bert", layers=3), lora), gamma=1 / 8), models.batch("bert")
    )
    assert report.bitwise and report.passed()
    assert "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight" in report.gradient_errors
    assert layers_of(report) == {"base_model.model.bert.encoder.layer": [0, 1, 2]}


def test_only_rebuilt_layers_are_reported() -> None:
    model = models.build("bert", layers=6)
    meft.make_reversible(model, frozen_layers=1, cached_layers=2)
    assert layers_of(verify(model, models.batch("bert"))) == {"bert.encoder.layer": [1, 2, 3]}


def test_layers_below_the_lowest_trainable_one_are_not_rebuilt() -> None:
    model = models.build("bert", layers=4).requires_grad_(False)
    model.bert.encoder.layer[2].requires_grad_(True)
    report = verify(meft.make_reversible(model), models.batch("bert"))
    assert layers_of(report) == {"bert.encoder.layer": [2, 3]}


def test_two_adapters_the_active_one_is_verified() -> None:
    model = adapted(coupling="meft1")
    model.add_adapter("other", meft.MeftConfig(task_type="SEQ_CLS", coupling="momentum", arithmetic="float"))
    assert verify(model, models.batch("bert")).exact
    model.set_adapter("other")
    assert not verify(model, models.batch("bert")).exact


def test_a_stack_that_runs_twice_has_its_passes_numbered() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = models.build("bert", layers=2)

        def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
            return {"loss": self.inner(**inputs).loss + self.inner(**inputs).loss}

    model = Twice()
    meft.make_reversible(model.inner)
    assert layers_of(verify(model, models.batch("bert"))) == {
        "bert.encoder.layer": [0, 1],
        "bert.encoder.layer (pass 2)": [0, 1],
    }


def test_stacks_made_reversible_apart_are_told_apart() -> None:
    model = models.build("bart", "SEQ_2_SEQ_LM", layers=3)
    meft.make_reversible(model.model.encoder, frozen_layers=1)
    meft.make_reversible(model.model.decoder, coupling="meft1", arithmetic="float")
    report = verify(model, models.batch("bart", "SEQ_2_SEQ_LM"))
    assert layers_of(report) == {"model.encoder.layers": [1, 2], "model.decoder.layers": [0, 1, 2]}
    assert all(error.bitwise for error in report.reconstruction_error["model.encoder.layers"])
    assert not any(error.bitwise for error in report.reconstruction_error["model.decoder.layers"])
    assert not report.bitwise


# -- float arithmetic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_float_streams_drift_more_in_every_layer(coupling: str) -> None:
    report = verify(reversible(coupling=coupling, arithmetic="float", layers=5), models.batch("bert"))
    assert not report.bitwise and not report.exact
    errors = [error.relative for error in report.reconstruction_error["bert.encoder.layer"]]
    assert errors[-1] > 0
    # Two layers up, every coupling has divided by at least gamma squared, or one lam; measured: 19 to 10000.
    assert errors[0] > 10 * errors[2]
    assert errors[0] == report.worst_reconstruction
    assert report.gradient_error > 1e-6


def test_float_passes_within_the_drift_tolerance() -> None:
    model, batch = reversible(arithmetic="float"), models.batch("bert")
    report = verify(model, batch)
    assert report.drift_tolerance == 1e-2 and 0 < report.worst_reconstruction < 1e-2
    assert report.passed()
    assert not report.passed(drift_tolerance=report.worst_reconstruction / 2)
    assert not report.passed(gradient_tolerance=report.gradient_error / 2)
    assert not verify(reversible(coupling="meft3", layers=8, arithmetic="float"), batch).passed()


def test_relative_error_is_that_of_both_streams() -> None:
    # In one layer of meft1 beta is 1 and there is no G: x2 is rebuilt exactly, x1 up to rounding.
    model = reversible(layers=1, coupling="meft1", arithmetic="float", dtype=torch.float64)
    (error,) = verify(model, models.batch("bert")).reconstruction_error["bert.encoder.layer"]
    assert error.elements == 2 * 3 * 7 * 32
    assert 0 < error.differing <= error.elements // 2
    assert 1e-18 < error.relative < 1e-15
    assert 1e-17 < error.largest < 1e-14


def test_streams_that_are_not_finite_are_infinitely_wrong() -> None:
    model = reversible(coupling="meft3", layers=16, arithmetic="float", dtype=torch.float16)
    report = verify(model, models.batch("bert"))
    assert report.worst_reconstruction == math.inf and report.gradient_error == math.inf
    assert not report.passed()
    assert "not finite" in str(report)
    found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert found["reconstruction_error"]["bert.encoder.layer"][0]["relative"] is None


# -- what must be caught ---------------------------------------------------------------------------------------------


def add_noise(layer: nn.Module) -> None:
    """Makes a layer return other values in every call, from outside the generators that are replayed."""
    outside = torch.Generator().manual_seed(1)
    inner = layer.forward

    def noisy(*args: Any, **kwargs: Any) -> Tensor:
        out = inner(*args, **kwargs)
        return out + 1e-2 * torch.randn(out.shape, generator=outside)

    layer.forward = noisy  # type: ignore[method-assign]


def test_a_nondeterministic_layer_is_reported() -> None:
    model = models.build("bert", layers=4)
    add_noise(model.bert.encoder.layer[2])
    report = verify(meft.make_reversible(model), models.batch("bert"))
    assert not report.bitwise and not report.passed()
    assert report.integrity_error is not None and "bert.encoder.layer is not the original" in report.integrity_error
    errors = report.reconstruction_error["bert.encoder.layer"]
    assert [error.bitwise for error in errors] == [False, False, False, True]
    assert errors[0].largest > 1e-3
    assert report.gradient_error > 1e-6
    assert re.search("Layer 2 returned other values in the recomputation.*not deterministic", report.integrity_error)
    assert "integrity check:" in str(report)


def test_anchors_bound_what_a_nondeterministic_layer_does() -> None:
    model = models.build("bert", layers=4)
    add_noise(model.bert.encoder.layer[2])
    report = verify(meft.make_reversible(model, anchor_every=2), models.batch("bert"))
    assert not report.bitwise and not report.exact and report.integrity_error is None
    assert [error.bitwise for error in report.reconstruction_error["bert.encoder.layer"]] == [True, True, False, True]


class _OneBackward(torch.autograd.Function):
    """The identity, whose gradient is right in the first backward pass only."""

    calls = 0

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _OneBackward.calls += 1
        return gradient if _OneBackward.calls == 1 else 1.1 * gradient


def test_wrong_gradients_are_reported_though_streams_are_right() -> None:
    model = models.build("bert", layers=3)
    inner = model.bert.encoder.layer[1].forward
    model.bert.encoder.layer[1].forward = lambda *args, **kwargs: _OneBackward.apply(inner(*args, **kwargs))
    _OneBackward.calls = 0
    report = verify(meft.make_reversible(model), models.batch("bert"))
    assert report.bitwise and not report.passed()
    assert report.gradient_error > 1e-3
    assert report.gradient_errors["classifier.weight"] == 0  # above the layer that errs
    assert report.gradient_errors["bert.encoder.layer.1.output.dense.weight"] > 1e-3
    assert "failed" in str(report) and "worst" in str(report)


def test_a_gradient_that_is_missing_counts_as_zero() -> None:
    one, two = torch.ones(4), torch.full((4,), 2.0)
    errors, floor = relative_differences(
        {"same": (one, one), "half": (one, two), "lost": (None, one), "new": (one, None), "none": (None, None)}
    )
    assert errors == {"same": 0, "half": 0.5, "lost": 1, "new": 2 / floor}
    assert floor == pytest.approx(0.1 * math.sqrt((4 + 16 + 4) / 4))


def test_rounding_errors_of_gradients_that_are_zero_do_not_count() -> None:
    # Softmax does not see the bias of attention keys: their gradients are zero, but for rounding.
    report = verify(reversible(arithmetic="float", layers=2), models.batch("bert"))
    assert report.gradient_errors["bert.encoder.layer.0.attention.self.key.bias"] < 1e-6
    assert report.gradient_floor > 0


# -- starting point --------------------------------------------------------------------------------------------------


def distance(found: Tensor, reference: Tensor) -> float:
    return float((found.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_starting_point_is_the_distance_from_the_model_that_was_given(coupling: str) -> None:
    plain, batch = models.build("bert", layers=3, dropout=0.1), models.batch("bert")
    model = meft.make_reversible(copy.deepcopy(plain), coupling=coupling)
    start = verify(model, batch).starting_point
    with torch.no_grad():
        expected, found = plain.eval()(**batch), model.eval()(**batch)
        del batch["labels"]
        hidden = distance(model.bert(**batch).last_hidden_state, plain.bert(**batch).last_hidden_state)
    assert start.hidden_state == hidden > 0.01
    assert (start.coupled_loss, start.plain_loss) == (float(found.loss), float(expected.loss))
    assert start.loss == pytest.approx(abs(float(found.loss) - float(expected.loss)) / float(expected.loss))


def test_starting_point_of_adapters_is_measured_against_the_base_model() -> None:
    base, batch = models.build("opt", "CAUSAL_LM", layers=3, dropout=0.1), models.batch("opt", "CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), meft.MeftConfig(task_type="CAUSAL_LM", coupling="meft1"))
    start = verify(model, batch).starting_point
    labels = batch.pop("labels")
    with torch.no_grad():
        model.eval()
        inner = model.get_base_model().model.decoder
        assert start.hidden_state == distance(
            inner(**batch).last_hidden_state, base.eval().model.decoder(**batch).last_hidden_state
        )
        assert start.plain_loss == float(base(**batch, labels=labels).loss)


def test_without_labels_there_is_no_loss_in_the_report() -> None:
    batch = models.batch("bert", "FEATURE_EXTRACTION")
    report = verify(reversible("bert", "FEATURE_EXTRACTION"), batch)
    start = report.starting_point
    assert start.hidden_state > 0 and start.loss is start.coupled_loss is start.plain_loss is None
    assert report.bitwise and report.passed()
    assert "pooler.dense.weight" in report.gradient_errors  # both outputs take part in the projection
    assert "loss" not in str(report)


# -- the model is left as it was found -------------------------------------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Any]:
    modules = dict(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {name: (id(t), t.clone(), t._version, t.requires_grad) for name, t in tensors.items()},
        "gradients": {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "training": {name: (module.training, pretrained_training(module)) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        "checkpointing": {name: vars(m).get("gradient_checkpointing") for name, m in modules.items()},
    }


def pretrained_training(module: nn.Module) -> bool | None:
    return module.pretrained.training if isinstance(module, ReversibleLayer) else None


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


@pytest.mark.parametrize("make", [reversible, adapted], ids=["make_reversible", "peft"])
@pytest.mark.parametrize("training", [True, False])
def test_model_and_generators_are_left_as_found(make: Callable[..., nn.Module], training: bool) -> None:
    model, batch = make(coupling="meft1"), models.batch("bert")
    model(**batch).loss.backward()
    model.train(training)
    model.bert.embeddings.training = not training
    layer = model.bert.encoder.layer[0]
    layer.gradient_checkpointing = True
    plans = [wrapper.placement().reversible_stack.plan for wrapper in model.bert.encoder.layer]
    before, given = state_of(model), {name: value.clone() for name, value in batch.items()}
    python, arrays, torch_state = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()

    assert verify(model, batch).bitwise

    assert same(before, state_of(model))
    assert same(given, batch)
    assert random.getstate() == python and numpy.random.get_state()[1].tolist() == arrays
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert [wrapper.placement().reversible_stack.plan for wrapper in model.bert.encoder.layer] == plans
    assert not any(wrapper.placement().reversible_stack._running for wrapper in model.bert.encoder.layer)


def test_what_the_layers_count_is_put_back() -> None:
    model = models.build("bert", layers=2)
    model.bert.register_buffer("calls", torch.zeros(()))

    def count(module: nn.Module, args: Any, output: Any) -> None:
        module.calls.add_(1 + random.random())

    model.bert.register_forward_hook(count)
    meft.make_reversible(model)
    buffer, python = model.bert.calls, random.getstate()
    verify(model, models.batch("bert"))
    assert model.bert.calls is buffer and float(buffer) == 0
    assert random.getstate() == python


def test_left_as_found_when_it_fails() -> None:
    model = reversible(fraction_bits=24, layers=2)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.weight.mul_(1000)
    model.eval()
    before = state_of(model)
    with pytest.raises(StreamOverflowError):
        verify(model, models.batch("bert"))
    assert same(before, state_of(model))
    assert model.bert.encoder.layer[0].placement().reversible_stack.plan.reversible


def test_a_pass_that_is_under_way_is_not_disturbed() -> None:
    model, batch = reversible(dropout=0.0), models.batch("bert")
    model(**batch).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = model(**batch).loss
    assert verify(model, batch).bitwise
    loss.backward()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_even_without_grad_mode(mode: Any) -> None:
    model = reversible()
    with mode():
        report = verify(model, {name: value + 0 for name, value in models.batch("bert").items()})
        assert not torch.is_grad_enabled()
    assert report.passed()


# -- bad input -------------------------------------------------------------------------------------------------------


def test_models_in_which_nothing_is_rebuilt_are_refused() -> None:
    batch = models.batch("bert")
    with pytest.raises(ConfigError, match=r"given a str as model\. Valid is a model that get_peft_model"):
        verify("bert", batch)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"BertForSequenceClassification is not reversible.*get_peft_model.*or meft\.make_reversible"
    ):
        verify(models.build("bert"), batch)
    with pytest.raises(ConfigError, match='coupling="adapter" leaves the layers uncoupled'):
        verify(adapted(coupling="adapter"), batch)
    with pytest.raises(ConfigError, match='backward="cached" keeps all activations'):
        verify(reversible(backward="cached"), batch)
    with pytest.raises(ConfigError, match="frozen_layers=1 and cached_layers=2 are all 3 layers"):
        verify(reversible(frozen_layers=1, cached_layers=2), batch)
    model = adapted()
    with model.disable_adapter(), pytest.raises(ConfigError, match=r"No MEFT adapter .* is active.*set_adapter"):
        verify(model, batch)


def test_models_without_gradients_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no parameter that requires gradients.*requires_grad_\(True\)"):
        verify(reversible().requires_grad_(False), models.batch("bert"))
    model = reversible().requires_grad_(False)
    model.classifier.requires_grad_(True)
    with pytest.raises(ConfigError, match="No layer of BertForSequenceClassification was rebuilt"):
        verify(model, models.batch("bert"))
    model = reversible("bert", "FEATURE_EXTRACTION").requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(())))
    with pytest.raises(ConfigError, match="No output of BertModel on this batch depends on a trainable parameter"):
        verify(model, models.batch("bert", "FEATURE_EXTRACTION"))


def test_where_the_model_returns_no_hidden_state_that_of_the_last_layer_is_looked_at() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = models.build("bert", layers=2).bert.encoder.layer

        def forward(self, hidden: Tensor) -> dict[str, Tensor]:
            for layer in self.layers:
                hidden = layer(hidden)
            return {"loss": hidden.square().sum()}

    model = meft.make_reversible(Bare())
    report = verify(model, {"hidden": torch.randn(2, 5, 32)})
    assert report.passed() and 0 < report.starting_point.hidden_state < 1


def test_batches_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"given a Tensor as batch\. Valid is a mapping"):
        verify(reversible(), models.batch("bert")["input_ids"])  # type: ignore[arg-type]


# -- table, figure, JSON ---------------------------------------------------------------------------------------------


def test_table() -> None:
    report = verify(adapted("bart", "SEQ_2_SEQ_LM"), models.batch("bart", "SEQ_2_SEQ_LM"))
    text = " ".join(str(report).split())
    for expected in (
        "model.encoder.layers: rebuilt streams against the original ones",
        "model.decoder.layers: rebuilt streams against the original ones",
        "│ 2 │ 0 │ 0 │ 0 of 1,344 │ yes │",
        "demanded: bit-equal",
        "demanded: at most 1e-06 (float32)",
        f"change of the loss: {report.starting_point.coupled_loss:.4f} instead of",
        "│ verdict │ passed │",
    ):
        assert expected in text


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_figure_is_written_and_the_same_each_time(tmp_path: Path, ending: str) -> None:
    report = verify(reversible(arithmetic="float"), models.batch("bert"))
    path = tmp_path / f"error.{ending}"
    path.write_text("of an earlier run")
    assert report.figure(path) == path
    first = path.read_bytes()
    report.figure(str(path))
    assert path.read_bytes() == first and len(first) > 1000
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    if ending == "svg":
        assert ElementTree.fromstring(first).tag.endswith("svg")


def test_figure_places_zeros_apart_and_infinity_at_the_top() -> None:
    figure = error_against_depth({"a": {"exact": [(1, 0.0), (2, 0.0)], "float": [(1, 1e-7), (2, math.inf), (3, 1e9)]}})
    (axes,) = figure.axes
    exact, floats = (line.get_ydata() for line in axes.lines[:2])
    ticks = dict(zip((label.get_text() for label in axes.get_yticklabels()), axes.get_yticks(), strict=True))
    assert list(exact) == [ticks["0"]] * 2
    assert ticks["0"] < floats[0] - 1 and floats[0] == pytest.approx(-7)
    assert floats[1] == floats[2] == ticks["$10^{6}$ or more"]
    assert axes.get_legend_handles_labels()[1] == ["exact", "float"]


def test_figure_counts_layers_from_the_output_down() -> None:
    errors = tuple(LayerError(layer, 10.0**-layer, 0.0, 1, 1) for layer in range(3))
    assert list(curve(errors)) == [(1, 1e-2), (2, 1e-1), (3, 1.0)]


def test_figures_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    report = verify(reversible(layers=1), models.batch("bert"))
    with pytest.raises(ConfigError, match=r"error\.gif' does not say.*\.svg, \.png, \.pdf"):
        report.figure(tmp_path / "error.gif")
    with pytest.raises(ConfigError, match=r"The folder of .* does not exist"):
        report.figure(tmp_path / "none" / "error.svg")


def test_as_dict_holds_everything() -> None:
    report = verify(reversible(layers=2), models.batch("bert"))
    found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert found["passed"] is found["bitwise"] is found["exact"] is True
    assert found["reconstruction_error"]["bert.encoder.layer"][1] == vars(LayerError(1, 0.0, 0.0, 0, 1344))
    assert found["starting_point"]["plain_loss"] == report.starting_point.plain_loss


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("verify") / "model")


def run(*words: str) -> int:
    """Runs the command as the command line does, which turns errors of bad input into exit code 2."""
    return verify_command([*words, "--device=cpu", "--seq_length=8"])


def test_command_writes_table_figure_and_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure, record = tmp_path / "error.svg", tmp_path / "found.json"
    assert run(f"--model_name_or_path={folder}", f"--figure={figure}", f"--json={record}", "--method=meft3") == 0
    shown = capsys.readouterr().out
    assert "encoder.layer: rebuilt streams against the original ones" in shown and "passed" in shown
    assert f"Figure: {figure}" in shown and figure.stat().st_size > 1000
    found = json.loads(record.read_text())
    assert found["passed"] is True and found["command"].startswith("meft verify --model_name_or_path=")
    assert {"torch", "meft"} <= set(found["versions"]) and "cores" in found["hardware"] and found["date"]


def test_command_with_the_same_seed_finds_the_same(folder: Path, tmp_path: Path) -> None:
    found = []
    for index, seed in enumerate((0, 0, 1)):
        record = tmp_path / f"{index}.json"
        words = (f"--model_name_or_path={folder}", "--task_type=SEQ_CLS", "--arithmetic=float", "--drift_tolerance=1")
        assert run(*words, f"--json={record}", f"--seed={seed}") == 0
        found.append(json.loads(record.read_text())["gradient_errors"])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "FEATURE_EXTRACTION"])
def test_command_on_every_task(folder: Path, task: str) -> None:
    assert run(f"--model_name_or_path={folder}", f"--task_type={task}", "--batch_size=3") == 0


def test_random_batches_are_padded_and_their_padding_has_no_label() -> None:
    sizes = {"batch_size": 3, "seq_length": 9, "seed": 0}
    batch = random_batch(models.build("bart", "SEQ_2_SEQ_LM", layers=1), "SEQ_2_SEQ_LM", **sizes)
    padding = batch["attention_mask"] == 0
    assert batch["attention_mask"].sum(dim=1).tolist() == [9, 7, 5]
    assert (batch["input_ids"] == models.PAD).equal(padding) and (batch["labels"] == -100).equal(padding)
    assert (batch["input_ids"] == models.END).sum(dim=1).tolist() == [1, 1, 1]


def test_command_exits_with_1_when_activations_are_not_rebuilt(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"--model_name_or_path={folder}", "--method=full", "--under=meft3", "--arithmetic=float")
    assert run(*words, "--drift_tolerance=1e-9") == 1
    assert "failed" in capsys.readouterr().out
    assert run(*words, "--drift_tolerance=0.5") == 0


def test_command_on_lora_text_and_autocast(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "lines.txt"
    text.write_text("the cat sat on the mat\n\nthe dog ran\na bird flew\n")
    words = (f"--model_name_or_path={folder}", "--method=lora", "--gamma=0.125", "--task_type=SEQ_CLS")
    assert run(*words, f"--text_file={text}", "--autocast=bfloat16") == 0
    shown = capsys.readouterr().out
    assert "(bfloat16)" in shown
    assert "0 of 512" in shown  # two streams of two rows of eight tokens, 16 wide


@pytest.mark.parametrize("kind", ["meft", "lora"])
def test_command_on_a_trained_adapter(folder: Path, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    config = meft.MeftConfig(task_type="SEQ_CLS", coupling="momentum", gamma=0.5) if kind == "meft" else lora
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    words = (f"--model_name_or_path={tmp_path / 'adapter'}",)
    record = tmp_path / "found.json"
    assert run(*words, f"--json={record}") == 0
    trained = json.loads(record.read_text())["gradient_errors"]
    assert any(("meft_f_up" if kind == "meft" else "lora_A") in name for name in trained)
    assert any("classifier" in name for name in trained)
    with pytest.raises(ConfigError, match=rf"method was given, but .* is an adapter of {kind.upper()}"):
        run(*words, "--method=meft2")
    if kind == "meft":
        with pytest.raises(ConfigError, match=r"gamma was given.*Leave --gamma out"):
            run(*words, "--gamma=0.25")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--method=meft9"], ConfigError, "method is 'meft9'"),
        (["--under=momentum"], ConfigError, "method 'meft1' brings its own coupling"),
        (["--method=adapter"], ConfigError, 'coupling="adapter" leaves the layers uncoupled'),
        (["--method=lora", "--under=sideways"], ConfigError, "under='sideways' is unknown"),
        (["--task_type=SING"], ConfigError, "task_type='SING' is unknown"),
        (["--batch_size=0"], ConfigError, "batch_size=0 is out of range"),
        (["--figure=error.gif"], ConfigError, "does not say what kind of figure"),
        (["--json=none/found.json"], ConfigError, "The folder of 'none/found.json' does not exist"),
        (["--device=abacus"], ConfigError, "device is 'abacus'"),
        (["--text_file=none.txt"], DataError, "none.txt cannot be read as text"),
        (["--seq_length=25"], ConfigError, "seq_length is 25, but BertModel takes at most 24 tokens"),
        (["--model_name_or_path=./none"], CheckpointError, "./none"),
        (["--lam=0.3"], ConfigError, "lam=0.3 has no integer inverse"),
    ],
)
def test_command_refuses_bad_input(folder: Path, words: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        verify_command([f"--model_name_or_path={folder}", "--device=cpu", "--seq_length=8", *words])
    assert issubclass(error, cli.BAD_INPUT)  # which the command line makes exit code 2


def test_exit_codes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def code(*words: str) -> int:
        with pytest.raises(SystemExit) as end:
            cli.main(["verify", f"--model_name_or_path={folder}", "--device=cpu", "--seq_length=8", *words])
        return int(end.value.code or 0)

    assert code() == 0
    assert code("--method=full", "--arithmetic=float", "--drift_tolerance=1e-9") == 1
    assert code("--method=meft9") == 2
    assert capsys.readouterr().err.startswith("Error: method is 'meft9'")
    assert code("--help") == 0
    assert "--under" in capsys.readouterr().out


def test_command_names_a_text_file_that_is_too_short(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("the cat\n")
    with pytest.raises(DataError, match=r"has 1 lines of text, but --batch_size is 2"):
        run(f"--model_name_or_path={folder}", f"--text_file={tmp_path / 'lines.txt'}")
