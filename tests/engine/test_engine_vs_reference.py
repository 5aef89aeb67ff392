"""The engine against the slow reference: same weights, same batch, same random state, in float64.

`backward="cached"` stores activations, so it agrees with the reference to rounding (`CACHED`). `backward="reversible"`
rebuilds them, and each inversion in float arithmetic multiplies the rounding error: about 10x a layer (meft1, meft2,
1/lam), 4x (momentum, 1/gamma) or 70x (meft3, whose blocks are steep as well). Stacks of three layers hence keep 13 of
float64's 16 digits (momentum) to 9 (meft3), which `REVERSIBLE` allows; four layers get ten times the room. A wrong
gradient shows in the first digits.

All tests use scaled dot product attention but those that say otherwise: OPT's eager attention computes its softmax in
float32, where a rounding that falls the other way in the recomputation costs more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import meft
from support import models
from support.reference import TABLE, reference_hidden, reference_model

COUPLINGS = tuple(TABLE)
BACKWARDS = ("cached", "reversible")
CACHED, REVERSIBLE = 1e-12, 1e-8
GRID = 1e-4  # what rounding the streams to 2^-20 leaves of the outputs and gradients of three layers
LAYERS = 3

TASK_OF = {"bert": "SEQ_CLS", "roberta": "TOKEN_CLS", "bart": "SEQ_2_SEQ_LM", "opt": "SEQ_CLS", "opt_350m": "CAUSAL_LM"}
"""One head a family for the tests that are not about heads; BART's puts both of its stacks to work."""


def tolerance(backward: str) -> float:
    return CACHED if backward == "cached" else REVERSIBLE


def settings(coupling: str, compensated: bool = False) -> dict[str, Any]:
    """The reference's own factors and output rule, which hold whatever a model's layers end in."""
    rule = TABLE[coupling]
    if coupling == "momentum":
        return {"gamma": rule.lam, "output": "weighted" if compensated else rule.output}
    return {"lam": rule.lam, "beta": rule.beta, "output": rule.output}


def engine_model(
    family: str,
    task: str | None = None,
    *,
    coupling: str,
    backward: str,
    dropout: float = 0.0,
    attn_implementation: str = "sdpa",
    layers: int = LAYERS,
    **options: Any,
) -> peft.PeftModel:
    """A PEFT model in training mode; its adapters are made large enough to matter. Same arguments, same weights."""
    task = task or TASK_OF[family]
    base = models.build(
        family, task, layers=layers, dropout=dropout, dtype=torch.float64, attn_implementation=attn_implementation
    )
    own = {} if coupling == "adapter" else settings(coupling, options.get("compensated", False))
    config = meft.MeftConfig(
        task_type=task,
        coupling=coupling,
        backward=backward,
        bottleneck_dim=8,
        **{"arithmetic": "float", **own, **options},
    )
    model = peft.get_peft_model(base, config)
    enlarge_adapters(model)
    return model.train()


def enlarge_adapters(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "meft_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def options_of(coupling: str, **options: Any) -> dict[str, Any]:
    """The options of a MeftConfig that the reference has too."""
    return {"coupling": coupling, **options}


def visible_output(output: Any) -> Tensor:
    """Everything a user reads from a model's output but the loss, in one tensor."""
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return torch.cat([output[name].flatten() for name in names if output.get(name) is not None])


def objective(output: Any) -> Tensor:
    """A float64 scalar that weighs every output differently (Transformers' causal loss is float32)."""
    flat = visible_output(output)
    weights = torch.randn(flat.shape, generator=torch.Generator().manual_seed(9), dtype=flat.dtype)
    return (flat * weights).sum()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(parameters: Mapping[str, Tensor], run: Callable[[], Tensor], seed: int = 1) -> dict[str, Tensor]:
    """The gradients that backward() leaves after `run`, taken off the parameters again."""
    torch.manual_seed(seed)
    run().backward()
    found = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"no gradient for {name}"
        found[name], parameter.grad = parameter.grad, None
    return found


def assert_close(actual: Tensor, expected: Tensor, relative: float, what: str = "output") -> None:
    """In the Euclidean norm; an expectation of zero would compare nothing, so it fails."""
    size = expected.norm()
    assert size > 0, f"{what}: nothing to compare with"
    error = ((actual - expected).norm() / size).item()
    assert error <= relative, f"{what}: relative error {error:.2e}, tolerated {relative:.0e}"


def assert_same_gradients(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], relative: float) -> None:
    assert actual.keys() == expected.keys() and len(expected) > 0
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, relative, name)


