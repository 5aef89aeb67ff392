"""The code of docs/trainers.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from meft.backbone.report import reversible_stacks
from support.launching import EXAMPLES

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]


def test_the_code_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", minversion="1.16")
    monkeypatch.syspath_prepend(EXAMPLES)
    from offline import causal_lm, questions

    model, tokenizer = causal_lm(None)
    texts = questions(None)
    rows = [{name: tokenizer("where is the cat ?")["input_ids"] for name in ("input_ids", "labels")}] * 8
    names: dict[str, Any] = {"model": model, "base": causal_lm(None)[0], "tokenizer": tokenizer}
    names |= {"rows": rows, "texts": texts, "folder": str(tmp_path)}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
        assert not reversible_stacks(names["trainer"].model)
    assert type(names["merged"]).__name__ == "LlamaForCausalLM"
    assert (tmp_path / "adapter_model.safetensors").exists()
