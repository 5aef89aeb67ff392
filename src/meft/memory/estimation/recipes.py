"""The ways to train whose memory `meft.estimate` predicts: a method, and what is put under or around it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from meft.backbone.conversion import layer_drop_unsaid, make_reversible
from meft.engine.couplings import COUPLINGS
from meft.errors import ConfigError, UnsupportedModelError
from meft.methods.registry import COUPLED_METHODS, METHODS, PLAIN_METHODS, MethodOptions, apply_method, check_method
from meft.options import FUNCTION, METHOD, options_of

from .blueprint import IMAGES
from .fake import offloaded

CHECKPOINTING, OFFLOAD = "checkpointing", "offload"
_EXTRAS = (CHECKPOINTING, OFFLOAD, *COUPLINGS)
RECIPES = (
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
"""What `--method all` compares."""
_COUPLING_OPTIONS = frozenset(options_of(FUNCTION)) - {"coupling"}


@dataclass(frozen=True)
class Recipe:
    """A way to train.

    Attributes:
        method: one of `meft.methods.registry.METHODS`.
        extra: "checkpointing" (gradient checkpointing of the layers), "offload" (what is saved for the backward pass
            lies on the host), a coupling put under the method by `meft.make_reversible`, or None.
        options: options of the method (`meft.methods.registry.MethodOptions`) and of the coupling, by name.
    """

    method: str
    extra: str | None
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.method if self.extra is None else f"{self.method}+{self.extra}"

    @property
    def coupled(self) -> bool:
        """Whether its layers are reversible."""
        return self.method in COUPLED_METHODS or self.extra in COUPLINGS

    @layer_drop_unsaid()
    def apply(self, model: PreTrainedModel, task_type: str) -> nn.Module:
        """Makes a model trainable in this way; the model passed in is changed.

        Raises:
            ConfigError: an option is not valid.
            UnsupportedModelError: the model cannot be trained so.
        """
        method_options, coupling_options = self._split()
        if task_type == IMAGES:  # PEFT has no name for it, under which it would train the head
            task_type = "FEATURE_EXTRACTION"
            if self.method != "full":
                method_options.setdefault("modules_to_save", _heads(model))
        trained = apply_method(model, self.method, task_type=task_type, **method_options)
        if self.extra == CHECKPOINTING:
            if not model.supports_gradient_checkpointing:
                raise UnsupportedModelError(
                    f"{type(model).__name__} has no gradient checkpointing. Choose another method than {self.name}."
                )
            # Under its older name it is deprecated in Transformers 5.23.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        elif self.extra in COUPLINGS:
            make_reversible(trained, coupling=self.extra, **coupling_options)
        return trained.train()

    def own_options(self) -> dict[str, Any]:
        """Those of the options that mean something to this way to train."""
        return {
            name: value
            for name, value in self.options.items()
            if _takes(self.method, name, value)
            or (self.extra in COUPLINGS and name in _COUPLING_OPTIONS and _takes(self.extra, name, value))
        }

    def surroundings(self) -> AbstractContextManager[Any]:
        """What the forward pass runs in."""
        return offloaded() if self.extra == OFFLOAD else nullcontext()

    def code(self, task_type: str) -> str:
        """The lines of Python that train in this way."""
        method_options, coupling_options = self._split()
        peft_task = "None" if task_type == IMAGES else repr(task_type).replace("'", '"')
        if self.method in COUPLED_METHODS:
            words = [f"task_type={peft_task}", f'coupling="{self.method}"', *_words(method_options)]
            return f"model = get_peft_model(base, meft.MeftConfig({', '.join(words)}))"
        lines = []
        if self.method == "lora":
            defaults = MethodOptions()
            rank = method_options.get("lora_rank", defaults.lora_rank)
            alpha = method_options.get("lora_alpha", defaults.lora_alpha)
            words = [f"task_type={peft_task}", f"r={rank}", f"lora_alpha={alpha}", 'target_modules="all-linear"']
            lines.append(f"model = get_peft_model(base, LoraConfig({', '.join(words)}))")
        elif self.method == "ia3":
            lines.append(f"model = get_peft_model(base, IA3Config(task_type={peft_task}))")
        elif self.method == "bitfit":
            lines.append(f'model = apply_method(base, "bitfit", task_type={peft_task})  # of meft.methods.registry')
        elif self.method == "adapter":
            words = [f"task_type={peft_task}", 'coupling="adapter"', *_words(method_options)]
            lines.append(f"model = get_peft_model(base, meft.MeftConfig({', '.join(words)}))")
        else:
            lines.append("model = base")
        if self.extra in COUPLINGS:
            words = ["model", f'coupling="{self.extra}"', *_words(coupling_options)]
            lines.append(f"meft.make_reversible({', '.join(words)})")
        elif self.extra == CHECKPOINTING:
            lines.append('base.gradient_checkpointing_enable({"use_reentrant": False})')
        elif self.extra == OFFLOAD:
            lines.append("with torch.autograd.graph.save_on_cpu(pin_memory=True): loss = model(**batch).loss")
        return "\n".join(lines)

    def _split(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The options of the method, and those of the coupling under it."""
        if self.extra not in COUPLINGS:
            return dict(self.options), {}
        under = {name: value for name, value in self.options.items() if name in _COUPLING_OPTIONS}
        return {name: value for name, value in self.options.items() if name not in _COUPLING_OPTIONS}, under


def read_recipe(method: str, options: Mapping[str, Any]) -> Recipe:
    """Reads the name of a way to train: a method, or a method and what is put under or around it, joined by "+".

    Example:
        >>> read_recipe("lora+momentum", {"lora_rank": 16}).extra
        'momentum'

    Raises:
        ConfigError: there is no such way, or no such option.
    """
    base, _, extra = method.partition("+")
    coupled_twice = base in COUPLED_METHODS and extra != ""
    if base not in METHODS or (extra and extra not in _EXTRAS) or coupled_twice or method.endswith("+"):
        raise ConfigError(
            f"method is {method!r}; it must be one of {', '.join(METHODS)}, and all but the last four may "
            f"be followed by +{', +'.join((CHECKPOINTING, OFFLOAD))}, {', '.join(PLAIN_METHODS)} by "
            f"+{', +'.join(COUPLINGS)}."
        )
    if base == "adapter" and extra in COUPLINGS:
        raise ConfigError(
            f"method is {method!r}, but the adapters of meft are coupled by their own method. Give {extra!r} instead."
        )
    known = options_of(METHOD)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"Unknown option {unknown[0]!r}; the options of a method are {', '.join(known)}.")
    # None is a value where it is not the default, as that of tile_size; elsewhere it leaves an option out.
    given = {
        name: value
        for name, value in options.items()
        if value is not None or (known[name].none is not None and known[name].default is not None)
    }
    for name, value in given.items():
        known[name].check(value)
    return Recipe(base, extra or None, given)


def _takes(method: str, name: str, value: Any) -> bool:
    try:
        check_method(method, MethodOptions(**{name: value}))
    except ConfigError:
        return False
    return True


def _words(options: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value!r}" for name, value in options.items()]


def _heads(model: PreTrainedModel) -> tuple[str, ...]:
    """The modules of the task head, which a task that PEFT does not know has to name."""
    prefix = model.base_model_prefix
    return tuple(
        name for name, child in model.named_children() if name != prefix and next(child.parameters(), None) is not None
    )
