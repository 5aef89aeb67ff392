"""A model and a batch without values, from a configuration: what `meft.estimate` runs a step of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from meft.errors import CheckpointError, ConfigError, MeftWarning, UnsupportedModelError, first_line
from meft.loading.models import read_config
from meft.loading.tasks import IMAGES, TASK_MODELS, task_type_of

DTYPES = ("float32", "bfloat16", "float16", "float64")
ATTENTIONS = ("sdpa", "eager")
_UNPADDED = "meft_unpadded_sdpa"


@dataclass(frozen=True)
class Blueprint:
    """What a model is built from.

    Attributes:
        name: what to call it: its name on the hub, its folder, or its type.
        config: its configuration.
        task_type: a key of `TASK_MODELS`.
        dtype: of its weights.
        attn_implementation: "sdpa", "eager", or None for the model's own choice.
        padded: whether batches come with an attention mask that has zeros.
    """

    name: str
    config: PretrainedConfig
    task_type: str
    dtype: torch.dtype
    attn_implementation: str | None
    padded: bool

    @property
    def of_images(self) -> bool:
        return self.task_type == IMAGES

    def build(self) -> PreTrainedModel:
        """Builds the model on the meta device, in training mode.

        Raises:
            UnsupportedModelError: Transformers has no such model for the task.
        """
        config = copy.deepcopy(self.config)
        options: dict[str, Any] = {"dtype": self.dtype}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                model = TASK_MODELS[self.task_type].from_config(config, **options)
        except (ValueError, KeyError, ImportError) as error:
            raise UnsupportedModelError(
                f"{self.name} cannot be built for {self.task_type} with Transformers {transformers.__version__}: "
                f"{first_line(error)} Choose another task_type ({', '.join(TASK_MODELS)}) or attn_implementation "
                f"({', '.join(ATTENTIONS)})."
            ) from error
        if not self.padded and not self.of_images:
            _assume_unpadded(model)
        return model.train()

    def batch(self, batch_size: int, seq_len: int) -> dict[str, Tensor]:
        """Makes a batch with labels, within the fake mode or on the device that is current."""
        config, rows = self.config, (batch_size,)
        if self.of_images:
            height, width = _pair(config.image_size)
            pixels = torch.zeros(batch_size, config.num_channels, height, width, dtype=self.dtype)
            return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long)}
        ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
        # Without a mask, models look at the values of positions for sequences that were packed into one row.
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.task_type == "SEQ_CLS":
            made["labels"] = torch.zeros(rows, dtype=torch.float32 if config.num_labels == 1 else torch.long)
        elif self.task_type == "QUESTION_ANS":
            made |= {"start_positions": torch.zeros(rows, dtype=torch.long)}
            made |= {"end_positions": torch.zeros(rows, dtype=torch.long)}
        elif self.task_type != "FEATURE_EXTRACTION":
            made["labels"] = torch.zeros_like(ids)
        elif config.is_encoder_decoder:
            made["decoder_input_ids"] = torch.zeros_like(ids)
        return made

    def positions(self, model: nn.Module) -> tuple[int | None, bool]:
        """The longest sequence the model is made for, or None, and whether a longer one cannot run at all."""
        config = self.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        tables = [
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and ("position" in name.rsplit(".", 1)[-1] or name.endswith("wpe"))
        ]
        for table in tables:
            # RoBERTa counts its positions from the padding token on.
            if table.padding_idx is not None and limit is not None:
                limit = min(limit, table.num_embeddings - table.padding_idx - 1)
        return limit, bool(tables)


def read_blueprint(
    model: str | Path | PretrainedConfig,
    *,
    task_type: str | None,
    dtype: str | torch.dtype,
    attn_implementation: str | None,
    padded: bool,
    attention_dropout: bool,
    **hub: Any,
) -> Blueprint:
    """Reads a model's configuration and checks how it is to be built.

    Args:
        model: a name on the hub, a folder, a configuration file (JSON), or a configuration.
        task_type: a key of `TASK_MODELS`; None for what the configuration was saved for.
        dtype: of the weights.
        attn_implementation: "sdpa", "eager" or None.
        padded: whether batches have padding.
        attention_dropout: False sets the dropout of attention weights to 0.
        **hub: options of `AutoConfig.from_pretrained`.

    Raises:
        ConfigError: an option is not valid.
        CheckpointError: there is no configuration there, or it cannot be read.
        UnsupportedModelError: Transformers does not know the model.
    """
    if task_type is not None and task_type not in TASK_MODELS:
        raise ConfigError(f"task_type is {task_type!r}; it must be one of {', '.join(TASK_MODELS)}.")
    if attn_implementation not in (None, *ATTENTIONS):
        raise ConfigError(
            f"attn_implementation is {attn_implementation!r}; steps on tensors without values can run "
            f"{' and '.join(ATTENTIONS)}. Choose one of these; the memory of flash attention is that of sdpa."
        )
    config = copy.deepcopy(model) if isinstance(model, PretrainedConfig) else _load_config(str(model), hub)
    name = (config.name_or_path or config.model_type) if isinstance(model, PretrainedConfig) else str(model)
    task = task_type or task_type_of(config) or _usual_task(config)
    text = config.get_text_config()
    text.use_cache = config.use_cache = False  # as Trainer has it
    if task != IMAGES and getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = config.pad_token_id = 0
    if not attention_dropout:
        for attribute in ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop"):
            if getattr(text, attribute, None):
                setattr(text, attribute, 0.0)
    return Blueprint(name, config, task, read_dtype(dtype), attn_implementation, padded)


def read_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Returns the dtype called so.

    Raises:
        ConfigError: weights cannot have it.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}.")
    return getattr(torch, name)


def check_seq_len(blueprint: Blueprint, model: nn.Module, seq_len: int) -> None:
    """Refuses a sequence that the model cannot take, and warns of one that it was not made for.

    Raises:
        ConfigError: the model has no more positions.
    """
    limit, hard = blueprint.positions(model)
    if limit is None or seq_len <= limit:
        return
    if hard:
        raise ConfigError(
            f"seq_len is {seq_len}, but {blueprint.name} takes at most {limit} tokens. Use {limit} or less."
        )
    warnings.warn(
        f"seq_len is {seq_len}, but {blueprint.name} was made for at most {limit} tokens. The memory is estimated all "
        "the same.",
        MeftWarning,
        stacklevel=3,
    )


def _load_config(name: str, hub: dict[str, Any]) -> PretrainedConfig:
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        raise CheckpointError(
            f"{name} has no config.json, so it holds no model that could be built. "
            + ("It is an adapter: give the base model, and the method." if adapter else "Give a model's folder.")
        )
    if not path.exists() and (name.startswith((".", "/", "~")) or name.endswith(".json") or name.count("/") > 1):
        raise CheckpointError(f"{name} does not exist. Give a model's folder, its config.json, or its name on the hub.")
    return read_config(name, **hub)


def _usual_task(config: PretrainedConfig) -> str:
    """What a model whose configuration says nothing is taken for: language modelling where it can."""
    if hasattr(config, "image_size") and not hasattr(config.get_text_config(), "vocab_size"):
        return IMAGES
    known = transformers.models.auto.modeling_auto
    if config.is_encoder_decoder and type(config) in known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return "SEQ_2_SEQ_LM"
    masked = type(config) in known.MODEL_FOR_MASKED_LM_MAPPING
    return "CAUSAL_LM" if type(config) in known.MODEL_FOR_CAUSAL_LM_MAPPING and not masked else "SEQ_CLS"


def _assume_unpadded(model: PreTrainedModel) -> None:
    """Lets attention run as it does when no token is padding.

    Transformers then does without a mask where it can, which it finds out by looking at the values of one. Tensors
    without values always get a mask; this registers attention by another name, which differs in that alone.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "sdpa":
            module.config._attn_implementation = _unpadded_sdpa()


def _unpadded_sdpa() -> str:
    masks, functions = AttentionMaskInterface(), AttentionInterface()
    if _UNPADDED not in masks:
        AttentionMaskInterface.register(_UNPADDED, _without_padding(masks["sdpa"]))
        AttentionInterface.register(_UNPADDED, functions["sdpa"])
    return _UNPADDED


def _without_padding(mask: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        return mask(*args, **{**kwargs, "attention_mask": None})

    return make


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
