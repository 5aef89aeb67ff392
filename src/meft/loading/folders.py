"""Folders that models and adapters are loaded from: plain models, adapters, and adapters with their base inside."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from meft.errors import CheckpointError, ConfigError, MeftError, first_line
from meft.storage.claims import check_model_folder, read_object, require
from meft.storage.files import check_safetensors, check_weights

from .models import loading, read_model
from .tasks import TASK_MODELS

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
        return _whole(place, None, options)
    base = load_base(place, None, **options)
    return load_adapter(base, place, is_trainable=is_trainable)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return Path(folder, CONFIG_NAME).is_file()


def adapter_config(folder: Path, *task_types: str | None) -> PeftConfig:
    """What an adapter says about itself.

    Args:
        folder: the adapter's.
        *task_types: those that it may have been trained for; none for any.

    Raises:
        CheckpointError: it cannot be read, or was trained for another type of task.
    """
    path = folder / CONFIG_NAME
    try:
        kind = read_object(path, {"peft_type": str})["peft_type"]
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read: {error} Copy the adapter again.") from error
    check_model_folder(folder)
    chosen = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if chosen is None:
        known = ", ".join(sorted(PeftType(name).value for name in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise CheckpointError(f"{path} is of peft_type {kind!r}, which is none of {known}. Copy the adapter again.")
    try:
        config = chosen.from_pretrained(str(folder))
    except CheckpointError:
        raise
    except Exception as error:  # PEFT's configurations do not check the types of what they are given
        raise CheckpointError(f"{path} cannot be read: {first_line(error)} Copy the adapter again.") from error
    for name in ("base_model_name_or_path", "task_type", "revision"):
        require(path, name, getattr(config, name, None), (str, type(None)))
    require(path, "auto_mapping", config.auto_mapping, (dict, type(None)))
    if task_types and config.task_type not in task_types:
        raise CheckpointError(
            f"The adapter in {folder} was trained for {config.task_type}; this task takes adapters for "
            f"{', '.join(map(str, task_types))}. Give the --task that it was trained on."
        )
    return config


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
        return _whole(inside, None, options)
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
        return _whole(name, _class_for(config), options)
    except CheckpointError as error:
        raise CheckpointError(
            f"The base model of the adapter in {adapter} is missing or damaged. {error} If it is somewhere else, give "
            "that place with base_model_name_or_path."
        ) from error


def load_adapter(
    base: PreTrainedModel, adapter: Path, *, base_name: str | None = None, is_trainable: bool = False
) -> PeftModel:
    """Puts a saved adapter on its base model; every adapter of `meft` that was saved comes from here.

    Args:
        base: the model; changed in place.
        adapter: the adapter's folder.
        base_name: what to call the model in messages; None for its own name.
        is_trainable: whether the adapter's parameters require gradients.

    Raises:
        CheckpointError: the adapter is damaged, lacks weights, or belongs to another model.
    """
    check_weights(adapter)
    if not (adapter / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise CheckpointError(f"{adapter} has no {SAFETENSORS_WEIGHTS_NAME}, so it is no whole adapter. Copy it again.")
    name = base_name or str(base.name_or_path)
    try:
        with loading(str(adapter)), warnings.catch_warnings():
            # What is missing is told below, with a name.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(base, str(adapter), is_trainable=is_trainable)
    except MeftError as error:
        if error.__cause__ is None:
            raise
        cause = error.__cause__
        # PEFT looks the weights of a task head up by their names.
        reason = f"its weights {cause.args[0]} are missing." if isinstance(cause, KeyError) else first_line(cause)
        raise _misfit(adapter, name, reason) from error
    except (RuntimeError, TypeError, AttributeError) as error:
        raise _misfit(adapter, name, first_line(error)) from error
    missing, needless = compare_weights(model, adapter)
    if missing:
        raise _misfit(adapter, name, f"{len(missing)} of its weights are missing, {missing[0]} for one.")
    if needless:
        raise _misfit(adapter, name, f"{len(needless)} of its weights have no place there, {needless[0]} for one.")
    return model


def compare_weights(model: PeftModel, adapter: Path) -> tuple[list[str], list[str]]:
    """The weights that an adapter's file lacks, and those that the model it was put on has no place for.

    PEFT warns of some that are missing, and says nothing of task heads and of what is left over.
    """
    with safe_open(adapter / SAFETENSORS_WEIGHTS_NAME, framework="pt") as weights:
        found = set(weights.keys())
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(model.peft_config["default"].peft_type))
    needless = {name for name in found - expected if prefix is not None and prefix in name}
    return sorted(expected - found), sorted(needless)


def _misfit(adapter: Path, base: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"The adapter in {adapter} does not fit the base model {base}: {reason} Copy the adapter again if it is "
        "damaged, or give the model that it was trained on with base_model_name_or_path."
    )


def load_plain(folder: Path, **options: Any) -> PreTrainedModel:
    """Loads the model of a folder with the class that it was saved from; errors as of `read_model`."""
    return _whole(folder, None, options)


def _whole(name: str | Path, auto_model: Any, options: dict[str, Any]) -> PreTrainedModel:
    return read_model(str(name), auto_model, **{"dtype": "auto", **options})[0]


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
    if task:
        return TASK_MODELS.get(task)
    # The folder does not choose what is imported: only models of Transformers are looked up.
    place, name = str(noted.get("parent_library")), str(noted.get("base_model_class"))
    if not place.startswith("transformers.models."):
        return None
    try:
        found = getattr(importlib.import_module(place), name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None
