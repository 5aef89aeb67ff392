"""Where a coupled model starts: the factors it takes, what a saved folder says, and its distance from the plain one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainerCallback,
)

import meft
from integrations.test_callbacks import lora, run, training_logs
from meft.backbone.discovery import find_stacks, post_norm
from meft.backbone.layers import ReversibleLayer
from meft.backbone.plan import Plan
from meft.engine import couplings
from meft.engine.tape import residues_told_to
from meft.errors import ConfigError, DistantStartWarning
from meft.integrations.callbacks import START_KL, START_LOSS, FirstBatch
from meft.loss import LazyLogits
from meft.options import PLACES
from meft.training.runs import begun_with
from meft.tuner.config import MeftConfig
from meft.verification.distance import Distance, distance_from_plain
from support import models, tiny
from support.peft_helpers import batch_of, enlarge, gradients
from support.stacks import Block, Stacked

SAVED = Path(__file__).parents[1] / "saved" / "0.1.0"
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def llama(**options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 48, "max_position_embeddings": 32, **options}))


def tokens(rows: int = 2, length: int = 8) -> dict[str, Tensor]:
    ids = torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def plan_of(model: nn.Module) -> Any:
    placements = [module.placement() for module in model.modules() if isinstance(module, ReversibleLayer)]
    return next(placement.reversible_stack.plan for placement in placements if placement is not None)


# --- What was saved keeps its meaning -------------------------------------------------------------------------------


def saved_adapters() -> list[tuple[str, str]]:
    return [(base, folder.name) for base in ("bert", "llama") for folder in sorted((SAVED / base).iterdir()) if
            folder.is_dir()]  # fmt: skip


def loaded(base: str, name: str) -> Tensor:
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(SAVED / base).double(), SAVED / base / name)
    with torch.no_grad():
        hidden: Tensor = model.double().eval()(input_ids=torch.arange(10).view(2, 5) % 11).last_hidden_state
    return hidden.float()


@pytest.mark.parametrize(("base", "name"), saved_adapters())
def test_adapters_of_version_0_1_0_compute_what_they_computed(base: str, name: str) -> None:
    """Bit for bit, by `tests/saved/make.py` at that version."""
    assert torch.equal(loaded(base, name), load_file(SAVED / base / "outputs.safetensors")[name])


def test_the_saved_outputs_tell_the_settings_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With today's defaults in the place of those of version 0.1.0 the same folders compute something else."""
    monkeypatch.setattr("meft.options.table.SAVED_BEFORE", couplings._PRE_NORM)
    wanted = load_file(SAVED / "llama" / "outputs.safetensors")
    for name in ("meft1", "meft2", "meft3", "momentum", "momentum-block"):
        assert not torch.equal(loaded("llama", name), wanted[name])


@pytest.mark.parametrize("folder", [SAVED / "bert" / "momentum", SAVED / "llama" / "momentum"])
@pytest.mark.parametrize("cls", [PeftConfig, MeftConfig])
def test_a_configuration_of_version_0_1_0_says_what_it_took(folder: Path, cls: Any) -> None:
    config = cls.from_pretrained(str(folder))
    assert (config.gamma, config.output, config.compensated) == (0.25, "newest", False)
    assert (config.adapter_places, config.fraction_bits) == (["feed_forward"], 16)


def test_a_configuration_of_version_0_1_0_that_was_never_put_into_a_model(tmp_path: Path) -> None:
    found = json.loads((SAVED / "llama" / "meft1" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**found, "base_layers": None}))
    config = MeftConfig.from_pretrained(str(tmp_path))
    assert (config.lam, config.beta, config.output) == (0.1, 1.0, "mean")


