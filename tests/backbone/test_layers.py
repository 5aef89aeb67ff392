"""What the wrappers add to the engine: the model's loop, its cache, recordings, replicas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meft
from meft.backbone.layers import ReversibleLayer
from meft.errors import UnsupportedModelError
from support import models
from support.peft_helpers import COUPLINGS, assert_close, taken


def reversible(family: str = "bert", task: str = "SEQ_CLS", **options: object) -> nn.Module:
    return meft.make_reversible(models.build(family, task, layers=3).train(), **options)


def gradients_of(model: nn.Module, loss: Callable[[Any], Tensor], **inputs: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    loss(model(**inputs)).backward()
    return taken(model)


ATTENTIONS = "attentions"
INNER, BOTH = "one hidden state below the top", "all hidden states and the output"
LOSSES: dict[str, Callable[[Any], Tensor]] = {
    ATTENTIONS: lambda output: output.loss + sum(a.square().mean() for a in output.attentions),
    INNER: lambda output: output.hidden_states[-2].square().mean(),
    BOTH: lambda output: output.loss + sum(state.square().mean() for state in output.hidden_states),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_loss_on_what_was_recorded_reaches_everything(coupling: str, kind: str) -> None:
    inputs = models.batch("bert", "SEQ_CLS") | {"output_hidden_states": True, "output_attentions": True}
    found = [
        gradients_of(reversible(coupling=coupling, backward=backward), LOSSES[kind], **inputs)
        for backward in ("reversible", "cached")
    ]
    assert_close(*found, relative=1e-6)


def test_a_loss_on_an_inner_hidden_state_leaves_the_layers_above_alone() -> None:
    model = reversible(coupling="meft1")
    found = gradients_of(model, LOSSES[INNER], **models.batch("bert", "SEQ_CLS"), output_hidden_states=True)
    assert any("layer.1." in name for name in found) and not any("layer.2." in name for name in found)


def test_replicas_of_data_parallel_are_refused() -> None:
    model = reversible()
    replica = copy.copy(next(module for module in model.modules() if isinstance(module, ReversibleLayer)))
    replica._is_replica = True
    with pytest.raises(UnsupportedModelError, match=r"torch\.nn\.DataParallel.*accelerate launch"):
        replica(torch.zeros(1, 2, 32))


def test_the_cache_is_switched_off_in_training_and_refused_when_it_holds_something() -> None:
    model, batch = reversible("opt", "CAUSAL_LM"), models.batch("opt", "CAUSAL_LM")
    output = model(**batch, use_cache=True)
    assert output.past_key_values.get_seq_length() == 0
    with torch.no_grad():
        filled = model.eval()(batch["input_ids"], use_cache=True).past_key_values
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"past_key_values holding \d+ tokens"):
        model(input_ids=batch["input_ids"], past_key_values=filled)


def test_a_failed_forward_pass_leaves_nothing_running() -> None:
    model, batch = reversible(), models.batch("bert", "SEQ_CLS")
    layers = [module for module in model.modules() if isinstance(module, ReversibleLayer)]

    def fail(module: nn.Module, args: tuple) -> None:
        raise KeyError("on purpose")

    handle = layers[1].attention.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="on purpose"):
        model(**batch)
    handle.remove()
    assert not layers[0]._placement.reversible_stack._running
    model(**batch).loss.backward()


def test_layers_called_out_of_order_are_refused() -> None:
    model = reversible()
    layers = [module for module in model.modules() if isinstance(module, ReversibleLayer)]
    with pytest.raises(UnsupportedModelError, match=r"called bert\.encoder\.layer\.1 after no layer"):
        layers[1](torch.zeros(1, 2, 32))
    hidden = layers[0](torch.zeros(1, 2, 32))
    with pytest.raises(UnsupportedModelError, match=r"layer\.2 after bert\.encoder\.layer\.0"):
        layers[2](hidden)


def test_a_hidden_state_from_elsewhere_is_refused() -> None:
    model = reversible()
    layers = [module for module in model.modules() if isinstance(module, ReversibleLayer)]
    hidden = layers[0](torch.zeros(1, 2, 32))
    for other in (hidden.detach() + 1, torch.zeros_like(hidden).requires_grad_()):
        with pytest.raises(
            UnsupportedModelError, match=r"layer\.1 with a tensor that does not come from what .*layer\.0"
        ):
            layers[1](other)
        hidden = layers[0](torch.zeros(1, 2, 32))


def test_an_integer_hidden_state_is_refused() -> None:
    model = reversible()
    layer = next(module for module in model.modules() if isinstance(module, ReversibleLayer))
    with pytest.raises(UnsupportedModelError, match=r"dtype torch\.int64.*need float16, bfloat16, float32 or float64"):
        layer(torch.zeros(1, 2, 32, dtype=torch.long))
