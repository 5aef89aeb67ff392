"""The ways to fine-tune that `meft train` and `meft demo` put side by side, each applied by one call."""

from __future__ import annotations

from typing import Any

import peft
from torch import nn
from transformers import PreTrainedModel

from meft.errors import ConfigError
from meft.options import CONFIG, METHOD, UNSET, WithOptions, option_dataclass, options_of, refuse_beside
from meft.tuner.config import MeftConfig

from .baselines import ia3_config, linear_layers_pattern, train_biases

COUPLED_METHODS = ("meft1", "meft2", "meft3", "momentum")
# These leave the layers as they are, so that a coupling can be put under them by `meft.make_reversible`.
PLAIN_METHODS = ("full", "lora", "ia3", "bitfit")
METHODS = (*PLAIN_METHODS, "adapter", *COUPLED_METHODS)


@option_dataclass(options_of(METHOD).values(), lambda option: option.left_out, frozen=True)
class MethodOptions(WithOptions):
    """The options of every method. One that is left out is the method's own.

    The sizes (`bottleneck_dim` and those of LoRA) are read by the methods that have them, so that one set of options
    serves a comparison. Every other option may only be set for a method that it means something to: one that is set
    for another method is refused rather than dropped, since the run would not be the one that its arguments describe.

    Attributes:
        options: those of the table (`meft.options`).

    Raises:
        ConfigError: a value is not valid by itself.
    """

    def __post_init__(self) -> None:
        for name, option in options_of(METHOD).items():
            value = getattr(self, name)
            if value is None and option.none is None:
                object.__setattr__(self, name, option.left_out)
            elif value is not UNSET:
                option.check(value)
                kept = option.normal(value)
                object.__setattr__(self, name, tuple(kept) if isinstance(kept, list) else kept)

    def given(self) -> dict[str, Any]:
        """The options that were not left out, by name."""
        return {name: value for name in options_of(METHOD) if (value := getattr(self, name)) is not UNSET}


def check_method(method: str, options: MethodOptions) -> None:
    """Refuses an unknown method and options that mean nothing to the method.

    Raises:
        ConfigError: The method is unknown, or an option is set that belongs to other methods.
    """
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
    refuse_beside(method, vars(options))
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
    known = list(options_of(METHOD))
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
    values = {name: value for name, value in options.given().items() if name in options_of(CONFIG)}
    return MeftConfig(task_type=task_type, coupling=method, **values)


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