@pytest.mark.parametrize("coupling", PLACES)
@pytest.mark.parametrize("build", [llama, lambda: models.build("bert", "SEQ_CLS")], ids=["llama", "bert"])
def test_what_was_used_is_saved_and_outlives_a_change_of_defaults(
    build: Any, coupling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(build(), MeftConfig(coupling=coupling, bottleneck_dim=2))
    enlarge(model)
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["adapter_places"] == list(PLACES[coupling].values())
    ids = tokens()["input_ids"]
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).logits
    if coupling != "adapter":
        used = plan_of(model).coupling.options()
        names = {"gamma", "output", "compensated"} if coupling == "momentum" else {"lam", "beta", "output"}
        assert all(said[name] == used[name] and said[name] is not None for name in names)
    for table in ("_POST_NORM", "_PRE_NORM", "SAVED_BEFORE"):
        changed = {name: couplings.Own(0.5, 0.5, None, "mean") for name in ("meft1", "meft2", "meft3")}
        changed["momentum"] = couplings.Own(gamma=0.5, output="mean")
        monkeypatch.setattr(couplings, table, changed)
    again = PeftModel.from_pretrained(build(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, wanted)


def test_a_configuration_that_serves_two_models_takes_what_each_wants() -> None:
    config = MeftConfig(coupling="meft1")
    get_peft_model(models.build("bert", "SEQ_CLS"), config)
    assert (config.lam, config.output, config.adapter_init_std) == (0.1, "mean", 0.02)
    get_peft_model(llama(), config)
    assert (config.lam, config.output, config.adapter_init_std) == (1 / 128, "newest", 0.0)
    chosen = MeftConfig(coupling="meft1", lam=0.25)
    for model in (models.build("bert", "SEQ_CLS"), llama()):
        get_peft_model(model, chosen)
        assert chosen.lam == 0.25


# --- Which factors, on which layers ---------------------------------------------------------------------------------


class EndsInNorm(Block):
    """A layer that no table knows."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.norm(hidden_states + torch.tanh(self.mlp(hidden_states)))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: models.build("bert", "SEQ_CLS"), True),
        (lambda: models.build("roberta", "SEQ_CLS"), True),
        (lambda: models.build("bart", "SEQ_2_SEQ_LM"), True),
        (lambda: models.build("opt_350m", "CAUSAL_LM"), True),
        (lambda: models.build("opt", "CAUSAL_LM"), False),
        (llama, False),
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40)), False),
        (lambda: Stacked([EndsInNorm(), EndsInNorm()]), True),
        (lambda: Stacked([Block(), Block()]), False),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_layers_end_in_is_seen_from_what_they_do(build: Any, expected: bool, device: str) -> None:
    """Also on the meta device, where there are no numbers; nothing is drawn, and no hook stays."""
    model = build().to(device).train()
    torch.manual_seed(3)
    assert post_norm(find_stacks(model)) is expected
    drawn = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(torch.rand(()), drawn)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("coupling", "on_post_norm", "on_pre_norm"),
    [
        ("meft1", (0.1, 1.0, "mean"), (1 / 128, 1.0, "newest")),
        ("meft2", (1.0, 0.1, "mean"), (1.0, 1 / 128, "newest")),
        ("meft3", (0.1, 0.1, "mean"), (1 / 256, 1 / 256, "newest")),
    ],
)
def test_the_papers_factors_on_post_norm_layers_only(coupling: str, on_post_norm: Any, on_pre_norm: Any) -> None:
    for model, expected, kind in (
        (models.build("bert", "SEQ_CLS"), on_post_norm, "post"),
        (llama(), on_pre_norm, "pre"),
    ):
        plan = plan_of(meft.make_reversible(model, coupling))
        options = plan.coupling.options()
        assert tuple(options[name] for name in ("lam", "beta", "output")) == expected
        assert str(plan).endswith(f"; {kind}-norm layers") and f"output {expected[2]!r}" in str(plan)


def test_the_papers_settings_for_opt_can_be_had_as_written() -> None:
    config = MeftConfig(coupling="meft1", lam=0.1, output=("sum", 0.1), adapter_init_std=0.02)
    model = get_peft_model(models.build("opt", "CAUSAL_LM"), config)
    plan = plan_of(model)
    assert [step.factor for step in plan.coupling.steps] == [0.1, 1.0] and plan.coupling.output == (0.1, 1.0)
    ups = [parameter for name, parameter in model.named_parameters() if "_up." in name and "weight" in name]
    assert ups and all(0.01 < float(up.detach().std()) < 0.03 for up in ups)


@pytest.mark.parametrize("coupling", PLACES)
def test_adapters_of_a_pre_norm_stack_start_as_nothing(coupling: str) -> None:
    model = get_peft_model(llama(), MeftConfig(coupling=coupling))
    ups = [parameter for name, parameter in model.named_parameters() if "meft_" in name and "_up." in name]
    assert ups and not any(up.any() for up in ups)


@pytest.mark.parametrize("value", [-0.1, "small", float("nan")])
def test_an_init_std_that_is_none(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"=.* is (out of range|a str)\. Valid: a number from 0 up or None"):
        MeftConfig(adapter_init_std=value)


# --- Two adapters for momentum --------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_momentum_and_adapter_differ_by_the_coupling_alone(granularity: str) -> None:
    ids, found = tokens()["input_ids"], {}
    for coupling in ("momentum", "adapter"):
        options = {"granularity": granularity} if coupling == "momentum" else {}
        model = get_peft_model(llama(), MeftConfig(coupling=coupling, bottleneck_dim=2, **options)).eval()
        enlarge(model)
        if coupling == "momentum":
            coupled = model(input_ids=ids).logits
            for layer in (module for module in model.modules() if isinstance(module, ReversibleLayer)):
                layer.placement().reversible_stack.plan = Plan.make(coupling=None)
        found[coupling] = (set(model.state_dict()), model(input_ids=ids).logits)
    assert found["momentum"][0] == found["adapter"][0]
    assert torch.equal(found["momentum"][1], found["adapter"][1])
    assert not torch.equal(coupled, found["adapter"][1])


def test_one_adapter_can_be_chosen() -> None:
    one = get_peft_model(llama(), MeftConfig(coupling="momentum", adapter_places=["feed_forward"]))
    assert not any("meft_g_" in name for name, _ in one.named_parameters())
    with pytest.raises(
        ConfigError, match=r"adapter_places=\['attention'\] does not go with coupling='momentum'. Valid"
    ):
        MeftConfig(coupling="momentum", adapter_places=["attention"])


# --- Compensated momentum -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"granularity": "block"}], ids=str)
@pytest.mark.parametrize("build", [llama, lambda: models.build("bert", "SEQ_CLS")], ids=["llama", "bert"])
def test_gradients_are_those_of_stored_activations_bit_for_bit(
    build: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    found = []
    batch = tokens()
    if build is not llama:
        batch = batch_of("bert", "SEQ_CLS")
    for backward in ("cached", "reversible"):
        model = meft.make_reversible(
            build().to(dtype), gamma=1 / 8, compensated=True, backward=backward, fused_loss=False, **options
        )
        found.append(gradients(model.train(), batch))
    cached, rebuilt = found
    # What both streams start as gets the sum of two gradients, which ordinary autograd adds up in another order.
    inside = [name for name in cached if ".layers." in name or ".layer." in name]
    assert cached.keys() == rebuilt.keys() and inside
    assert all(torch.equal(cached[name], rebuilt[name]) for name in inside)
    if dtype == torch.float32:
        torch.testing.assert_close(rebuilt, cached)


def test_residues_take_what_they_take_without() -> None:
    sizes = []
    for compensated in (False, True):
        told: list[int] = []
        model = meft.make_reversible(llama(), gamma=1 / 8, compensated=compensated).train()
        with residues_told_to(lambda residues, told=told: told.extend(residue.numel() for residue in residues)):
            model(**tokens()).loss.backward()
        sizes.append(told)
    assert sizes[0] == sizes[1] == [2 * 8 * 32 * 3 // 8] * 3


def test_the_weighted_mean_moves_by_the_layers_function() -> None:
    """(y1 + gamma * x2) / (1 + gamma) is the mean before and f(x2), f the layer without its residual."""
    coupling = couplings.make_coupling("momentum", gamma=0.25, compensated=True)
    x1, x2, f = (torch.randn(4, 6, dtype=torch.float64) for _ in range(3))
    streams, _ = coupling.steps[0].forward(meft.engine.arithmetic.FloatArithmetic(), (x1, x2), x2 + f)
    after = coupling.read(*coupling.switched(streams))
    torch.testing.assert_close(after, coupling.read(x1, x2) + f)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"coupling": "meft1", "compensated": True}, "compensated=True does not go with coupling='meft1'"),
        ({"coupling": "momentum", "compensated": True, "sign": "random"}, 'does not go with sign="random"'),
        ({"coupling": "momentum", "compensated": 1}, "compensated=1 is a int. Valid: True or False or None"),
        ({"coupling": "meft1", "output": "weighted"}, "output='weighted' is no output rule"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MeftConfig(**options)
    assert text in str(caught.value)


def test_other_gammas_of_a_compensated_model_are_read_with_their_own_weights() -> None:
    model = meft.make_reversible(llama(), gamma=1 / 4, compensated=True)
    found = meft.verify(model, tokens(), deploy=True).deployment
    eighth = meft.make_reversible(meft.restore(model), gamma=1 / 8, compensated=True)
    assert found is not None and found.by_gamma["1/8"] == pytest.approx(by_hand(eighth, tokens())[0], abs=1e-6)


# --- The distance from the plain model ------------------------------------------------------------------------------


def by_hand(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    with torch.no_grad():
        output = model.eval()(**batch)
    return float(output.loss), output.logits.double().log_softmax(-1).flatten(0, -2)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("adapters", [False, True])
def test_the_distance_by_hand(family: str, adapters: bool) -> None:
    """Of a language model, and of a classifier with a new head."""
    base = llama() if family == "llama" else models.build("bert", "SEQ_CLS")
    batch = tokens() if family == "llama" else batch_of("bert", "SEQ_CLS")
    plain_loss, plain = by_hand(base, batch)
    if adapters:
        model = get_peft_model(base, MeftConfig(coupling="meft1", lam=0.25))
        enlarge(model)
    else:
        model = meft.make_reversible(base, gamma=1 / 2)
    loss, coupled = by_hand(model, batch)
    found = distance_from_plain(model.train(), **batch)
    kl = (plain.exp() * (plain - coupled)).sum(-1).mean()
    assert found is not None and found.kl == pytest.approx(float(kl), rel=1e-4) and found.kl > 0
    assert (found.loss, found.plain_loss) == pytest.approx((loss, plain_loss), rel=1e-6)


def test_padding_does_not_count() -> None:
    model = meft.make_reversible(llama(), gamma=1 / 2)
    ids, mask = tokens()["input_ids"], torch.ones(2, 8, dtype=torch.long)
    short = distance_from_plain(model, input_ids=ids[:, :5], attention_mask=mask[:, :5])
    mask[:, 5:] = 0
    padded = distance_from_plain(model, input_ids=ids, attention_mask=mask)
    assert short is not None and padded is not None and padded.kl == pytest.approx(short.kl, rel=1e-4)


def test_measuring_leaves_no_trace() -> None:
    model = meft.make_reversible(models.build("bert", "SEQ_CLS", dropout=0.3)).train()
    batch = batch_of("bert", "SEQ_CLS")
    alone = gradients(model, batch, 4)
    torch.manual_seed(4)
    distance_from_plain(model, **batch)
    model(**batch).loss.backward()
    assert all(torch.equal(model.get_parameter(name).grad, gradient) for name, gradient in alone.items())
    assert all(module.training for module in model.modules())


def test_logits_do_not_exist_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: shapes.append(linear(x, w, b)) or shapes[-1])
    model = meft.make_reversible(llama()).train()
    assert distance_from_plain(model, **tokens(2, 512)) is not None
    sizes = {found.shape[:-1].numel() for found in shapes if found.shape[-1] == 40 and type(found) is not LazyLogits}
    assert 256 in sizes and 1024 not in sizes


def test_nothing_coupled_has_no_distance() -> None:
    assert distance_from_plain(llama(), **tokens()) is None
    assert distance_from_plain(get_peft_model(llama(), MeftConfig(coupling="adapter")), **tokens()) is None


def far_model() -> nn.Module:
    """A pre-norm model with the paper's factors, whose predictions are sharp enough to move."""
    model = llama()
    model.lm_head.weight.data.mul_(200)
    return meft.make_reversible(model, "meft1", lam=0.5, output="mean")


def test_a_far_start_is_warned_of_with_what_brings_it_nearer() -> None:
    told: list[Distance] = []
    model, first = far_model().train(), FirstBatch(told.append)
    hooks = dict(model._forward_pre_hooks)
    first.wait(model)
    with pytest.warns(DistantStartWarning, match=r"more than 0.5 nats.* Nearer: lam=1/64, output=\"newest\""):
        model(**tokens())
    assert told[0].far and model._forward_pre_hooks == hooks
    near = meft.make_reversible(meft.restore(model), "meft1", lam=1 / 64, output="newest").train()
    first.wait(near)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near(**tokens())
    assert not told[1].far and told[1].kl < 0.1 * told[0].kl


def test_evaluation_before_training_is_not_the_first_batch() -> None:
    told: list[Distance] = []
    model, first = meft.make_reversible(llama()), FirstBatch(told.append)
    first.wait(model)
    with torch.no_grad():
        model.eval()(**tokens())
    assert not told
    model.train()(**tokens())
    model(**tokens())
    assert len(told) == 1


def test_the_first_log_has_the_distance(tmp_path: Path) -> None:
    logs = training_logs(run(meft.make_reversible(lora()), tmp_path, report_to=[]).state.log_history)
    assert [START_KL in entry and START_LOSS in entry for entry in logs] == [True, False, False, False]
    assert 0 < logs[0][START_KL] < 0.1
    plain = training_logs(run(lora(), tmp_path, report_to=[]).state.log_history)
    assert not any(START_KL in entry for entry in plain)


def test_the_distance_does_not_move_training(tmp_path: Path) -> None:
    losses = []
    for callback in (meft.MeftCallback(), TrainerCallback()):
        torch.manual_seed(0)
        logs = training_logs(run(meft.make_reversible(lora()), tmp_path, callback, report_to=[]).state.log_history)
        losses.append([entry["loss"] for entry in logs])
    assert losses[0] == losses[1]


def test_verify_shows_the_start_and_the_plan() -> None:
    model = meft.make_reversible(llama(), gamma=1 / 4)
    report = meft.verify(model, tokens())
    found = distance_from_plain(model, **tokens())
    assert found is not None and report.starting_point.kl == found.kl > 0
    text = " ".join(str(report).split())
    assert "nats (KL)" in text and "pre-norm" in text and "gamma 0.25" in text
    assert report.as_dict()["starting_point"]["kl"] == found.kl


# --- Runs of `meft train` -------------------------------------------------------------------------------------------


def test_a_run_keeps_its_start_and_its_settings(tmp_path: Path) -> None:
    base, rte = tiny.make_model(tmp_path / "base"), tiny.make_rte(tmp_path / "rte")
    said: list[str] = []
    words = ("--method=momentum", "--max_steps=2", "--per_device_train_batch_size=4")
    found = tiny.train(base, ["--task=rte", f"--data_dir={rte}"], tmp_path / "run", *words, say=said.append)
    config = MeftConfig.from_pretrained(str(tmp_path / "run"))
    assert found["settings"]["gamma"] == config.gamma == 1 / 32
    assert found["settings"]["adapter_places"] == config.adapter_places == ["feed_forward", "layer"]
    assert found["start"]["kl"] > 0 and found["start"]["loss"] != found["start"]["plain_loss"]
    assert any(line.startswith("Start, on the first batch: loss ") for line in said)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"] == found["settings"]


def test_an_unfinished_run_of_version_0_1_0_goes_on_with_its_settings(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"command": "", "started": "", "arguments": {}}))
    assert begun_with(tmp_path, "momentum") == {
        "adapter_places": ("feed_forward",),
        "adapter_init_std": 0.02,
        "fraction_bits": 16,
        "gamma": 0.25,
        "output": "newest",
        "compensated": False,
    }
    assert begun_with(tmp_path, "meft1")["lam"] == 0.1 and begun_with(tmp_path, "lora") == {}
