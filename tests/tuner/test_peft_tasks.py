"""Every task head of PEFT on every family and coupling: what is trained, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
)
from torch import nn

import meft
from support import models
from support.peft_helpers import (
    COUPLINGS,
    METHODS,
    adapted,
    assert_close,
    batch_of,
    gradients,
    loss_of,
    outputs,
    unread,
)

PEFT_CLASS = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "CAUSAL_LM": PeftModelForCausalLM,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}

HEADS = {
    "SEQ_CLS": ("classifier", "score", "classification_head"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def expected_to_train(model: nn.Module, task: str) -> set[str]:
    """The adapters' own names and the copies that PEFT made of the head; nothing else."""
    heads = [name for name in HEADS.get(task, ()) if hasattr(model.base_model.model, name)]
    return {
        name
        for name, _ in model.named_parameters()
        if ".meft_" in name or any(f".{head}.modules_to_save.default." in name for head in heads)
    }


@pytest.mark.parametrize("coupling", METHODS)
@pytest.mark.parametrize(("family", "task"), models.FAMILY_TASKS)
def test_a_step_trains_exactly_the_adapters_and_the_head(family: str, task: str, coupling: str) -> None:
    model = adapted(family, coupling, task, dropout=0.1)
    assert type(model) is PEFT_CLASS[task]
    expected = expected_to_train(model, task)
    assert any("meft_" in name for name in expected)
    expected -= unread(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected
    found = gradients(model, batch_of(family, task))
    assert found.keys() == expected
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
        # A bias added to the scores of all positions does not change their softmax, and OPT's ReLU may be zero on all
        # the tokens that a classifier reads.
        inactive = family.startswith("opt") and task == "SEQ_CLS" and "_up.default.bias" not in name
        assert gradient.count_nonzero() > 0 or "qa_outputs" in name or inactive, name


def test_a_head_that_peft_does_not_know(tmp_path: Path) -> None:
    """PEFT trains heads called `classifier` or `score`; that of BART has to be named."""
    base, batch = models.build("bart", "SEQ_CLS"), batch_of("bart", "SEQ_CLS")
    model = get_peft_model(base, meft.MeftConfig(task_type="SEQ_CLS", modules_to_save=["classification_head"]))
    found = gradients(model, batch)
    heads = {name.split("default.")[-1] for name in found if ".classification_head.modules_to_save." in name}
    assert heads == {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"}
    with torch.no_grad():
        base.classification_head.modules_to_save["default"].dense.weight.add_(1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.build("bart", "SEQ_CLS"), tmp_path)
    assert torch.equal(outputs(loaded.eval(), batch), outputs(model.eval(), batch))


@pytest.mark.parametrize("coupling", METHODS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_fresh_adapters_are_nearly_silent(family: str, coupling: str) -> None:
    """Drawn from N(0, 0.02^2), biases zero: beside the pretrained layer they are a perturbation.

    In pre-norm layers, whose hidden states have no norm of their own, the up-projections begin at zero.
    """
    model = get_peft_model(models.build(family, "FEATURE_EXTRACTION"), meft.MeftConfig(coupling=coupling))
    silent = family == "opt"
    for name, parameter in model.named_parameters():
        if ".meft_" in name and name.endswith("up.default.weight") and silent:
            assert parameter.count_nonzero() == 0, name
        elif ".meft_" in name and name.endswith("weight"):
            assert 0.01 < parameter.std() < 0.04 and parameter.mean().abs() < 0.01, name
        elif ".meft_" in name:
            assert parameter.count_nonzero() == 0, name


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_rebuilt_gradients_are_those_of_stored_activations(family: str, coupling: str) -> None:
    """Exact arithmetic in float32 with dropout: the same loss to the last bit, gradients up to summation order."""
    batch = batch_of(family)
    rebuilt, stored = (
        adapted(family, coupling, dropout=0.1, backward=backward) for backward in ("reversible", "cached")
    )
    torch.manual_seed(1)
    first = loss_of(rebuilt(**batch))
    torch.manual_seed(1)
    assert torch.equal(first, loss_of(stored(**batch)))
    assert_close(gradients(rebuilt, batch), gradients(stored, batch), 1e-5)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_rebuilt_gradients_are_those_of_stored_activations_in_bfloat16(family: str, coupling: str) -> None:
    batch = batch_of(family)
    rebuilt, stored = (
        adapted(family, coupling, dropout=0.1, backward=backward, dtype=torch.bfloat16)
        for backward in ("reversible", "cached")
    )
    assert_close(gradients(rebuilt, batch), gradients(stored, batch), 2e-2)


@pytest.mark.parametrize("backward", ["reversible", "cached"])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_float_arithmetic(coupling: str, backward: str) -> None:
    """Two layers of BERT in float32: what is lost in rebuilding them stays below the tolerance's warning."""
    model = adapted("bert", coupling, layers=2, arithmetic="float", backward=backward)
    assert_close(
        gradients(model, batch_of("bert")),
        gradients(adapted("bert", coupling, layers=2, backward="cached", fraction_bits=20), batch_of("bert")),
        1e-2,
    )


@pytest.mark.parametrize("coupling", METHODS)
def test_learning_lowers_the_loss(coupling: str) -> None:
    model, batch = adapted("bert", coupling), batch_of("bert")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
