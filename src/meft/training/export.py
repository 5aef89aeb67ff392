"""Writes what was trained into a folder of its own, to be served or given away.

What runs on the plain model (LoRA and its kin, trained on a reversible backbone or not) is merged into the weights: a
plain Transformers model comes out, which needs neither `meft` nor PEFT. The adapters of MEFT act on coupled streams and
cannot be merged: they go into a folder with their base model inside, where `meft.load(folder)` finds both.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME
from transformers.utils import logging

from meft.backbone.conversion import restore
from meft.backbone.layers import ReversibleLayer
from meft.errors import CheckpointError, ConfigError, OutputFolderError
from meft.loading.folders import (
    BASE_FOLDER,
    adapter_config,
    is_adapter,
    load_adapter,
    load_base,
    load_plain,
)
from meft.loading.tasks import TASK_MODELS
from meft.options import ADAPTER_ONLY
from meft.storage.claims import read_object
from meft.storage.files import publish_new_folder, staged, write_json, write_text
from meft.storage.outputs import check_output_folder, writing
from meft.tuner.peft_type import MEFT

logger = logging.get_logger(__name__)

# What belongs to a model besides its weights, by the names that Transformers gives it; and what a run of meft says
# about its task.
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "preprocessor_config.json", "processor_config.json", "task.json"),
)
_READMES = {
    "model": "A plain Transformers model, fine-tuned with meft and exported by `meft export`.\n\n{code}\n",
    "adapter": "A MEFT or PEFT adapter with its base model inside, written by `meft export`.\n\n{code}\n",
}
Kind = Literal["model", "adapter"]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where it is.
        kind: "model" for a plain model, "adapter" for an adapter with its base model inside.
        code: the lines of Python that load it.
    """

    folder: Path
    kind: Kind
    code: str


def export(
    source: str | Path | nn.Module,
    output_dir: str | Path,
    *,
    base_model_name_or_path: str | None = None,
    merge: bool | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Exported:
    """Writes a trained model or adapter into a folder that loads by itself: safetensors, no pickles, no code.

    Example:
        >>> model = meft.make_reversible(get_peft_model(base, LoraConfig(...)))    # and train it
        >>> meft.export(model, "served", tokenizer=tokenizer)
        >>> AutoModelForCausalLM.from_pretrained("served")                         # without meft

    The folder is written beside its place and renamed: it is there as a whole or not at all. The source stays as it is.

    Args:
        source: the folder of a run or an adapter; or a model in memory, of which a copy is made.
        output_dir: a folder that does not exist or is empty.
        base_model_name_or_path: the base model of an adapter, when it is no longer where the adapter says.
        merge: True to fold the adapter into its base model, False to keep it beside; None to fold what can be folded.
        tokenizer: written beside the model; None for the one in the source's folder, or else that of the base model.
        **options: of Transformers' `from_pretrained` for the model of a folder, such as `dtype`.

    Returns:
        The folder, what it holds, and how it is loaded.

    Raises:
        ConfigError: the adapter cannot be merged, or an option does not go with the source.
        CheckpointError: the source or its base model is missing or damaged.
        OutputFolderError: the output folder holds something.
    """
    place = Path(output_dir)
    _check_output(place)
    if isinstance(source, nn.Module):
        if base_model_name_or_path is not None:
            options["base_model_name_or_path"] = base_model_name_or_path
        if options:
            raise ConfigError(
                f"{next(iter(options))} was given, but the source is a {type(source).__name__} in memory, which has "
                "its base model and its dtype. Leave it out, or give the folder of an adapter."
            )
        _check_model(source)
        _merges(source.peft_config[_active(source)] if isinstance(source, PeftModel) else None, merge)
    else:
        _check_folder(Path(source))
    with writing(place):
        place.resolve().parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own, so that two exports at once do not write into one another.
    with writing(place), staged(place.resolve().parent, f"{place.name}-{uuid4().hex[:8]}") as staging:
        if isinstance(source, nn.Module):
            model, kind = _write_copy(source, staging, merge)
        else:
            model, kind = _write_saved(Path(source), staging, merge, base_model_name_or_path, options)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if kind == "adapter":
            config = read_object(staging / CONFIG_NAME)
            write_json(staging / CONFIG_NAME, {**config, "base_model_name_or_path": str(place.resolve() / BASE_FOLDER)})
        code = _code(model, place, kind)
        write_text(staging / "README.md", _READMES[kind].format(code="    " + code.replace("\n", "\n    ")))
        publish_new_folder(staging, place.resolve())
    return Exported(place, kind, code)


# -- from a folder ---------------------------------------------------------------------------------------------------


def _write_saved(
    source: Path, staging: Path, merge: bool | None, base_name: str | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, Kind]:
    """Writes what a folder holds; the model that is returned is the one whose class loads it."""
    if not is_adapter(source):
        if base_name is not None:
            raise ConfigError(
                f"base_model_name_or_path is {base_name!r}, but {source} holds a whole model, which has no base. Leave "
                "it out."
            )
        model = load_plain(source, **options)
        model.save_pretrained(staging)
        _copy_companions([source], staging)
        return model, "model"
    merges = _merges(adapter_config(source), merge)
    base = load_base(source, base_name, **options)
    _copy_companions([Path(base.name_or_path or source), source], staging)
    _save_tokenizer_of(base.name_or_path, staging)
    if merges:
        base = _merged(load_adapter(base, source))
        base.save_pretrained(staging)
        return base, "model"
    base.save_pretrained(staging / BASE_FOLDER)
    load_adapter(base, source)  # which finds out whether it fits
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        shutil.copyfile(source / name, staging / name)
    return base, "adapter"


def _copy_companions(folders: Iterable[Path], staging: Path) -> None:
    """Copies tokenizers and the like; those of a later folder take the place of an earlier one's."""
    for folder in folders:
        for pattern in _COMPANIONS if folder.is_dir() else ():
            for path in folder.glob(pattern):
                if path.is_file() and path.suffix != ".py":
                    shutil.copyfile(path, staging / path.name)


def _save_tokenizer_of(name: str | None, staging: Path) -> None:
    """Writes the tokenizer of a base model on the hub; models of images have none."""
    if not name or Path(name).is_dir() or (staging / "tokenizer_config.json").exists():
        return
    try:
        AutoTokenizer.from_pretrained(name, trust_remote_code=False).save_pretrained(staging)
    except (OSError, ValueError, KeyError) as error:
        logger.warning(f"{name} has no tokenizer that can be loaded, so none was written: {error}")


# -- from memory -----------------------------------------------------------------------------------------------------


def _write_copy(source: nn.Module, staging: Path, merge: bool | None) -> tuple[PreTrainedModel, Kind]:
    """Writes a model in memory, through a copy that is restored and merged."""
    model = copy.deepcopy(source)
    if any(type(module) is ReversibleLayer for module in model.modules()):
        restore(model)
    if not isinstance(model, PeftModel):
        assert isinstance(model, PreTrainedModel)
        model.save_pretrained(staging)
        return model, "model"
    active = _active(model)
    if _merges(model.peft_config[active], merge):
        base = _merged(model)
        base.save_pretrained(staging)
        return base, "model"
    model.save_pretrained(str(staging), selected_adapters=[active], save_embedding_layers=False)
    if (staging / active).is_dir():  # where PEFT puts adapters of other names than "default"
        for path in (staging / active).iterdir():
            os.replace(path, staging / path.name)
        (staging / active).rmdir()
    # Prompts stand outside the model, which then is as it was.
    bare = model.base_model.unload() if isinstance(model.base_model, BaseTuner) else model.get_base_model()
    assert isinstance(bare, PreTrainedModel)
    bare.save_pretrained(staging / BASE_FOLDER)
    return bare, "adapter"


def _active(model: PeftModel) -> str:
    active = model.active_adapters
    if len(active) != 1:
        raise ConfigError(
            f"The adapters {active} of {type(model).__name__} are active together; one can be exported. Activate it "
            "with model.set_adapter(name)."
        )
    return active[0]


# -- merging ---------------------------------------------------------------------------------------------------------


def _merges(config: PeftConfig | None, merge: bool | None) -> bool:
    """Whether an adapter is to be folded into its base model."""
    if config is None:
        return False
    kind = PeftType(config.peft_type)
    mergeable = kind != MEFT and issubclass(PEFT_TYPE_TO_TUNER_MAPPING.get(kind, object), BaseTuner)
    if merge and not mergeable:
        coupling = getattr(config, "coupling", None)
        named = kind.value if coupling is None else f"{kind.value} (coupling={coupling!r})"
        reason = "it is not a change" if coupling in (None, ADAPTER_ONLY) else "two coupled streams are not a change"
        raise ConfigError(
            f"merge was asked for, but an adapter of {named} cannot be merged: {reason} of the pretrained weights. "
            "Leave merge out, which keeps the adapter beside its base model; or train LoRA under "
            'make_reversible(model, coupling="momentum"), which merges.'
        )
    return mergeable if merge is None else merge


def _merged(model: PeftModel) -> PreTrainedModel:
    try:
        return model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"The adapter could not be merged into {type(model.get_base_model()).__name__}: {error} Give merge=False "
            "(--no-merge), which keeps it beside its base model."
        ) from error


