"""Ways to train, by name: a method, or a method and what is put under or around it, joined by "+"."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import TaskType
from torch import nn
from transformers import PreTrainedModel

from meft.backbone.conversion import layer_drop_unsaid, make_reversible, restore
from meft.backbone.refusal import as_it_was_if_refused
from meft.engine.couplings import COUPLINGS
from meft.errors import ConfigError, UnsupportedModelError
from meft.options import FUNCTION, METHOD, UNSET, Option, options_of
from meft.tuner.saved_modules import check_modules_to_save

from .table import METHODS, PLAIN_METHODS, Method, MethodOptions, as_code

CHECKPOINTING, OFFLOAD = "checkpointing", "offload"
AROUND = (CHECKPOINTING, OFFLOAD)
"""What can be put around a method that couples nothing: gradient checkpointing of the layers, or keeping what is saved
for the backward pass on the host."""
WAYS = (
    *METHODS,
    *(f"{method}+{coupling}" for method in PLAIN_METHODS for coupling in COUPLINGS),
    *(f"{name}+{around}" for name, method in METHODS.items() if method.coupling is None for around in AROUND),
)
"""The names of all ways to train."""
COMPARED = (
    "full",
    "full+checkpointing",
    "full+momentum",
    "lora",
    "lora+checkpointing",
    "lora+offload",
    "lora+momentum",
    "meft1",
    "meft2",
    "meft3",
    "momentum",
)
"""What `meft estimate --method all` compares."""
NAMED = f"{', '.join(METHODS)}; {', '.join(PLAIN_METHODS)} also on a reversible backbone, as lora+momentum"
"""The ways to train in words, for help."""
# Under its older name it is deprecated in Transformers 5.23.
_CHECKPOINT = next(
    name
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    if hasattr(PreTrainedModel, name)
)
_UNDER = frozenset(options_of(FUNCTION)) - {"coupling"}


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        method: its row in the table of methods.
        under: the coupling put under the method by `meft.make_reversible`, or None.
        around: "checkpointing", "offload", or None.
        options: the options that were given (`meft.options`), of the method and of the coupling, by name.
    """

    method: Method
    under: str | None
    around: str | None
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return "+".join(filter(None, (self.method.name, self.under, self.around)))

    @property
    def coupled(self) -> bool:
        """Whether its layers are reversible."""
        return (self.under or self.method.coupling) is not None

    def takes(self, name: str) -> bool:
        """Whether an option means something to it."""
        option = options_of(METHOD)[name]
        if self.under is not None and self.of_coupling(name):
            return option.means_something(self.under)
        return option.means_something(self.method.name)

    def of_coupling(self, name: str) -> bool:
        """Whether an option goes to the coupling under the method."""
        return self.under is not None and name in _UNDER

    def apply(self, model: PreTrainedModel, task_type: str | None) -> nn.Module:
        """Makes a model trainable in this way; the model passed in is changed.

        Args:
            model: with its task head.
            task_type: PEFT's, or a name of `meft.loading.TASK_MODELS` that PEFT does not know.

        Raises:
            ConfigError: an option is not valid.
            UnsupportedModelError: the model cannot be trained so.
        """
        own, coupling = self._split()
        if task_type is not None and task_type not in TaskType.__members__:
            # Under a name that PEFT does not know it would not train the head.
            task_type = "FEATURE_EXTRACTION"
            if self.takes("modules_to_save"):
                own.setdefault("modules_to_save", _heads(model))
        if self.around == CHECKPOINTING and not model.supports_gradient_checkpointing:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no gradient checkpointing. Choose another method than {self.name}."
            )
        check_modules_to_save(model, own.get("modules_to_save"), task_type)
        with as_it_was_if_refused(model):
            if self.under is not None:
                # Tried first, so that what is refused has the names that the model has without adapters.
                with layer_drop_unsaid():
                    restore(make_reversible(model, coupling=self.under, **coupling))
            trained = self.method.make(model, task_type, MethodOptions(**own))
            if self.around == CHECKPOINTING:
                getattr(model, _CHECKPOINT)({"use_reentrant": False})
            if self.under is not None:
                make_reversible(trained, coupling=self.under, **coupling)
        return trained

    def surroundings(self) -> AbstractContextManager[Any]:
        """What a forward pass in training runs in."""
        if self.around == OFFLOAD:
            return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
        return nullcontext()

    def code(self, task_type: str) -> str:
        """The lines of Python that train in this way."""
        own, coupling = self._split()
        task = f'"{task_type}"' if task_type in TaskType.__members__ else "None"
        lines = [self.method.code(task, own)]
        if self.under is not None:
            words = ["model", f'coupling="{self.under}"', *as_code(coupling)]
            lines.append(f"meft.make_reversible({', '.join(words)})")
        if self.around == CHECKPOINTING:
            lines.append(f'base.{_CHECKPOINT}({{"use_reentrant": False}})')
        if self.around == OFFLOAD:
            lines.append("with torch.autograd.graph.save_on_cpu(pin_memory=True): loss = model(**batch).loss")
        return "\n".join(lines)

    def _split(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The options of the method, and those of the coupling under it."""
        under = {name: value for name, value in self.options.items() if self.of_coupling(name) and self.takes(name)}
        return {name: value for name, value in self.options.items() if not self.of_coupling(name)}, under


def read_way(name: str, options: Mapping[str, Any] | None = None) -> Way:
    """Reads the name of a way to train, and its options.

    Example:
        >>> read_way("lora+momentum", {"lora_rank": 16, "gamma": 1 / 64}).under
        'momentum'

    Args:
        name: one of `WAYS`.
        options: of the table (`meft.options`), by name; None leaves an option out, unless it is a value like others.

    Raises:
        ConfigError: there is no such way, or an option is unknown, not valid, or means nothing to it.
    """
    base, _, extra = str(name).partition("+")
    if name not in WAYS:
        raise ConfigError(f"method is {name!r}{_advice(base, extra)}")
    known = options_of(METHOD)
    unknown = sorted(set(options or ()) - set(known))
    if unknown:
        raise ConfigError(f"Unknown option {unknown[0]!r}; the options of a method are {', '.join(known)}.")
    # None is a value where it is not the default, as that of tile_size; elsewhere it leaves an option out.
    given = {
        name: value
        for name, value in (options or {}).items()
        if value is not UNSET
        and (value is not None or (known[name].none is not None and known[name].default is not None))
    }
    for option, value in given.items():
        known[option].check(value)
    under = extra if extra in COUPLINGS else None
    way = Way(METHODS[base], under, extra if extra in AROUND else None, given)
    for option, value in given.items():
        if not way.takes(option) and not known[option].shared and known[option].given(value):
            raise _needless(way, known[option], value)
    return way


def own_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that mean something to a way to train: of several ways, each takes its own."""
    way = read_way(name)
    return {option: value for option, value in options.items() if option not in options_of(METHOD) or way.takes(option)}


def apply_method(model: PreTrainedModel, method: str, *, task_type: str | None, **options: Any) -> nn.Module:
    """Makes `model` trainable in the way called `method`; the model passed in is changed.

    Example:
        >>> model = AutoModelForSequenceClassification.from_pretrained("roberta-base")
        >>> model = apply_method(model, "lora+momentum", task_type="SEQ_CLS", lora_rank=16)
        >>> trainable, total = count_parameters(model)

    Args:
        model: A Transformers model with its task head.
        method: One of `WAYS`: a method (`METHODS` says what each trains), or a method and what is put under or around
            it: `lora+momentum` is LoRA on a reversible backbone, `lora+checkpointing` on a checkpointed one.
        task_type: PEFT's task type, `"SEQ_CLS"` for example; it decides which head is trained in full.
        **options: Of the method and the coupling (`meft.options`).

    Returns:
        For `"full"` and `"bitfit"` the model itself, which is saved whole as any model is; otherwise the `PeftModel`
        around it.

    Raises:
        ConfigError: The method or an option is unknown, or the option does not belong to the method.
        UnsupportedModelError: The model has no stack of transformer layers, or lacks what the method trains.
    """
    return read_way(method, options).apply(model, task_type)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Counts `(trainable, total)` parameters; a tensor shared by two modules counts once.

    The total contains the parameters that the method added. PEFT's copies of modules that it trains in full are
    counted with it, as `print_trainable_parameters` does.
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _advice(base: str, extra: str) -> str:
    method = METHODS.get(base)
    if method is not None and method.saves is not None and not method.plain and extra in COUPLINGS:
        return f", but the adapters of meft are coupled by their own method. Give {extra!r} instead."
    uncoupled = [name for name, row in METHODS.items() if row.coupling is None]
    return (
        f"; it must be one of {', '.join(METHODS)}; {', '.join(PLAIN_METHODS)} may stand on a reversible backbone "
        f"(+{', +'.join(COUPLINGS)}: lora+momentum), and {', '.join(uncoupled)} may be followed by "
        f"+{' or +'.join(AROUND)}."
    )


def _needless(way: Way, option: Option, value: Any) -> ConfigError:
    methods = option.methods or ()
    under = next((name for name in methods if name in COUPLINGS), None) if option.name in _UNDER else None
    other = "" if under is None or not way.method.plain else f", or {way.method.name}+{under}"
    return ConfigError(
        f"{option.name} is {value!r}, but method {way.name!r} has no such option; it belongs to {', '.join(methods)}. "
        f"Leave {option.name} out or choose one of those methods{other}."
    )


def _heads(model: PreTrainedModel) -> tuple[str, ...]:
    """The modules of the task head, which a task that PEFT does not know has to name."""
    prefix = model.base_model_prefix
    return tuple(
        name for name, child in model.named_children() if name != prefix and next(child.parameters(), None) is not None
    )