def compare(
    model: nn.Module, batch: Mapping[str, Any], relative: float, output_tolerance: float = CACHED, **options: Any
) -> None:
    """Outputs, loss and every gradient of one training step, engine against reference."""
    parameters = trained(model)
    outputs = []

    def run() -> Tensor:
        outputs.append(model(**batch))
        return objective(outputs[-1])

    actual = gradients(parameters, run)
    with reference_model(model, **options):
        expected = gradients(parameters, run)
    assert_close(visible_output(outputs[0]), visible_output(outputs[1]), output_tolerance)
    if outputs[1].get("loss") is not None:
        exact = outputs[1].loss.dtype == torch.float64
        assert_close(outputs[0].loss, outputs[1].loss, output_tolerance if exact else 1e-5, "loss")
    assert_same_gradients(actual, expected, relative)


# --- Every coupling on every family -------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_coupling_on_every_family(family: str, coupling: str, backward: str) -> None:
    model = engine_model(family, coupling=coupling, backward=backward)
    compare(model, models.batch(family, TASK_OF[family]), tolerance(backward), coupling=coupling)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_dropout_is_replayed(family: str, coupling: str, backward: str) -> None:
    model = engine_model(family, coupling=coupling, backward=backward, dropout=0.3)
    compare(model, models.batch(family, TASK_OF[family]), tolerance(backward), coupling=coupling)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_reversible_against_cached(family: str, coupling: str) -> None:
    """Dropout on; both must agree on the loss to the last bit, since the forward pass is the same program."""
    batch, found = models.batch(family, TASK_OF[family]), []
    for backward in BACKWARDS:
        model = engine_model(family, coupling=coupling, backward=backward, dropout=0.3)
        torch.manual_seed(1)
        value = objective(model(**batch)).item()
        found.append((value, gradients(trained(model), lambda model=model: objective(model(**batch)))))
    (cached_value, cached), (reversible_value, reversible) = found
    assert reversible_value == cached_value
    assert_same_gradients(reversible, cached, REVERSIBLE)


@pytest.mark.parametrize(("family", "task"), models.FAMILY_TASKS)
def test_every_head(family: str, task: str) -> None:
    """The head is trained beside the adapters where the task has a new one; PEFT does not know the name of BART's."""
    named = {"modules_to_save": ["classification_head"]} if (family, task) == ("bart", "SEQ_CLS") else {}
    model = engine_model(family, task, coupling="meft1", backward="reversible", dropout=0.1, **named)
    has_head = task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
    assert any("modules_to_save" in name for name in trained(model)) == has_head
    compare(model, models.batch(family, task), REVERSIBLE, coupling="meft1")


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_eager_attention(family: str, backward: str) -> None:
    """OPT's softmax in float32 makes a rebuilt activation differ by 1e-7 before the inversion enlarges it."""
    model = engine_model(family, coupling="meft2", backward=backward, attn_implementation="eager", dropout=0.1)
    single = family.startswith("opt") and backward == "reversible"
    compare(model, models.batch(family, TASK_OF[family]), 1e-4 if single else tolerance(backward), coupling="meft2")


# --- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize(
    "options",
    [
        options_of("meft1", lam=0.5, beta=0.25),
        options_of("meft2", lam=0.5, beta=0.5, output="mean"),
        options_of("meft3", lam=0.25, beta=0.5, output=("sum", 0.1)),
        options_of("momentum", gamma=0.125, output="mean"),
        options_of("momentum", gamma=0.5, output=("sum", 0.5)),
        options_of("meft1", output=("sum", 0.1)),
        options_of("meft2", output=("sum", 0.1)),
        options_of("momentum", gamma=1.0),
        options_of("momentum", gamma=0.25, output="weighted"),
        options_of("momentum", gamma=0.25, compensated=True),
        options_of("momentum", gamma=0.5, compensated=True, output="newest"),
    ],
    ids=lambda options: "-".join(f"{value}" for value in options.values()),
)
def test_factors_and_output_rules(options: dict[str, Any], backward: str) -> None:
    given = dict(options)
    model = engine_model("bart", coupling=given.pop("coupling"), backward=backward, **given)
    compare(model, models.batch("bart", "SEQ_2_SEQ_LM"), tolerance(backward), **options)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_output_newest(coupling: str, backward: str) -> None:
    """The last layer's second adapter of meft1 only touches the older stream, so it alone gets no gradient."""
    model = engine_model("bert", coupling=coupling, backward=backward, output="newest")
    for name, parameter in model.named_parameters():
        if coupling == "meft1" and f".layer.{LAYERS - 1}.meft_g_" in name:
            parameter.requires_grad_(False)
    compare(model, models.batch("bert", "SEQ_CLS"), tolerance(backward), coupling=coupling, output="newest")


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize(
    ("frozen", "cached"), [(1, 0), (0, 1), (2, 1), (1, 2), (0, 4), (3, 0), (2, 2)], ids=lambda count: str(count)
)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_frozen_and_cached_layers(coupling: str, frozen: int, cached: int, backward: str) -> None:
    """Mixes on both stacks of BART, four layers each, with dropout in the frozen ones too."""
    mix = {"frozen_layers": frozen, "cached_layers": cached}
    model = engine_model("bart", coupling=coupling, backward=backward, layers=4, dropout=0.1, **mix)
    names = trained(model)
    for stack in ("encoder", "decoder"):
        assert {i for i in range(4) if any(f"{stack}.layers.{i}.meft_" in name for name in names)} == {
            *range(frozen, 4)
        }
    relative = 10 * tolerance(backward)  # a layer more than elsewhere
    compare(model, models.batch("bart", "SEQ_2_SEQ_LM"), relative, coupling=coupling, **mix)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_same_adapters_without_reversibility(family: str) -> None:
    model = engine_model(family, coupling="adapter", backward="cached", dropout=0.1)
    compare(model, models.batch(family, TASK_OF[family]), CACHED, coupling="adapter")


