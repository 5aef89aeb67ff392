"""Generation as servers do it, on prompts of different lengths at once: what each prompt gives by itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import meft
from support import models
from support.peft_helpers import COUPLINGS, enlarge, llama

WAYS = (*COUPLINGS, "lora on momentum", "lora on blocks", "lora on random signs")
NEW = 6
LENGTHS = (7, 4, 2)


def t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0}
    tokens = {"pad_token_id": models.PAD, "eos_token_id": models.END, "decoder_start_token_id": models.PAD}
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(vocab_size=models.VOCABULARY, initializer_factor=4.0, **sizes, **tokens))


def gpt2() -> GPT2LMHeadModel:
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24, "initializer_range": 0.2}
    tokens = {"pad_token_id": models.PAD, "eos_token_id": models.END, "bos_token_id": models.END}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=models.VOCABULARY, **sizes, **tokens))


def enlarged(model: nn.Module) -> nn.Module:
    """Makes answers depend on prompts more than they do with weights as they are initialised."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


BASES: dict[str, Any] = {
    "llama": lambda: llama(pad_token_id=models.PAD, eos_token_id=models.END, initializer_range=0.2),
    "gpt2": gpt2,
    # Of most random weights, every prompt gets the same answer.
    "bart": lambda: enlarged(models.build("bart", "SEQ_2_SEQ_LM", layers=3, seed=6)),
    "t5": t5,
}
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "bart": ["q_proj", "fc2"], "t5": ["q", "wo"]}


@cache
def served(family: str, way: str) -> nn.Module:
    """A model in evaluation, with adapters that matter."""
    base, task = BASES[family](), "CAUSAL_LM" if family in ("llama", "gpt2") else "SEQ_2_SEQ_LM"
    torch.manual_seed(3)
    if way in COUPLINGS:
        model = get_peft_model(base, meft.MeftConfig(task_type=task, coupling=way, bottleneck_dim=4))
        enlarge(model)
    else:
        lora = LoraConfig(
            task_type=task,
            target_modules=TARGETS[family],
            init_lora_weights=False,
            fan_in_fan_out=family == "gpt2",
        )
        options = {"lora on blocks": {"granularity": "block"}, "lora on random signs": {"sign": "random"}}
        model = meft.make_reversible(get_peft_model(base, lora), **options.get(way, {}))
    return model.eval()


def prompts(*, left: bool) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Prompts of different lengths, padded to one batch, and each by itself."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(models.FIRST_WORD, models.VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    ids = torch.full((len(rows), max(LENGTHS)), models.PAD)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(max(LENGTHS) - len(row), None) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    alone = [{"input_ids": row[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)} for row in rows]
    return {"input_ids": ids, "attention_mask": mask}, alone


def generated(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """The new tokens only."""
    found = model.generate(**batch, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)
    return found[:, -NEW:]


CACHES = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
}


def slower(family: str, way: str, kind: str) -> Any:
    """With every change: two families, two ways, the caches that servers use."""
    tried = family in ("llama", "bart") and way in ("meft1", "lora on momentum") and kind in ("static", "beams")
    return pytest.param(family, way, kind, marks=() if tried else pytest.mark.slow)


@pytest.mark.parametrize(
    ("family", "way", "kind"), [slower(family, way, kind) for family in BASES for way in WAYS for kind in CACHES]
)
def test_a_batch_gives_what_each_prompt_gives(family: str, way: str, kind: str) -> None:
    """Decoders are padded on the left; alone, prompts run with a dynamic cache."""
    model = served(family, way)
    batch, alone = prompts(left=family in ("llama", "gpt2"))
    together = generated(model, batch, **CACHES[kind])
    beams = {"num_beams": 3} if kind == "beams" else {}
    assert torch.equal(together, torch.cat([generated(model, one, **beams) for one in alone]))
    assert len({tuple(row) for row in together.tolist()}) > 1


@pytest.mark.parametrize("family", BASES)
def test_each_way_says_something_else(family: str) -> None:
    """So that what the other tests compare is the adapter's and the coupling's."""
    _, (longest, *_) = prompts(left=True)
    with torch.no_grad():
        if family in ("bart", "t5"):
            longest = {**longest, "decoder_input_ids": longest["input_ids"]}
        logits = [served(family, way)(**longest).logits for way in WAYS]
    assert all(not torch.allclose(one, other) for i, one in enumerate(logits) for other in logits[:i])


@pytest.mark.parametrize("family", BASES)
def test_restored_it_generates_as_the_plain_model(family: str) -> None:
    model, batch = served(family, "lora on random signs"), prompts(left=True)[0]
    found = generated(model, batch)
    try:
        assert torch.equal(generated(meft.restore(model), batch), found)
    finally:
        meft.make_reversible(model, sign="random")
