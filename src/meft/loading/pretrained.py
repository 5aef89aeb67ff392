"""Models with the head of any task, as `meft verify` looks at them."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from meft.errors import UnsupportedModelError

from .arguments import ModelArguments
from .models import load_config, load_model
from .tasks import TASK_MODELS, task_type_of


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
    task = task_type or task_type_of(config) or "FEATURE_EXTRACTION"
    if not isinstance(getattr(config.get_text_config(), "vocab_size", None), int):
        raise UnsupportedModelError(
            f"{name} is a {config.model_type} model, which takes no tokens, and meft verify makes batches of tokens. "
            "Call meft.verify(model, batch) from Python with a batch of your own."
        )
    if num_labels is not None:
        config.num_labels = num_labels
    model, _ = load_model(arguments, name, config, TASK_MODELS[task], task)
    if model.config.pad_token_id is None or model.config.pad_token_id < 0:
        model.config.pad_token_id = padding_token(model.config)
    return model, task


def padding_token(config: PretrainedConfig) -> int:
    """What a model without a padding token is padded with: the end of the text, or 0."""
    for token in (config.pad_token_id, single_token(config.eos_token_id)):
        if token is not None and token >= 0:
            return token
    return 0


def single_token(token: int | list[int] | None) -> int | None:
    """The first of several tokens that mean the same."""
    return token[0] if isinstance(token, list) else token
