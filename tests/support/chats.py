"""A tiny language model with a chat template, and rows of every form that language models are trained on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from support.tiny import WORDS

SPECIAL = ["<|end|>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
CONTEXT = 64


def make_chat_model(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """Saves a random Llama of two layers, 16 wide, and a tokenizer that splits at whitespace."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": "<|end|>", "pad_token": "<|end|>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=CONTEXT, **names)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def chat(generator: random.Random, turns: int = 1) -> list[dict[str, str]]:
    """Somebody asks for an animal, and is told its colour; the same animal always has the same."""
    colours = {"cat": "red", "dog": "green", "bird": "blue"}
    messages = []
    for _ in range(turns):
        animal = generator.choice(sorted(colours))
        messages.append({"role": "user", "content": f"the {animal} {generator.choice(['sat', 'ran', 'flew'])}"})
        messages.append({"role": "assistant", "content": f"a {colours[animal]} {animal}"})
    return messages


def chats(count: int = 20, turns: int = 2) -> list[dict[str, Any]]:
    generator = random.Random(0)
    return [{"messages": chat(generator, 1 + index % turns)} for index in range(count)]


def completions(count: int = 20) -> list[dict[str, Any]]:
    return [{"prompt": row["messages"][0]["content"], "completion": " " + row["messages"][1]["content"]}
            for row in chats(count)]  # fmt: skip


def preferences(count: int = 20) -> list[dict[str, Any]]:
    rows = [row["messages"][:2] for row in chats(count)]
    return [
        {
            "prompt": asked["content"],
            "chosen": " " + told["content"],
            "rejected": " never " + told["content"].split()[-1],
        }
        for asked, told in rows
    ]


def texts(count: int = 20) -> list[dict[str, Any]]:
    return [{"text": f"{row['prompt']}{row['completion']}"} for row in completions(count)]


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
