"""The methods: what each trains and saves, a row each.

| column     | says                                                                                             |
|------------|--------------------------------------------------------------------------------------------------|
| `trains`   | what is trained, in words                                                                        |
| `saves`    | PEFT's type of the adapter that is saved; None where the whole model is                          |
| `coupling` | the coupling that the method's own adapters bring; None where it leaves the layers as they are   |
| `plain`    | whether a coupling can be put under it by `meft.make_reversible`: `lora+momentum`                |
| `make`     | makes a model trainable                                                                          |
| `code`     | the line of Python that does the same                                                            |
| `rates`    | the learning rate by PEFT's type of the task, None for every other (research/learning-rates.md)  |

The options of a method are those of `meft.options` whose entry names it. To add a method: a row here, and its name at
the options that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
from torch import nn
from transformers import PreTrainedModel

from meft.engine.couplings import COUPLINGS
from meft.options import ADAPTER_ONLY, CONFIG, METHOD, UNSET, WithOptions, option_dataclass, options_of
from meft.tuner.config import MeftConfig
from meft.tuner.peft_type import MEFT

from .baselines import ia3_config, linear_layers_pattern, train_biases


@option_dataclass(options_of(METHOD).values(), lambda option: option.left_out, frozen=True)
class MethodOptions(WithOptions):
    """The options of every method. One that is left out is the method's own.

    The sizes (`bottleneck_dim` and those of LoRA) are read by the methods that have them, so that one set of options
    serves a comparison. Every other option may only be set for a way to train that it means something to: one that is
    set for another is refused rather than dropped, since the run would not be the one that its arguments describe.

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


WARMUP = 0.1
"""The share of the steps over which the learning rate rises, where nothing else is asked for."""


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    trains: str
    saves: str | None
    make: Callable[[PreTrainedModel, str | None, MethodOptions], nn.Module]
    code: Callable[[str, Mapping[str, Any]], str]
    rates: Mapping[str | None, float]
    coupling: str | None = None
    plain: bool = False

    def suited(self, task_type: str | None) -> tuple[float, float]:
        """The learning rate for a type of task, and the share of the steps over which it rises."""
        return self.rates.get(task_type, self.rates[None]), WARMUP


def _full(model: PreTrainedModel, task_type: str | None, options: MethodOptions) -> nn.Module:
    return model.requires_grad_(True)


def _bitfit(model: PreTrainedModel, task_type: str | None, options: MethodOptions) -> nn.Module:
    return train_biases(model, task_type, options.modules_to_save)


def _lora(model: PreTrainedModel, task_type: str | None, options: MethodOptions) -> nn.Module:
    config = peft.LoraConfig(
        task_type=task_type,
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=linear_layers_pattern(model),
        modules_to_save=_as_list(options.modules_to_save),
    )
    return peft.get_peft_model(model, config)


def _ia3(model: PreTrainedModel, task_type: str | None, options: MethodOptions) -> nn.Module:
    return peft.get_peft_model(model, ia3_config(model, task_type, _as_list(options.modules_to_save)))


def _meft(model: PreTrainedModel, task_type: str | None, options: MethodOptions, *, coupling: str) -> nn.Module:
    values = {name: value for name, value in options.given().items() if name in options_of(CONFIG)}
    return peft.get_peft_model(model, MeftConfig(task_type=task_type, coupling=coupling, **values))


def _as_list(names: tuple[str, ...] | None) -> list[str] | None:
    """PEFT appends the task head to the list it is given, so it gets one of its own."""
    return None if names is None else list(names)


def _lora_code(task: str, options: Mapping[str, Any]) -> str:
    chosen = MethodOptions(**options)
    words = [f"task_type={task}", f"r={chosen.lora_rank}", f"lora_alpha={chosen.lora_alpha}"]
    return f'model = get_peft_model(base, LoraConfig({", ".join(words)}, target_modules="all-linear"))'


def _meft_code(task: str, options: Mapping[str, Any], *, coupling: str) -> str:
    words = [f"task_type={task}", f'coupling="{coupling}"', *as_code(options)]
    return f"model = get_peft_model(base, meft.MeftConfig({', '.join(words)}))"


def as_code(options: Mapping[str, Any]) -> list[str]:
    """Options as the arguments of a call."""
    return [f"{name}={value!r}" for name, value in options.items()]


def _of_meft(name: str, trains: str) -> Method:
    make, code = partial(_meft, coupling=name), partial(_meft_code, coupling=name)
    rates = {None: 5e-3, _WRITING: 2e-3}
    return Method(name, trains, MEFT.value, make, code, rates, coupling=None if name == ADAPTER_ONLY else name)


_WRITING = "CAUSAL_LM"


_ROWS = (
    Method(
        "full",
        "every parameter",
        None,
        _full,
        lambda task, options: "model = base",
        {None: 1e-4, _WRITING: 2e-5},
        plain=True,
    ),
    Method(
        "lora",
        "PEFT's LoRA on all linear layers of the transformer layers",
        "LORA",
        _lora,
        _lora_code,
        {None: 1e-3, _WRITING: 5e-4},
        plain=True,
    ),
    Method(
        "ia3",
        "PEFT's (IA)3 on keys, values and feed-forwards",
        "IA3",
        _ia3,
        lambda task, options: f"model = get_peft_model(base, IA3Config(task_type={task}))",
        {None: 3e-2, _WRITING: 5e-3},
        plain=True,
    ),
    Method(
        "bitfit",
        "all biases and the task head",
        None,
        _bitfit,
        lambda task, options: f'model = apply_method(base, "bitfit", task_type={task})  # of meft.methods.registry',
        {None: 1e-2, _WRITING: 1e-3},
        plain=True,
    ),
    _of_meft(ADAPTER_ONLY, "the adapters of meft on the ordinary layers"),
    *(_of_meft(name, f"the adapters of meft on layers coupled by {name}") for name in COUPLINGS),
)
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
"""Every method by name."""
PLAIN_METHODS = tuple(row.name for row in _ROWS if row.plain)
"""These leave the layers as they are, so that a coupling can be put under them."""
COUPLED_METHODS = tuple(row.name for row in _ROWS if row.coupling is not None)
"""These have adapters on coupled streams."""