def test_the_same_adapters_without_reversibility_above_frozen_layers() -> None:
    model = engine_model("bart", coupling="adapter", backward="reversible", frozen_layers=1)
    compare(model, models.batch("bart", "SEQ_2_SEQ_LM"), CACHED, coupling="adapter", frozen_layers=1)


@pytest.mark.parametrize("coupling", [*COUPLINGS, "adapter"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_evaluation(family: str, coupling: str) -> None:
    """In eval mode, with and without gradients wanted."""
    model = engine_model(family, coupling=coupling, backward="reversible", dropout=0.3).eval()
    batch = models.batch(family, TASK_OF[family])
    with reference_model(model, coupling=coupling), torch.no_grad():
        expected = visible_output(model(**batch))
    assert_close(visible_output(model(**batch)), expected, CACHED)
    with torch.no_grad():
        assert_close(visible_output(model(**batch)), expected, CACHED)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_evaluation_with_gradients(coupling: str) -> None:
    model = engine_model("bart", coupling=coupling, backward="reversible").eval()
    compare(model, models.batch("bart", "SEQ_2_SEQ_LM"), REVERSIBLE, coupling=coupling)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_exact_arithmetic_is_the_reference_on_a_grid(family: str, coupling: str, backward: str) -> None:
    """Streams are rounded to 2^-20 in every layer and nothing is lost in between, so outputs and gradients follow."""
    model = engine_model(family, coupling=coupling, backward=backward, arithmetic="exact", fraction_bits=20)
    compare(model, models.batch(family, TASK_OF[family]), GRID, output_tolerance=GRID, coupling=coupling)


# --- Parts of a model trained ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("silent", [("0.",), ("0.", "2."), ("1.", "3."), ("3.",)], ids=lambda silent: "".join(silent))
def test_layers_whose_adapters_are_not_trained(silent: tuple[str, ...], coupling: str, backward: str) -> None:
    """Below the first trained layer no gradient is wanted; above it, one must pass through untrained layers."""
    model = engine_model("bert", coupling=coupling, backward=backward, layers=4, dropout=0.1)
    for name, parameter in model.named_parameters():
        if any(f".layer.{layer}meft_" in name for layer in silent):
            parameter.requires_grad_(False)
    assert len({name.split(".layer.")[1][0] for name in trained(model) if "meft_" in name}) == 4 - len(silent)
    compare(model, models.batch("bert", "SEQ_CLS"), 10 * tolerance(backward), coupling=coupling)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("silent", ["encoder", "decoder"])
def test_one_stack_of_two_trained(silent: str, coupling: str, backward: str) -> None:
    """With a silent decoder, all that its layers pass on is the gradient of the encoder states."""
    model = engine_model("bart", coupling=coupling, backward=backward, dropout=0.1)
    for name, parameter in model.named_parameters():
        if silent in name:
            parameter.requires_grad_(False)
    assert trained(model)
    compare(model, models.batch("bart", "SEQ_2_SEQ_LM"), tolerance(backward), coupling=coupling)


@pytest.mark.parametrize("which", ["f", "g"])
@pytest.mark.parametrize("coupling", ["meft1", "meft2", "meft3"])
def test_one_of_two_adapters_trained(coupling: str, which: str) -> None:
    model = engine_model("bert", coupling=coupling, backward="reversible", dropout=0.1)
    for name, parameter in model.named_parameters():
        if "meft_" in name and f"meft_{which}" not in name:
            parameter.requires_grad_(False)
    compare(model, models.batch("bert", "SEQ_CLS"), REVERSIBLE, coupling=coupling)


# --- Gradients of what comes from outside ---------------------------------------------------------------------------


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("coupling", [*COUPLINGS, "adapter"])
@pytest.mark.parametrize("family", ["bert", "opt", "opt_350m"])
def test_gradient_of_the_input(family: str, coupling: str, backward: str) -> None:
    model = engine_model(family, "FEATURE_EXTRACTION", coupling=coupling, backward=backward, dropout=0.2)
    batch = models.batch(family, "FEATURE_EXTRACTION")
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()

    def run() -> Tensor:
        return objective(model(inputs_embeds=embedded, **batch))

    leaves = {"input": embedded, **trained(model)}
    actual = gradients(leaves, run)
    with reference_model(model, coupling=coupling):
        expected = gradients(leaves, run)
    assert_same_gradients(actual, expected, tolerance(backward))


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("coupling", [*COUPLINGS, "adapter"])
def test_gradient_into_encoder_states(coupling: str, backward: str) -> None:
    """Encoder states as a leaf: all of their gradient comes through the cross-attention of every decoder layer."""
    model = engine_model("bart", coupling=coupling, backward=backward, dropout=0.2)
    batch = models.batch("bart", "SEQ_2_SEQ_LM")
    states = torch.randn(*batch.pop("input_ids").shape, 32, dtype=torch.float64, requires_grad=True)

    def run() -> Tensor:
        return objective(model(encoder_outputs=(states,), **batch))

    leaves = {"encoder states": states, **{n: p for n, p in trained(model).items() if "decoder" in n}}
    actual = gradients(leaves, run)
    with reference_model(model, coupling=coupling):
        expected = gradients(leaves, run)
    assert_same_gradients(actual, expected, tolerance(backward))


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_encoder_states_used_by_the_decoder_and_by_the_loss(coupling: str) -> None:
    model = engine_model("bart", coupling=coupling, backward="reversible")
    batch = models.batch("bart", "SEQ_2_SEQ_LM")

    def run() -> Tensor:
        output = model(**batch)
        return objective(output) + output.encoder_last_hidden_state.square().sum()

    parameters = trained(model)
    actual = gradients(parameters, run)
    with reference_model(model, coupling=coupling):
        expected = gradients(parameters, run)
    assert_same_gradients(actual, expected, REVERSIBLE)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("family", ["bert", "bart", "opt"])
def test_gradients_against_finite_differences(family: str, coupling: str) -> None:
    """The engine by itself: nothing of the reference takes part. Central differences along a random direction a tensor.

    (`torch.autograd.gradcheck` differentiates one forward pass several times, which a reversible one refuses.)
    """
    model = engine_model(family, "FEATURE_EXTRACTION", coupling=coupling, backward="reversible", layers=2)
    batch = models.batch(family, "FEATURE_EXTRACTION", size=2, length=5)
    leaves = trained(model)

    def run() -> Tensor:
        return objective(model(**batch))

    for name, gradient in gradients(leaves, run).items():
        parameter = leaves[name]
        direction = torch.randn_like(parameter)
        slopes = []
        with torch.no_grad():
            for step in (1e-6, -1e-6):
                parameter.add_(step * direction)
                slopes.append(run().item() / (2 * step))
                parameter.sub_(step * direction)
        expected = (gradient * direction).sum().item()
        assert sum(slopes) == pytest.approx(expected, rel=1e-4, abs=1e-4), name


# --- Several passes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0), None], ids=["in order", "reversed", "one backward"])
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("family", ["bert", "bart"])
def test_two_forward_passes_alive_at_once(family: str, backward: str, order: tuple[int, int] | None) -> None:
    """With dropout: each pass replays its own random numbers. None: the two losses are added up first."""
    model = engine_model(family, coupling="meft1", backward=backward, dropout=0.3)
    batches = [models.batch(family, TASK_OF[family], seed=seed) for seed in (0, 1)]
    parameters = trained(model)

    def both(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        return [objective(model(**batch)) for batch in batches]

    actual = both(model)
    if order is None:
        (actual[0] * 2 + actual[1]).backward()
    else:
        for index in order:
            (actual[index] * (2 - index)).backward()
    found = {name: parameter.grad for name, parameter in parameters.items()}
    model.zero_grad()
    with reference_model(model, coupling="meft1"):
        expected = both(model)
        (expected[0] * 2 + expected[1]).backward()
    assert_same_gradients(found, {name: p.grad for name, p in parameters.items()}, tolerance(backward))
    assert [value.item() for value in actual] == pytest.approx([value.item() for value in expected], rel=1e-10)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_gradient_accumulation(coupling: str) -> None:
    """Three steps of backward() on the same `.grad`, a different batch and other random numbers each."""
    model = engine_model("opt", coupling=coupling, backward="reversible", dropout=0.3)
    parameters = trained(model)

    def accumulated() -> dict[str, Tensor]:
        torch.manual_seed(1)
        for seed in range(3):
            objective(model(**models.batch("opt", "SEQ_CLS", seed=seed))).backward()
        found = {name: parameter.grad for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = None
        return found

    actual = accumulated()
    with reference_model(model, coupling=coupling):
        expected = accumulated()
    assert_same_gradients(actual, expected, REVERSIBLE)


def test_a_pass_without_gradients_between_forward_and_backward() -> None:
    """An evaluation in the midst of a training step leaves the step alone."""
    model = engine_model("bert", coupling="meft1", backward="reversible", dropout=0.3)
    batch, parameters = models.batch("bert", "SEQ_CLS"), trained(model)
    other = models.batch("bert", "SEQ_CLS", seed=3)

    def run() -> Tensor:
        value = objective(model(**batch))
        model.eval()
        with torch.no_grad():
            model(**other)
        model.train()
        return value

    actual = gradients(parameters, run)
    with reference_model(model, coupling="meft1"):
        expected = gradients(parameters, run)
    assert_same_gradients(actual, expected, REVERSIBLE)


# --- Adapters by name, and models without adapters ------------------------------------------------------------------


def test_two_adapters() -> None:
    model = engine_model("bert", "FEATURE_EXTRACTION", coupling="meft1", backward="reversible")
    model.add_adapter("other", model.peft_config["default"])
    enlarge_adapters(model)
    batch = models.batch("bert", "FEATURE_EXTRACTION")
    outputs = []
    for name in ("other", "default"):
        model.set_adapter(name)
        assert all(f".{name}." in parameter for parameter in trained(model))
        compare(model, batch, REVERSIBLE, coupling="meft1", adapter=name)
        outputs.append(visible_output(model(**batch)))
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_make_reversible_under_full_fine_tuning(family: str, backward: str) -> None:
    """Every weight of the model is trained, those of embeddings and heads included."""
    task = TASK_OF[family]
    model = models.build(family, task, layers=LAYERS, dropout=0.2, dtype=torch.float64, attn_implementation="sdpa")
    batch = models.batch(family, task)
    every = dict(model.named_parameters())

    def run() -> Tensor:
        return objective(model(**batch))

    with reference_model(model, coupling="momentum", gamma=0.5):
        expected = gradients(every, run)
    meft.make_reversible(model, coupling="momentum", gamma=0.5, arithmetic="float", backward=backward)
    assert all(type(layer) is not type(layer.pretrained) for stack in models.stacks(model).values() for layer in stack)
    actual = gradients(every, run)
    for name, gradient in expected.items():
        # A key's bias shifts all scores of a query alike: its gradient is zero but for rounding.
        if "k_proj.bias" in name or "key.bias" in name:
            assert max(gradient.norm(), actual[name].norm()) < 1e-9
        else:
            assert_close(actual[name], gradient, tolerance(backward), name)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_stack_alone(coupling: str) -> None:
    """`reference_hidden` straight on the wrapped layers, without the model around them: the same hidden state."""
    model = engine_model("opt_350m", "FEATURE_EXTRACTION", coupling=coupling, backward="reversible")
    batch = models.batch("opt_350m", "FEATURE_EXTRACTION", padding=None)
    decoder = model.base_model.model.decoder
    positions = torch.arange(7).expand(3, 7)
    embedded = decoder.project_in(decoder.embed_tokens(batch["input_ids"]))
    embedded = embedded + decoder.embed_positions(batch["attention_mask"], position_ids=positions)
    causal = torch.ones(7, 7, dtype=torch.bool).tril().expand(3, 1, 7, 7)
    hidden = reference_hidden(decoder.layers, embedded, coupling=coupling, layer_kwargs={"attention_mask": causal})
    assert_close(model(**batch).last_hidden_state, decoder.project_out(hidden), CACHED)
