"""The tiny model and data of `--quick`: every study in seconds, to see that it runs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from meft.loading.arguments import ModelArguments
from meft.loading.models import quiet_transformers
from meft.storage.files import publish_folder, staged, write_text
from meft.training.arguments import DataArguments

if TYPE_CHECKING:
    from .base import Parsed, Study

_WORDS = ("good", "fine", "bad", "poor", "the", "a", "film", "book", "was", "is", "very", "not")
_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
_LENGTH = 16
_TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "text_column": ("text",),
    "max_seq_length": _LENGTH,
}


def quick_defaults(study: Study, folder: Path, parsed: Parsed) -> dict[str, Any]:
    """Stands in for what the user left out."""
    if study.kind == "sizes":
        return {}
    place = folder / ".quick"
    defaults: dict[str, Any] = {}
    if not parsed[ModelArguments].model_name_or_path:
        defaults["model_name_or_path"] = str(_model(place))
    if study.kind == "training":
        defaults |= _TRAINING
        data = parsed[DataArguments]
        if not (data.task or data.train_file or data.validation_file):
            defaults |= {f"{split}_file": str(_rows(place, split)) for split in ("train", "validation")}
    return defaults


def _model(place: Path) -> Path:
    """A BERT of two layers with random weights, which knows a dozen words."""
    if (place / "model").is_dir():
        return place / "model"
    config = BertConfig(
        vocab_size=len(_SPECIAL) + len(_WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=_LENGTH,
        pad_token_id=0,
    )
    with staged(place, "model") as staging, torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(staging)
        _tokenizer().save_pretrained(staging)
        publish_folder(staging, place / "model")
    return place / "model"


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(_SPECIAL + _WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=_LENGTH,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )


def _rows(place: Path, split: str) -> Path:
    """Sentences of random words, and whether the first of them is a kind one."""
    generator = random.Random(split)
    lines = ["text\tlabel"]
    for index in range(16 if split == "train" else 8):
        first = _WORDS[index % 4]
        lines.append(f"{first} {' '.join(generator.choices(_WORDS[4:], k=4))}\t{'kind' if index % 4 < 2 else 'harsh'}")
    path = place / f"{split}.tsv"
    place.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")
    return path
