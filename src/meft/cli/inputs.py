"""The model and the batch that `meft verify` looks at: loaded for any task, filled with random tokens or with text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
)

from meft.errors import CheckpointError, ConfigError, DataError, UnsupportedModelError, first_line
from meft.loading.arguments import ModelArguments
from meft.loading.folders import TASK_MODELS
from meft.loading.models import load_config, load_tokenizer, quiet_transformers
from meft.storage.files import check_safetensors

_ENDINGS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_IGNORED = -100


def task_type_of(config: PretrainedConfig) -> str:
    """What a checkpoint was saved for, by the name of its class; FEATURE_EXTRACTION where that says nothing."""
    for architecture in config.architectures or ():
        for ending, task_type in _ENDINGS.items():
            if architecture.endswith(ending):
                return task_type
    return "FEATURE_EXTRACTION"


def load_pretrained(
    arguments: ModelArguments, name: str, task_type: str | None, *, num_labels: int | None = None
) -> tuple[PreTrainedModel, str]:
    """Loads a model with the head of a task; a head that the checkpoint lacks starts at random.

    Args:
        arguments: what the user said about the model.
        name: its folder or its name on the hub.
        task_type: a key of `TASK_MODELS`; None for what the checkpoint was saved for.
        num_labels: outputs of the head; None for as many as the checkpoint says.

    Returns:
        The model and its task type.

    Raises:
        CheckpointError: a file is missing, truncated or damaged.
        UnsupportedModelError: there is no such model, or it takes no tokens.
    """
    config = load_config(arguments, name)
    task = task_type or task_type_of(config)
    if not isinstance(getattr(config.get_text_config(), "vocab_size", None), int):
        raise UnsupportedModelError(
            f"{name} is a {config.model_type} model, which takes no tokens, and meft verify makes batches of tokens. "
            "Call meft.verify(model, batch) from Python with a batch of your own."
        )
    if num_labels is not None:
        config.num_labels = num_labels
    options: dict[str, Any] = {"dtype": arguments.dtype, "ignore_mismatched_sizes": arguments.ignore_mismatched_sizes}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    options |= {"cache_dir": arguments.cache_dir, "revision": arguments.revision}
    options["trust_remote_code"] = arguments.trust_remote_code
    if Path(name).is_dir():
        for path in sorted(Path(name).glob("*.safetensors")):
            check_safetensors(path)
    try:
        with quiet_transformers():
            model = TASK_MODELS[task].from_pretrained(name, config=config, **options)
    except (OSError, SafetensorError, json.JSONDecodeError, RuntimeError) as error:
        raise CheckpointError(f"{name} could not be loaded: {first_line(error)} Copy or download it again.") from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{name} is no model for {task} that Transformers {transformers.__version__} can load: "
            f"{first_line(error)} Choose another with --task_type: {', '.join(TASK_MODELS)}."
        ) from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = _pad(model.config)
    return model, task


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
    pad, end = _pad(config), _single(config.eos_token_id)
    special = {token for token in (pad, end, _single(getattr(config, "bos_token_id", None))) if token is not None}
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


def _pad(config: PretrainedConfig) -> int:
    for token in (config.pad_token_id, _single(config.eos_token_id)):
        if token is not None:
            return token
    return 0


def _single(token: int | list[int] | None) -> int | None:
    return token[0] if isinstance(token, list) else token
