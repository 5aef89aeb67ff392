"""A tiny random model, its tokenizer and a few texts, so that the examples run without a network.

With `--model` and `--dataset` the examples take real ones, from the hub or a folder, and nothing of this is used.
"""

from __future__ import annotations

import random

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

ANIMALS, PLACES = ["cat", "dog", "bird", "fox", "owl"], ["tree", "house", "river", "hill", "barn"]
WORDS = ["the", "is", "in", "where", "?", "it", "hides", "nobody", "knows", "near", *ANIMALS, *PLACES]


def causal_lm(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of that name; without one, four random layers 64 wide."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto"), AutoTokenizer.from_pretrained(name)
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Splits at whitespace and knows the words of the texts below."""
    vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def questions(name: str | None, *, preferences: bool = False, rows: int = 64) -> Dataset:
    """Rows of `prompt` and `completion`, or with `preferences` of `prompt`, `chosen` and `rejected`."""
    if name is not None:
        return load_dataset(name, split="train")
    draw = random.Random(0)
    found = []
    for _ in range(rows):
        animal, place = draw.choice(ANIMALS), draw.choice(PLACES)
        prompt, good = f"where is the {animal} ?", f" the {animal} hides in the {place}"
        found.append(
            {"prompt": prompt, "chosen": good, "rejected": " nobody knows"}
            if preferences
            else {"prompt": prompt, "completion": good}
        )
    return Dataset.from_list(found)
