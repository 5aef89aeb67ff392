"""What is refused of spread weights without processes to spread them over; `distributed` has the rest."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from torch import nn

import meft
from support import models
from support.peft_helpers import adapted, batch_of


def partitioned(model: nn.Module) -> nn.Module:
    """What a model looks like under DeepSpeed ZeRO-3, as far as it is looked at."""
    for parameter in model.parameters():
        parameter.ds_status = "NOT_AVAILABLE"
    return model


MESSAGE = (
    r"The weights of BertForSequenceClassification are spread over processes by DeepSpeed ZeRO-3 already, and layers "
    r"can be exchanged only before that\. Call make_reversible or get_peft_model first, then fully_shard\. To take the "
    r"layers back after training, save the full state dict and load it into a model that is not sharded\."
)


def test_a_partitioned_model_is_not_converted() -> None:
    model = partitioned(models.build("bert"))
    with pytest.raises(meft.errors.ConfigError, match=MESSAGE):
        meft.make_reversible(model)
    with pytest.raises(meft.errors.ConfigError, match=MESSAGE):
        get_peft_model(model, meft.MeftConfig(task_type="SEQ_CLS"))


def test_a_partitioned_model_is_not_given_back() -> None:
    with pytest.raises(meft.errors.ConfigError, match=MESSAGE):
        meft.restore(partitioned(meft.make_reversible(models.build("bert"))))


@pytest.mark.parametrize("training", [True, False])
def test_a_converted_model_does_not_run_under_zero_3(training: bool) -> None:
    model = partitioned(adapted("bert")).train(training)
    message = (
        r"The weights of bert\.encoder\.layer\.0 of BertModel are partitioned by DeepSpeed ZeRO-3, .* Use ZeRO stage 2 "
        r"\(gradients and optimizer state are sharded\), or FSDP2, which shards the weights as well\."
    )
    with pytest.raises(meft.errors.UnsupportedModelError, match=message):
        model(**batch_of("bert"))


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_wrappers_are_the_units_that_auto_wrapping_looks_for(family: str) -> None:
    """Of devices, and of FSDP in accelerate; given back as they were."""
    model = models.build(family, "SEQ_CLS")
    before = {name: set(m._no_split_modules) for name, m in model.named_modules() if hasattr(m, "_no_split_modules")}
    layers = {type(layer).__name__ for stack in models.stacks(model).values() for layer in stack}
    assert layers <= set(model._no_split_modules)

    def now() -> dict[str, set[str]]:
        return {name: set(model.get_submodule(name)._no_split_modules) for name in before}

    meft.make_reversible(model)
    assert now() == {
        n: names - layers | ({"ReversibleLayer"} if names & layers else set()) for n, names in before.items()
    }
    meft.restore(model)
    assert now() == before
    adapter = get_peft_model(model, meft.MeftConfig(task_type="SEQ_CLS"))
    adapter.add_adapter("other", meft.MeftConfig(task_type="SEQ_CLS", coupling="momentum"))
    assert set(adapter._no_split_modules) == set(before[""]) - layers | {"MeftLayer"}
    adapter.unload()
    assert now() == before
