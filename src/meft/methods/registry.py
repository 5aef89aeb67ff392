"""The ways to fine-tune that `meft train` and `meft demo` put side by side, each applied by one call."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import peft
from torch import nn
from transformers import PreTrainedModel

from meft.errors import ConfigError
from meft.tuner.config import MeftConfig

from .baselines import ia3_config, linear_layers_pattern, train_biases

COUPLED_METHODS = ("meft1", "meft2", "meft3", "momentum")
# These leave the layers as they are, so that a coupling can be put under them by `meft.make_reversible`.
PLAIN_METHODS = ("full", "lora", "ia3", "bitfit")
METHODS = (*PLAIN_METHODS, "adapter", *COUPLED_METHODS)

# Options that mean something to some methods only. One that is set for another method is refused rather than
# silently dropped: the run would not be the run that its arguments describe.
_APPLIES_TO: dict[str, tuple[str, ...]] = {
    "arithmetic": COUPLED_METHODS,
    "backward": COUPLED_METHODS,
    "fraction_bits": COUPLED_METHODS,
    "drift_tolerance": COUPLED_METHODS,
    "output": COUPLED_METHODS,
    "cached_layers": COUPLED_METHODS,
    "anchor_every": COUPLED_METHODS,
    "lam": ("meft1", "meft2", "meft3"),
    "beta": ("meft1", "meft2", "meft3"),
    "gamma": ("momentum",),
    "granularity": ("momentum",),
    "sign": ("momentum",),
    "compensated": ("momentum",),
    "adapter_places": ("adapter", *COUPLED_METHODS),
    "adapter_init_std": ("adapter", *COUPLED_METHODS),
    "tile_size": ("meft3", "momentum"),
    "frozen_layers": ("adapter", *COUPLED_METHODS),
    "stacks": ("adapter", *COUPLED_METHODS),
    "feedforward_module": ("adapter", *COUPLED_METHODS),
}


@dataclass(frozen=True)
class MethodOptions:
    """The options of every method; `None` leaves a choice to the method.

    The sizes (`bottleneck_dim` and those of LoRA) are read by the methods that have them, so that one set of
    options serves a comparison. Every other option may only be set for a method that it means something to.

    Attributes:
        bottleneck_dim: Width of the bottleneck adapters (`adapter`, `meft1`..`meft3`, `momentum`).
        lora_rank: Rank of the LoRA updates.
        lora_alpha: LoRA scales its update by `lora_alpha / lora_rank`.
        lora_dropout: Dropout probability on the input of the LoRA updates.
        lam, beta, gamma, output, arithmetic, backward, fraction_bits, frozen_layers, cached_layers,
            drift_tolerance, anchor_every, granularity, sign, compensated, adapter_places, adapter_init_std,
            tile_size, stacks, feedforward_module: As in `MeftConfig`.
        modules_to_save: Names of modules trained in full and saved beside the adapter. `None`: the task head.
            `bitfit` trains them besides the biases; what it saves is the whole model in any case.
    """

    bottleneck_dim: int = 8
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lam: float | None = None
    beta: float | None = None
    gamma: float | None = None
    output: str | tuple[str, float] | None = None
    arithmetic: Literal["exact", "float"] | None = None
    backward: Literal["reversible", "cached"] | None = None
    fraction_bits: int | None = None
    frozen_layers: int = 0
    cached_layers: int = 0
    drift_tolerance: float | None = None
    anchor_every: int | None = None
    granularity: Literal["layer", "block"] | None = None
    sign: Literal["fixed", "random"] | None = None
    compensated: bool | None = None
    adapter_places: tuple[str, ...] | None = None
    adapter_init_std: float | None = None
    tile_size: int | None = None
    stacks: tuple[str, ...] | None = None
    feedforward_module: str | None = None
    modules_to_save: tuple[str, ...] | None = None


def check_method(method: str, options: MethodOptions) -> None:
    """Refuses an unknown method and options that mean nothing to the method.

    Raises:
        ConfigError: The method is unknown, or an option is set that belongs to other methods.
    """
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
    defaults = {field.name: field.default for field in fields(MethodOptions)}
    for name, methods in _APPLIES_TO.items():
        value = getattr(options, name)
        if value != defaults[name] and method not in methods:
            raise ConfigError(
                f"{name} is {value!r}, but method {method!r} has no such option; it belongs to "
                f"{', '.join(methods)}. Leave {name} out or choose one of those methods."
            )
    if method == "full" and options.modules_to_save is not None:
        raise ConfigError(
            f"modules_to_save is {options.modules_to_save!r}, but method 'full' trains and saves every module. "
            "Leave modules_to_save out or choose another method."
        )


def apply_method(model: PreTrainedModel, method: str, *, task_type: str | None, **options: Any) -> nn.Module:
    """Makes `model` trainable by `method`; the model passed in is changed.

    Example:
        >>> model = AutoModelForSequenceClassification.from_pretrained("roberta-base")
        >>> model = apply_method(model, "meft1", task_type="SEQ_CLS", bottleneck_dim=64)
        >>> trainable, total = count_parameters(model)

    Args:
        model: A Transformers model with its task head.
        method: `"full"` (every parameter), `"lora"` (PEFT's LoRA on all linear layers of the transformer
            layers), `"ia3"` (PEFT's (IA)3 on keys, values and feed-forwards), `"bitfit"` (all biases and the task
            head), `"adapter"` (the adapters of `meft` on the ordinary layers), or a coupling.
        task_type: PEFT's task type, `"SEQ_CLS"` for example; it decides which head is trained in full.
        **options: The fields of `MethodOptions`.

    Returns:
        For `"full"` and `"bitfit"` the model itself, which is saved whole as any model is; otherwise the `PeftModel`
        around it.

    Raises:
        ConfigError: The method or an option is unknown, or the option does not belong to the method.
        UnsupportedModelError: The model has no stack of transformer layers, or lacks what the method trains.
    """
    known = [field.name for field in fields(MethodOptions)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"Unknown option {unknown[0]!r}; the options of a method are {', '.join(known)}.")
    chosen = MethodOptions(**options)
    check_method(method, chosen)
    if method == "full":
        return model.requires_grad_(True)
    if method == "bitfit":
        return train_biases(model, task_type, chosen.modules_to_save)
    return peft.get_peft_model(model, _peft_config(model, method, task_type, chosen))


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Counts `(trainable, total)` parameters; a tensor shared by two modules counts once.

    The total contains the parameters that the method added. PEFT's copies of modules that it trains in full are
    counted with it, as `print_trainable_parameters` does.
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _peft_config(model: nn.Module, method: str, task_type: str | None, options: MethodOptions) -> peft.PeftConfig:
    if method == "lora":
        return _lora_config(model, task_type, options)
    if method == "ia3":
        return ia3_config(model, task_type, _as_list(options.modules_to_save))
    return _meft_config(method, task_type, options)


def _meft_config(method: str, task_type: str | None, options: MethodOptions) -> MeftConfig:
    values: dict[str, Any] = {
        "task_type": task_type,
        "coupling": method,
        "bottleneck_dim": options.bottleneck_dim,
    }
    values |= {name: value for name in _APPLIES_TO if (value := getattr(options, name)) is not None}
    for name in ("stacks", "adapter_places"):
        if name in values:
            values[name] = list(values[name])
    return MeftConfig(modules_to_save=_as_list(options.modules_to_save), **values)


def _lora_config(model: nn.Module, task_type: str | None, options: MethodOptions) -> peft.LoraConfig:
    return peft.LoraConfig(
        task_type=task_type,
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=linear_layers_pattern(model),
        modules_to_save=_as_list(options.modules_to_save),
    )


def _as_list(names: tuple[str, ...] | None) -> list[str] | None:
    """PEFT appends the task head to the list it is given, so it gets one of its own."""
    return None if names is None else list(names)
