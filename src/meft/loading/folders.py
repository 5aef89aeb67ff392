"""Folders that models and adapters are loaded from: plain models, adapters, and adapters with their base inside."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import transformers
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from meft.errors import CheckpointError, ConfigError, MeftError, first_line
from meft.storage.files import check_safetensors

TASK_MODELS: dict[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": AutoModel,
}
BASE_FOLDER = "base"
"""Where a self-contained folder holds the model that its adapter was trained on."""

# The last linear layer of the heads for classes: of most models, of RoBERTa and BART, of decoders.
_HEADS = ("classifier.weight", "out_proj.weight", "score.weight")


def load(folder: str | Path, *, is_trainable: bool = False, **options: Any) -> nn.Module:
    """Loads what `meft export` wrote, or any model or PEFT adapter, from a folder that may have been moved.

    Example:
        >>> model = meft.load("exported")
        >>> tokenizer = AutoTokenizer.from_pretrained("exported")

    Args:
        folder: a plain model; an adapter with its base model inside, in `base`; or an adapter that names its base.
        is_trainable: whether the adapter's parameters require gradients.
        **options: of Transformers' `from_pretrained`, such as `dtype` and `device_map`.

    Returns:
        The Transformers model, or the `PeftModel` around it; in evaluation.

    Raises:
        CheckpointError: the folder, its base model or a file is missing or damaged.
    """
    place = Path(folder)
    if not is_adapter(place):
        return load_model(place, None, **options)
    base = load_base(place, None, **options)
    return load_adapter(base, place, is_trainable=is_trainable)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return Path(folder, CONFIG_NAME).is_file()


def adapter_config(folder: Path) -> PeftConfig:
    """What an adapter says about itself.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return PeftConfig.from_pretrained(str(folder))
    except MeftError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} cannot be read: {first_line(error)} Copy the adapter again."
        ) from error


def load_base(adapter: Path, base: str | None, **options: Any) -> PreTrainedModel:
    """Loads the model that an adapter was trained on, with the head of its task.

    Args:
        adapter: the adapter's folder.
        base: where its base model is; None for inside the folder, or else where the adapter says.
        **options: of `from_pretrained`.

    Raises:
        CheckpointError: it is not there, or damaged.
        ConfigError: neither the adapter nor the caller names one.
    """
    config = adapter_config(adapter)
    inside = adapter / BASE_FOLDER
    if base is None and inside.is_dir():
        return load_model(inside, None, **options)
    name = base or config.base_model_name_or_path
    if not name:
        raise ConfigError(
            f"The adapter in {adapter} does not say which model it was trained on. Give its folder or name with "
            "base_model_name_or_path."
        )
    labels = trained_labels(adapter)
    if labels is not None:
        # A head of another size in the base model is none that the adapter uses: it brings its own.
        options |= {"num_labels": labels, "ignore_mismatched_sizes": True}
    try:
        return load_model(name, _class_for(config), **options)
    except CheckpointError as error:
        raise CheckpointError(
            f"The base model of the adapter in {adapter} is missing or damaged. {error} If it is somewhere else, give "
            "that place with base_model_name_or_path."
        ) from error


def load_model(name: str | Path, model_class: Any, **options: Any) -> PreTrainedModel:
    """Loads a Transformers model.

    Args:
        name: its folder or its name on the hub.
        model_class: one with `from_pretrained`; None for the class that the folder was saved from.
        **options: of `from_pretrained`.

    Raises:
        CheckpointError: a file is missing or damaged, or it is no model that Transformers can load.
    """
    folder = Path(name)
    # Names on the hub have one slash at most and begin with a letter or a digit.
    if not folder.is_dir() and (len(folder.parts) > 2 or str(name).startswith((".", "~", "/"))):
        state = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{name}, where a model should be, {state}. Give its folder or its name on the hub.")
    if folder.is_dir():
        for path in sorted(folder.glob("*.safetensors")):
            check_safetensors(path)
    try:
        if model_class is None:
            saved = (AutoConfig.from_pretrained(name).architectures or ["AutoModel"])[0]
            model_class = getattr(transformers, saved, AutoModel)
        return model_class.from_pretrained(name, **{"dtype": "auto", **options})
    except MeftError:
        raise
    except (OSError, SafetensorError, json.JSONDecodeError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{name} could not be loaded as a model: {first_line(error)} Give a model's folder or its name on the hub."
        ) from error


def load_adapter(base: PreTrainedModel, adapter: Path, *, is_trainable: bool = False) -> PeftModel:
    """Puts a saved adapter on its base model.

    Raises:
        CheckpointError: the adapter is damaged, or belongs to another model.
    """
    for path in sorted(adapter.glob("*.safetensors")):
        check_safetensors(path)
    try:
        return PeftModel.from_pretrained(base, str(adapter), is_trainable=is_trainable)
    except MeftError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"The adapter in {adapter} does not fit the base model {base.name_or_path}: {first_line(error)} Give the "
            "model that it was trained on with base_model_name_or_path."
        ) from error


def trained_labels(adapter: Path) -> int | None:
    """The number of outputs of the task head that lies in an adapter's weights, or None if there is none."""
    path = adapter / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return None
    check_safetensors(path)
    with safe_open(path, framework="pt") as weights:
        heads = [name for name in weights.keys() if name.endswith(_HEADS)]  # noqa: SIM118, it is no mapping
        return min((weights.get_slice(name).get_shape()[0] for name in heads), default=None)


def _class_for(config: PeftConfig) -> Any:
    """The class of the base model: that of the adapter's task, or the one that PEFT noted where there is no task."""
    task = str(config.task_type or "").removeprefix("TaskType.")
    noted = config.auto_mapping or {}
    if not task and noted.get("parent_library", "").partition(".")[0] == "transformers":
        return getattr(importlib.import_module(noted["parent_library"]), noted["base_model_class"])
    return TASK_MODELS.get(task)
