"""The guide to models that are not of Transformers runs as it stands, and what it trains has the right gradients."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import meft
from meft.errors import ConfigError
from support.peft_helpers import assert_close, taken

GUIDE = Path(__file__).parents[2] / "docs" / "your-own-model.md"


@pytest.fixture(scope="module")
def guide() -> dict[str, Any]:
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "guide"}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    return names


@pytest.mark.parametrize(("model", "batch"), [("encoder", "signal"), ("vit", "images")])
def test_gradients_of_the_guides_models_are_those_of_cached_layers(
    guide: dict[str, Any], model: str, batch: str
) -> None:
    plain = meft.restore(copy.deepcopy(guide[model])).double().eval().train()
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    found = []
    for backward in ("reversible", "cached"):
        converted = meft.make_reversible(copy.deepcopy(plain), backward=backward)
        converted.zero_grad()
        converted(guide[batch].double()).square().mean().backward()
        found.append(taken(converted))
    assert_close(*found, relative=1e-10)


def test_the_first_model_is_its_own_again(guide: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is not reversible"):
        meft.report(guide["gpt"])
    assert {type(block).__name__ for block in guide["gpt"].blocks} == {"Block"}
