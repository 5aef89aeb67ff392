"""The batch that `meft verify` looks at: random tokens, or text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from meft.errors import ConfigError, DataError
from meft.loading.arguments import ModelArguments
from meft.loading.models import load_tokenizer
from meft.loading.pretrained import padding_token, single_token

_IGNORED = -100


def random_batch(
    model: PreTrainedModel, task_type: str, *, batch_size: int, seq_length: int, seed: int
) -> dict[str, Tensor]:
    """Random tokens with random labels; of the rows, the first is full and the last filled to a half.

    Raises:
        ConfigError: the model does not take that many tokens.
    """
    config = model.config.get_text_config()
    _check_length(model, seq_length)
    generator = torch.Generator().manual_seed(seed)
    pad, end = padding_token(config), single_token(config.eos_token_id)
    special = {token for token in (pad, end, single_token(getattr(config, "bos_token_id", None))) if token is not None}
    words = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    ids = words[torch.randint(len(words), (batch_size, seq_length), generator=generator)]
    mask = torch.ones_like(ids)
    for row in range(batch_size):
        length = seq_length - row * (seq_length // 2) // max(batch_size - 1, 1)
        ids[row, length:], mask[row, length:] = pad, 0
        if end is not None:
            ids[row, length - 1] = end  # where BART's classifier looks for it, in every row once
    return _with_labels(model, task_type, {"input_ids": ids, "attention_mask": mask}, generator)


def text_batch(
    arguments: ModelArguments,
    name: str,
    model: PreTrainedModel,
    task_type: str,
    path: str,
    *,
    batch_size: int,
    seq_length: int,
    seed: int,
) -> dict[str, Tensor]:
    """The first lines of a text file, with random labels where the task is not the text itself.

    Raises:
        DataError: the file cannot be read, or has too few lines.
    """
    _check_length(model, seq_length)
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}. Give a UTF-8 file with a text a line.") from error
    if len(lines) < batch_size:
        raise DataError(
            f"{path} has {len(lines)} lines of text, but --batch_size is {batch_size}. Give at least as many lines, or "
            "a smaller batch."
        )
    tokenizer = load_tokenizer(arguments, name)
    encoded = tokenizer(
        lines[:batch_size],
        padding=True,
        truncation=True,
        max_length=seq_length,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    return _with_labels(model, task_type, dict(encoded), torch.Generator().manual_seed(seed))


def _with_labels(
    model: PreTrainedModel, task_type: str, batch: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    classes = int(model.config.num_labels or 1)
    if task_type == "SEQ_CLS":
        rows = (len(ids),)
        regression = classes == 1
        made = (
            torch.rand(rows, generator=generator) if regression else torch.randint(classes, rows, generator=generator)
        )
        return {**batch, "labels": made}
    if task_type == "TOKEN_CLS":
        made = torch.randint(classes, ids.shape, generator=generator)
        return {**batch, "labels": made.masked_fill(mask == 0, _IGNORED)}
    if task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return {**batch, "labels": ids.masked_fill(mask == 0, _IGNORED)}
    if task_type == "QUESTION_ANS":
        first = torch.zeros(len(ids), dtype=torch.long)
        return {**batch, "start_positions": first, "end_positions": mask.sum(dim=1) - 1}
    return {**batch, "decoder_input_ids": ids} if model.config.is_encoder_decoder else batch


def _check_length(model: PreTrainedModel, seq_length: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa counts its positions from the padding token on.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = module.num_embeddings - module.padding_idx - 1
    if limit is not None and seq_length > limit:
        raise ConfigError(
            f"seq_length is {seq_length}, but {type(model).__name__} takes at most {limit} tokens. Give --seq_length "
            f"{limit} or less."
        )
