"""Generation with and without a key-value cache, and what `output_hidden_states` and `output_attentions` show."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache

import meft
from meft.errors import UnsupportedModelError
from support import models
from support.peft_helpers import COUPLINGS, METHODS, adapted, assert_equal, batch_of, gradients, taken

GENERATORS = [
    ("opt", "CAUSAL_LM"),
    ("opt_350m", "CAUSAL_LM"),
    ("bart", "SEQ_2_SEQ_LM"),
    ("bert", "CAUSAL_LM"),
    ("bart", "CAUSAL_LM"),
    ("roberta", "CAUSAL_LM"),
]

STEPS = 8
# Keys and values of earlier tokens come from the same numbers either way, but from products of other shapes.
SAME = {"rtol": 1e-3, "atol": 1e-3}


def prompt(family: str, task: str, padding: str = "left") -> dict[str, Tensor]:
    """Prompts of different lengths, without labels and without an end token."""
    batch = models.batch(family, task, padding=padding, length=6)
    ids = batch["input_ids"]
    return {
        "input_ids": torch.where(ids == models.END, models.FIRST_WORD, ids),
        "attention_mask": batch["attention_mask"],
    }


def generated(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Any:
    return model.generate(
        **batch,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, **options},
    )


@pytest.mark.parametrize("coupling", METHODS)
@pytest.mark.parametrize(("family", "task"), GENERATORS)
def test_cached_and_uncached_agree(family: str, task: str, coupling: str) -> None:
    """Greedy tokens, and the logits of every step; prompts padded on the left."""
    model, batch = adapted(family, coupling, task).eval(), prompt(family, task)
    cached, uncached = (generated(model, batch, use_cache=use_cache) for use_cache in (True, False))
    assert len(cached.logits) == STEPS
    assert torch.equal(cached.sequences, uncached.sequences)
    for one, other in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(one, other, **SAME)
    with model.disable_adapter():
        base = generated(model, batch)
    assert not torch.allclose(base.logits[0], cached.logits[0], **SAME)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(("family", "task"), GENERATORS[:3])
def test_generation_continues_one_forward_pass(family: str, task: str, coupling: str) -> None:
    """The logits of each step are those of one pass over the finished sequence."""
    model, batch = adapted(family, coupling, task).eval(), prompt(family, task)
    found = generated(model, batch, use_cache=True)
    prompts = batch["input_ids"].shape[1]
    with torch.no_grad():
        if task == "CAUSAL_LM":
            mask = torch.cat([batch["attention_mask"], torch.ones(3, STEPS, dtype=torch.long)], dim=1)
            logits = model(input_ids=found.sequences, attention_mask=mask).logits[:, prompts - 1 : -1]
        else:
            logits = model(**batch, decoder_input_ids=found.sequences).logits[:, :-1]
    torch.testing.assert_close(torch.stack(found.logits, dim=1), logits, **SAME)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(("family", "task"), [("bart", "SEQ_2_SEQ_LM"), ("opt", "CAUSAL_LM")])
def test_beams(family: str, task: str, coupling: str) -> None:
    """Beam search reorders the cache between steps."""
    model, batch = adapted(family, coupling, task).eval(), prompt(family, task)
    cached, uncached = (
        generated(model, batch, use_cache=use_cache, num_beams=3, output_scores=True) for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, **SAME)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_sampling_with_the_same_seed(coupling: str) -> None:
    model, batch = adapted("opt", coupling).eval(), prompt("opt", "CAUSAL_LM")
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(generated(model, batch, use_cache=use_cache, do_sample=True).sequences)
    assert torch.equal(*found)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_static_cache(coupling: str) -> None:
    model, batch = adapted("opt", coupling).eval(), prompt("opt", "CAUSAL_LM")
    static = generated(model, batch, cache_implementation="static", disable_compile=True)
    dynamic = generated(model, batch)
    assert torch.equal(static.sequences, dynamic.sequences)
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits), **SAME)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_cache_by_hand(coupling: str) -> None:
    """Token by token through one cache object; each layer fills its own part of it once a step."""
    model, batch = adapted("opt", coupling).eval(), batch_of("opt", padding=None)
    ids, cache, steps = batch["input_ids"], DynamicCache(), []
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        for position in range(ids.shape[1]):
            steps.append(model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True).logits)
            assert cache.get_seq_length() == position + 1
            assert len(cache.layers) == 3
            assert {layer.get_seq_length() for layer in cache.layers} == {position + 1}
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **SAME)


def test_generation_between_forward_and_backward() -> None:
    model, batch = adapted("opt", dropout=0.2), batch_of("opt")
    expected = gradients(model, batch)
    torch.manual_seed(1)
    loss = model(**batch).loss
    generated(model.eval(), prompt("opt", "CAUSAL_LM"))
    loss.backward()
    assert_equal(taken(model), expected)


def test_generation_in_training_mode() -> None:
    """Without gradients nothing forbids a cache: generation in training mode works, as in the base model."""
    model, batch = adapted("opt"), prompt("opt", "CAUSAL_LM")
    trained, evaluated = generated(model.train(), batch), generated(model.eval(), batch)
    assert torch.equal(trained.sequences, evaluated.sequences)


def test_a_filled_cache_in_training_is_refused() -> None:
    model, ids = adapted("opt"), batch_of("opt")["input_ids"]
    with torch.no_grad():
        cache = model.eval()(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(UnsupportedModelError, match=r"layers\.0 of OPTDecoder was called .* holding 7 tokens"):
        model.train()(input_ids=ids[:, :1], attention_mask=torch.ones(3, 8), past_key_values=cache)
    assert cache.get_seq_length() == 7


# --- Recorded outputs -------------------------------------------------------------------------------------------------


def stacks_of(family: str) -> dict[str, str]:
    """The recorded tuples of an output, and the stack each belongs to."""
    if family == "bart":
        return {"encoder_hidden_states": "encoder", "decoder_hidden_states": "decoder"}
    return {"hidden_states": "decoder" if family.startswith("opt") else "encoder"}


def whole(family: str, **options: Any) -> dict[str, Tensor]:
    task = "SEQ_2_SEQ_LM" if family == "bart" else "FEATURE_EXTRACTION"
    batch = batch_of(family, task, **options)
    batch.pop("labels", None)
    if family == "bart":
        batch["decoder_input_ids"] = batch["input_ids"]
    return batch


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("coupling", METHODS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_hidden_states(family: str, coupling: str, mode: str) -> None:
    """As many as the plain model has; the first is the embedding, the last what leaves the model."""
    task = "FEATURE_EXTRACTION"
    base = models.build(family, task, layers=3).train(mode == "train")
    model, batch = adapted(family, coupling, task).train(mode == "train"), whole(family)
    with torch.set_grad_enabled(mode != "no_grad"):
        expected = base(**batch, output_hidden_states=True)
        actual = model(**batch, output_hidden_states=True)
        silent = model(**batch)
    for key in stacks_of(family):
        assert len(actual[key]) == len(expected[key]) == 4
        assert torch.equal(actual[key][0], expected[key][0])
        for one, other in zip(actual[key], expected[key], strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
        tied = torch.equal(expected[key][-1], expected.last_hidden_state)
        if key != "encoder_hidden_states":
            assert torch.equal(actual[key][-1], actual.last_hidden_state) == tied
    assert torch.equal(actual.last_hidden_state, silent.last_hidden_state)


@pytest.mark.parametrize("output", [None, "mean", "newest", ("sum", 0.1)], ids=str)
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("family", ["bert", "bart"])
def test_each_hidden_state_is_what_a_shorter_stack_would_return(family: str, coupling: str, output: Any) -> None:
    """Layer i's entry is the output rule's reading of the streams there: that of a model cut off above layer i."""
    task = "FEATURE_EXTRACTION"
    model, batch = adapted(family, coupling, task, output=output).eval(), whole(family)
    recorded = model(**batch, output_hidden_states=True)
    encoder_key = "encoder_hidden_states" if family == "bart" else "hidden_states"
    for depth in (1, 2):
        cut = models.build(family, task, layers=3)
        encoder = cut.encoder
        layers = encoder.layers if family == "bart" else encoder.layer
        del layers[depth:]
        shorter = meft_like(model, cut, depth)
        found = shorter(**batch)
        state = found.encoder_last_hidden_state if family == "bart" else found.last_hidden_state
        assert torch.equal(recorded[encoder_key][depth], state)


def meft_like(model: PeftModel, base: nn.Module, depth: int) -> PeftModel:
    """The same adapters on a base whose encoder was cut off."""
    config = copy.copy(model.peft_config["default"])
    config.base_layers = None
    cut = PeftModel(base, config)
    state = model.state_dict()
    cut.load_state_dict({name: state[name] for name in cut.state_dict()})
    return cut.eval()


@pytest.mark.parametrize("coupling", METHODS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_attentions(family: str, coupling: str) -> None:
    """One a layer, rows that sum to one."""
    model, batch = adapted(family, coupling, "FEATURE_EXTRACTION").eval(), whole(family, padding=None)
    found = model(**batch, output_attentions=True)
    names = ("encoder_attentions", "decoder_attentions", "cross_attentions") if family == "bart" else ("attentions",)
    for name in names:
        assert len(found[name]) == 3
        for attention in found[name]:
            assert attention.shape == (3, 4, 7, 7)
            torch.testing.assert_close(attention.sum(-1), torch.ones(3, 4, 7))


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_attentions_in_training_change_nothing(coupling: str) -> None:
    model, batch = adapted("bert", coupling, dropout=0.2), batch_of("bert")
    expected = gradients(model, batch)
    recorded = {"output_attentions": True, "output_hidden_states": True}
    assert_equal(gradients(model, {**batch, **recorded}), expected)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_recording_set_up_before_and_after_conversion(family: str, coupling: str) -> None:
    """Transformers puts its recording hooks on layers the first time they are asked for, which may be either."""
    task, batch = "FEATURE_EXTRACTION", whole(family)
    base = models.build(family, task, layers=3).eval()
    base(**batch, output_hidden_states=True)
    before = meft.make_reversible(base, coupling)
    after = meft.make_reversible(models.build(family, task, layers=3).eval(), coupling)
    for key in stacks_of(family):
        one, other = (model(**batch, output_hidden_states=True)[key] for model in (before, after))
        assert len(one) == len(other) == 4
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_loss_on_the_last_hidden_state_recorded() -> None:
    """The recorded last state is the output itself, so its gradient is the output's."""
    model, batch = adapted("bert", "meft1", "FEATURE_EXTRACTION"), batch_of("bert", "FEATURE_EXTRACTION")
    found = []
    for read in (lambda out: out.last_hidden_state, lambda out: out.hidden_states[-1]):
        torch.manual_seed(1)
        read(model(**batch, output_hidden_states=True)).square().sum().backward()
        found.append(taken(model))
    assert_equal(*found)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_loss_on_every_hidden_state(depth: int, coupling: str) -> None:
    """A loss on inner states and the output at once is differentiable like stored activations."""
    found = []
    for backward in ("reversible", "cached"):
        model = adapted("bert", coupling, "FEATURE_EXTRACTION", backward=backward)
        states = model(**batch_of("bert", "FEATURE_EXTRACTION"), output_hidden_states=True).hidden_states
        (states[depth].square().sum() + states[-1].sum()).backward()
        found.append(torch.cat([p.grad.flatten() for _, p in model.named_parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
