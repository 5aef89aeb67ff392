"""Models with the head of any task, as `meft verify` looks at them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel

from meft.errors import CheckpointError, UnsupportedModelError, first_line
from meft.storage.files import check_safetensors

from .arguments import ModelArguments
from .folders import TASK_MODELS
from .models import load_config, quiet_transformers

_ENDINGS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


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
        model.config.pad_token_id = padding_token(model.config)
    return model, task


def padding_token(config: PretrainedConfig) -> int:
    """What a model without a padding token is padded with: the end of the text, or 0."""
    for token in (config.pad_token_id, single_token(config.eos_token_id)):
        if token is not None:
            return token
    return 0


def single_token(token: int | list[int] | None) -> int | None:
    """The first of several tokens that mean the same."""
    return token[0] if isinstance(token, list) else token
