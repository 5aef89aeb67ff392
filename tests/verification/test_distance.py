"""How far a coupled model starts from the plain one."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import meft
from meft.errors import MaterializedLogitsWarning
from meft.verification.distance import distance_from_plain
from support.peft_helpers import llama

IDS = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}


def test_loss_and_predictions_beside_those_of_the_plain_model() -> None:
    model = llama(initializer_range=0.2).eval()
    with torch.no_grad():
        plain = model(**BATCH)
        coupled = meft.make_reversible(model, gamma=1 / 2)(**BATCH)
    found = distance_from_plain(model, **BATCH)
    assert found is not None and found.loss == pytest.approx(coupled.loss.item(), rel=1e-6)
    assert found.plain_loss == pytest.approx(plain.loss.item(), rel=1e-6)
    logs = [nn.functional.log_softmax(output.logits, -1).flatten(0, 1) for output in (coupled, plain)]
    expected = nn.functional.kl_div(*logs, reduction="batchmean", log_target=True).item()
    assert found.kl == pytest.approx(expected, rel=1e-5) and expected > 1e-3


def test_looking_at_the_distance_does_not_warn_of_logits_that_it_needs() -> None:
    model = meft.make_reversible(llama())
    with warnings.catch_warnings():
        warnings.simplefilter("error", MaterializedLogitsWarning)
        distance_from_plain(model, **BATCH)
    # Whoever asks for logits later is still told.
    with pytest.warns(MaterializedLogitsWarning):
        model(**BATCH).logits.exp().cumsum(-1)
