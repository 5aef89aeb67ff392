"""Loading models, adapters and tokenizers, with errors that say which file is at fault."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# Transformers 5.17 exports the name from its root only beside torchvision, which this class can do without.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from meft.errors import (
    CheckpointError,
    ConfigError,
    MeftError,
    MissingPackageError,
    UnsupportedModelError,
    first_line,
)
from meft.storage.claims import check_model_folder, read_object
from meft.storage.files import check_weights

from .arguments import ModelArguments

# Names on the hub have one slash at most and begin with a letter or a digit.
_LOCAL = re.compile(r"[./~\\]|[^/]*/[^/]*/|[A-Za-z]:")
_SIZES = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 100_000,
    "hidden_size": 10_000_000,
    "intermediate_size": 100_000_000,
    "vocab_size": 100_000_000,
}
# Tokenizers that know no limit report a number beyond any model's.
_NO_LIMIT = 10**6


def has_file(path: str, name: str) -> bool:
    """Whether `path` is a local folder with a file of that name."""
    return (Path(path) / name).is_file()


def read_config(name: str, what: str | None = None, **options: Any) -> PretrainedConfig:
    """Loads the configuration of the model called `name`.

    Args:
        name: A folder, a `config.json`, or a name on the hub.
        what: What the model is for, in messages.
        **options: Of `AutoConfig.from_pretrained`.

    Raises:
        CheckpointError: There is no such folder, or its configuration cannot be read.
        UnsupportedModelError: Transformers does not know the model.
    """
    trusted = _says_whether_trusted(options)
    place = Path(name)
    if place.is_file():
        read_object(place)
    check_model_folder(place, trusted=trusted)
    with loading(name, what):
        config = AutoConfig.from_pretrained(name, **options)
    _check_sizes(config, name)
    return config


def read_model(
    name: str, auto_model: Any, what: str | None = None, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """Loads a model from safetensors files; every model of `meft` that has weights comes from here.

    Args:
        name: Its folder or its name on the hub.
        auto_model: The class of Transformers; `None` for the one that the model was saved from.
        what: What the model is for, in messages.
        **options: Of its `from_pretrained`.

    Returns:
        The model and the modules that its checkpoint has no weights for, which start at random.

    Raises:
        CheckpointError: A file is missing, truncated or damaged, or its tensors have other sizes.
        UnsupportedModelError: There is no such model with that head.
    """
    check_place(name)
    check_model_folder(Path(name), trusted=_says_whether_trusted(options))
    check_weights(Path(name))
    with loading(name, what):
        if auto_model is None:
            hub = {key: options[key] for key in ("cache_dir", "revision", "trust_remote_code") if key in options}
            config = AutoConfig.from_pretrained(name, **hub)
            _check_sizes(config, name)
            auto_model = _class_of(config)
        options = {"use_safetensors": True, **options}
        model, info = auto_model.from_pretrained(name, output_loading_info=True, **options)
    return model, _new_modules(model, info)


def _check_sizes(config: PretrainedConfig, name: str) -> None:
    """Refuses sizes that no model has, which would be built for hours before anybody stumbles over them."""
    for size, most in _SIZES.items():
        value = getattr(config, size, None)
        if (isinstance(value, int) and not 0 <= value <= most) or isinstance(value, str | float | dict):
            raise CheckpointError(
                f"The configuration of {name} has {size}={value!r}; it must be an integer from 0 to {most}. Copy or "
                "download it again."
            )


def _says_whether_trusted(options: dict[str, Any]) -> bool:
    """Whether the call lets code run that comes with a model; left open, Transformers would ask at the terminal."""
    return bool(options.setdefault("trust_remote_code", False))


def _class_of(config: PretrainedConfig) -> Any:
    """The class that a model was saved from, where that is a model of Transformers."""
    names = config.architectures
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else AutoModel


def check_place(name: str) -> None:
    """Refuses what can only be a local folder and is none.

    Raises:
        CheckpointError: It is a file, or does not exist.
    """
    if _LOCAL.match(name) and not Path(name).is_dir():
        what = "is a file" if Path(name).exists() else "does not exist"
        raise CheckpointError(
            f"{name}, where the model should be, {what}. Give a model's folder or its name on the hub."
        )


def load_config(arguments: ModelArguments, name: str, what: str | None = None) -> PretrainedConfig:
    """Loads the configuration of the model called `name`; errors as of `read_config`."""
    check_place(name)
    return read_config(arguments.config_name or name, what, **arguments.hub())


def load_tokenizer(arguments: ModelArguments, name: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, with a padding token: the end token where it has none of its own."""
    chosen = arguments.tokenizer_name or name
    check_model_folder(Path(chosen), trusted=arguments.trust_remote_code)
    with loading(chosen):
        tokenizer = AutoTokenizer.from_pretrained(chosen, **arguments.hub())
    if not isinstance(tokenizer.model_max_length, int | float):
        raise CheckpointError(
            f"The tokenizer of {chosen} has model_max_length={tokenizer.model_max_length!r}, which is no number. Mend "
            "its tokenizer_config.json or copy it again."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UnsupportedModelError(
                f"The tokenizer of {name} has neither a padding nor an end token, so texts of different lengths cannot "
                "be put in one batch. Give another with --tokenizer_name."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(arguments: ModelArguments, name: str) -> BaseImageProcessor:
    """Loads the image processor, the one that computes with Pillow and NumPy and gives the same pixels everywhere.

    Raises:
        CheckpointError: The model has none.
        UnsupportedModelError: There is no such image processor without torchvision.
    """
    check_model_folder(Path(name), trusted=arguments.trust_remote_code)
    with loading(name, "images"):
        return AutoImageProcessor.from_pretrained(name, backend="pil", **arguments.hub())


def load_model(
    arguments: ModelArguments, name: str, config: PretrainedConfig, auto_model: Any, what: str
) -> tuple[PreTrainedModel, list[str]]:
    """Loads a model with its head, and says which modules start at random; errors as of `read_model`.

    Args:
        arguments: What the user said about the model.
        name: Its folder or its name on the hub.
        config: Its configuration, changed to what the task needs.
        auto_model: The Auto class of Transformers that knows the head.
        what: What the model is for, in messages.
    """
    return read_model(name, auto_model, what, config=config, **arguments.weights())


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuses a tokenizer that knows more tokens than the model called `name`.

    Raises:
        ConfigError: It does.
    """
    weight: Any = model.get_input_embeddings().weight
    embedded = len(weight)
    if len(tokenizer) > embedded:
        raise ConfigError(
            f"The tokenizer knows {len(tokenizer)} tokens and {name} only {embedded}, so they do not belong together. "
            "Give the model's own with --tokenizer_name."
        )


def is_causal(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration writes texts from left to right."""
    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not _reads_both_ways(config)


def _reads_both_ways(config: PretrainedConfig) -> bool:
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and getattr(config, "is_decoder", True) is False


def check_causal(model: PreTrainedModel, name: str) -> None:
    """Refuses BERT and its like, which can be loaded as language models and would see what they are to predict.

    Raises:
        UnsupportedModelError: It is one of these.
    """
    if _reads_both_ways(model.config):
        raise UnsupportedModelError(
            f"{name} is a {model.config.model_type}, which reads texts in both directions and so is no language "
            "model that answers could be scored by. Give a causal one: OPT, GPT-2, Llama, ..."
        )


def check_trained(name: str, new_modules: Sequence[str]) -> None:
    """Refuses to evaluate a model some of whose weights were never trained.

    Raises:
        CheckpointError: The checkpoint lacks weights.
    """
    if new_modules:
        raise CheckpointError(
            f"{name} has no weights for {', '.join(new_modules)}, so its predictions would be random. Give a model "
            "that was trained for this task."
        )


def heads_to_save(model: PreTrainedModel, new_modules: Sequence[str], known: Sequence[str] = ()) -> tuple[str, ...]:
    """The modules that must be trained and saved beside an adapter, but for those that PEFT knows of.

    These are the task head (BART calls it `classification_head`) and whatever started at random: left out of the
    adapter's file, a pooler that the checkpoint lacked would be another one after loading.

    Args:
        model: The model before its method is applied.
        new_modules: The modules that started at random.
        known: The heads that PEFT trains and saves of its own accord.
    """
    heads = {name for name, child in model.named_children() if name != model.base_model_prefix and _has_weights(child)}
    inner = {name for name in new_modules if name.split(".")[0] not in heads}
    return tuple(sorted(heads - set(known)) + sorted(inner))


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> int:
    """How many tokens a row may have.

    Raises:
        ConfigError: More are wanted than the model takes, or neither model nor tokenizer knows a limit.
    """
    longest = longest_input(model, tokenizer)
    if wanted is not None and longest is not None and wanted > longest:
        raise ConfigError(f"max_seq_length is {wanted}; this model takes at most {longest} tokens.")
    if wanted is None and longest is None:
        raise ConfigError("This model has no limit to the length of its input. Give one with --max_seq_length.")
    return wanted or longest or 0


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens the model takes; `None` where neither it nor its tokenizer knows a limit."""
    limits = [limit for limit in (tokenizer.model_max_length, _positions(model)) if limit and limit < _NO_LIMIT]
    return min(limits, default=None)


def absolute(name: str) -> str:
    """The absolute path of a local folder, so that a saved adapter finds its base from anywhere; else `name`."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides the loading bar and the report of new weights: both are said in a sentence of our own."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def loading(name: str, what: str | None = None) -> Iterator[None]:
    """Turns what Transformers, PEFT and safetensors raise into errors of `meft`."""
    try:
        with quiet_transformers():
            yield
    except MeftError:
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"A weights file of {name} is truncated or damaged ({error}). Copy or download it again."
        ) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"A file of {name} is not valid JSON ({error}). Copy or download it again.") from error
    except OSError as error:
        raise CheckpointError(f"{name} could not be loaded: {first_line(error)}") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "mismatched" not in str(error):
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise CheckpointError(f"{name} could not be loaded: {_with_type(error)}") from error
        raise CheckpointError(
            f"The weights of {name} do not have the sizes of the model: {first_line(error)} For a task head that was "
            "trained on another number of labels give --ignore_mismatched_sizes."
        ) from error
    except ImportError as error:
        raise MissingPackageError(
            f"{name} needs a package that is not installed: {first_line(error)} Install it, or give another model."
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        # What a folder says may make a library stumble anywhere. Tokenizers raise Exception itself.
        kind = f"model for {what}" if what else "model"
        said = first_line(error) if isinstance(error, ValueError | KeyError) else _with_type(error)
        raise UnsupportedModelError(
            f"{name} is no {kind} that Transformers {transformers.__version__} can load: {said}"
        ) from error


def _with_type(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _new_modules(model: nn.Module, info: Any) -> list[str]:
    missing = info["missing_keys"] if isinstance(info, dict) else info.missing_keys
    mismatched = info["mismatched_keys"] if isinstance(info, dict) else info.mismatched_keys
    names = {*missing, *(key[0] if isinstance(key, (tuple, list)) else key for key in mismatched)}
    return sorted({name.rsplit(".", 1)[0] for name, _ in model.named_parameters() if name in names})


def _positions(model: PreTrainedModel) -> int | None:
    positions = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa counts its positions from the padding index on, so that many rows of the table are never reached.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1
    return positions


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