# -- checks ----------------------------------------------------------------------------------------------------------


def _check_output(place: Path) -> None:
    check_output_folder(place)
    names = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    if names:
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise OutputFolderError(
            f"output_dir is {str(place)!r}, which is not empty ({listed}). Nothing was changed. Choose a folder that "
            "does not exist, or empty it."
        )


def _check_folder(source: Path) -> None:
    if is_adapter(source) or (source / MODEL_CONFIG_NAME).is_file():
        return
    if not source.is_dir():
        raise CheckpointError(
            f"{source}, which should be exported, {'is a file' if source.exists() else 'does not exist'}. Give the "
            "folder of a run or of an adapter."
        )
    checkpoints = sorted(path.name for path in source.glob("checkpoint-*") if path.is_dir())
    advice = f"Its run is not finished; give one of its checkpoints: {', '.join(checkpoints)}." if checkpoints else ""
    raise CheckpointError(
        f"{source} holds neither an adapter ({CONFIG_NAME}) nor a model ({MODEL_CONFIG_NAME}). "
        + (advice or "Give the folder of a run or of an adapter.")
    )


def _check_model(source: nn.Module) -> None:
    base = source.get_base_model() if isinstance(source, PeftModel) else source
    native = base is source and getattr(base, "_hf_peft_config_loaded", False)  # adapters without a PeftModel
    if native or not isinstance(base, PreTrainedModel):
        raise ConfigError(
            f"export was given a {type(source).__name__}. Valid are a Transformers model, one that make_reversible or "
            "get_peft_model returned, and the folder of a run or an adapter. Unwrap what is around it."
        )


def _code(model: PreTrainedModel, place: Path, kind: Kind) -> str:
    if kind == "adapter":
        return f"import meft\nmodel = meft.load({str(place)!r})"
    name = type(model).__name__
    for auto in TASK_MODELS.values():
        if auto._model_mapping.get(type(model.config), None) is type(model):
            name = auto.__name__
    return f"from transformers import {name}\nmodel = {name}.from_pretrained({str(place)!r})"
