"""Finds the layer stacks of a model, and refuses those that no coupling can take."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from meft.errors import ConfigError, UnsupportedModelError

from .architectures import ends_in_norm, split_of
from .architectures.repeats import order_of
from .checkpointing import inside
from .layers import ReversibleLayer
from .plan import Plan
from .stack import ReversibleStack

_WIDTH_NAMES = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")

# Layers of Transformers that are called in a loop like all the others, but are not of the class that marks them.
_UNMARKED = {
    "transformers.models.albert.modeling_albert.AlbertLayer",
    "transformers.models.cpmant.modeling_cpmant.CpmAntTransformerBlock",
    "transformers.models.ctrl.modeling_ctrl.EncoderLayer",
    "transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseLayer",
    "transformers.models.ibert.modeling_ibert.IBertLayer",
    "transformers.models.mpnet.modeling_mpnet.MPNetLayer",
    "transformers.models.openai.modeling_openai.Block",
}

# What carries a state from token to token beside the hidden state (state-space models, gated recurrences, linear
# attention, short convolutions), by the name of its class, or by what its code asks of a cache.
_RECURRENT = re.compile("Mamba|Rwkv|Recurrent|Rglru|LSTM|GatedDelta|ShortConv|LightningAttention|LinearAttention")
_RECURRENT_STATE = re.compile("(get_|update_)?(conv|ssm|recurrent|rnn)_states?")


@dataclass(frozen=True)
class Stack:
    """One stack of layers that a model calls in a loop.

    Attributes:
        name: of the ModuleList, as in `model.get_submodule(name)`.
        layers: the ModuleList itself.
        parent: the module whose loop calls the layers.
        owner: the nearest model above with a configuration.
        aliases: the same list under the other names that the model has for it.
    """

    name: str
    layers: nn.ModuleList
    parent: nn.Module
    owner: nn.Module
    aliases: tuple[Stack, ...] = ()

    def __str__(self) -> str:
        """The stack as messages name it."""
        return f"{self.name} of {type(self.owner).__name__}"

    def layer_name(self, index: int) -> str:
        """One of its layers as messages name it."""
        return f"{self.name}.{index} of {type(self.owner).__name__}"

    @property
    def config(self) -> Any:
        return getattr(self.owner, "config", None)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden state that passes through the layers."""
        inside = [size for module in self.layers[0].modules() if (size := _norm_width(module)) is not None]
        named = [size for name in _WIDTH_NAMES if isinstance(size := getattr(self.config, name, None), int)]
        for size in (*(size for size in named if size in inside), *_direct_norms(self.layers[0]), *named):
            return size
        raise UnsupportedModelError(
            f"The width of {self} is not known: its layers have no norm, and its "
            f"configuration has none of {', '.join(_WIDTH_NAMES)}."
        )

    def lies_in(self, name: str) -> bool:
        """Tells whether a name is this stack's, or that of a module that it lies in."""
        return any(f".{name}." in f".{place.name}." for place in (self, *self.aliases))

    @property
    def order(self) -> tuple[int, ...]:
        """Index of the layer that each call of a forward pass runs."""
        return order_of(nn.ModuleList(map(pretrained_of, self.layers)), self.config, self.name)

    def reversible_stack(self, plan: Plan) -> ReversibleStack:
        """Describes this stack under a plan, and refuses what the plan cannot do with it."""
        order = self.order
        plan.check_depth(str(self), len(order))
        if plan.frozen_layers and len(order) != len(self.layers):
            raise ConfigError(
                f"frozen_layers={plan.frozen_layers} cannot be had in {self}, which runs "
                f"{len(self.layers)} layers {len(order)} times: the frozen ones are also the others. Use "
                "frozen_layers=0."
            )
        for index, layer in enumerate(self.layers):
            pretrained = pretrained_of(layer)
            name = self.layer_name(index)
            if plan.coupling is not None:
                _refuse(pretrained, name)
                if plan.coupling.splits:
                    asked = 'coupling="meft3"' if plan.coupling.name == "meft3" else 'granularity="block"'
                    split_of(pretrained, name, asked)
        self._refuse_widths()
        return ReversibleStack(plan, self.name, type(self.owner).__name__, order, self.layers)

    def _refuse_widths(self) -> None:
        layers = [pretrained_of(layer) for layer in self.layers]
        widths = [{size for module in layer.modules() if (size := _norm_width(module))} for layer in layers]
        for index in range(1, len(layers)):
            # Layers of one width may have other norms besides; of different widths they share none.
            if widths[index] and widths[0] and widths[index].isdisjoint(widths[0]):
                raise UnsupportedModelError(
                    f"{self.layer_name(index)} has width {_direct_norms(layers[index])[0]}, but {self.name}.0 "
                    f"has {_direct_norms(layers[0])[0]}. The streams of a reversible stack are added, so its layers "
                    "must all have one width. Leave this stack out with stacks=[...]."
                )


def find_stacks(model: nn.Module, chosen: Sequence[str] | None = None) -> list[Stack]:
    """Finds every stack of layers: a ModuleList of layers that Transformers could checkpoint, outermost ones only.

    Example:
        >>> [stack.name for stack in find_stacks(BartForConditionalGeneration(config))]
        ['model.encoder.layers', 'model.decoder.layers']

    Args:
        model: a Transformers model, or one that PEFT has changed.
        chosen: names of the stacks to take, or of modules they lie in ("vision_tower"); None for all.

    Raises:
        UnsupportedModelError: there is none.
        ConfigError: a chosen name is none of the model's, or the model is no module.
    """
    check_module(model, "find_stacks")
    stacks = _merged(_stacks(model, "", model, model))
    if not stacks:
        recurrent = next((module for module in model.modules() if _recurrent(module)), None)
        if recurrent is not None:
            raise _recurrent_error(f"{type(model).__name__}", recurrent)
        raise UnsupportedModelError(
            f"{type(model).__name__} has no stack of layers: no ModuleList of Transformers layers "
            "(GradientCheckpointingLayer) was found. Pass a model of the Transformers library."
        )
    if chosen is None:
        return stacks
    names = [stack.name for stack in stacks]
    if isinstance(chosen, str) or not chosen:
        raise ConfigError(f"stacks={chosen!r} is no list of names. Valid: any of {names}, or None for all of them.")
    for name in chosen:
        if not any(stack.lies_in(name) for stack in stacks):
            raise ConfigError(
                f"stacks={list(chosen)!r} asks for {name!r}, but {type(model).__name__} has the stacks {names}. Name "
                "some of these, or modules they lie in."
            )
    return [stack for stack in stacks if any(stack.lies_in(name) for name in chosen)]


def post_norm(stacks: Sequence[Stack]) -> bool:
    """Tells whether the layers of all stacks end in a norm; what is not known counts as not.

    A model is taken as a whole: factors that are right for pre-norm layers keep post-norm ones near their start too.
    """
    return all(ends_in_norm(pretrained_of(stack.layers[-1]), stack.hidden_size) for stack in stacks)


def check_module(model: Any, function: str) -> None:
    """Raises ConfigError if something else than a module was passed as the model."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{function} was given a {type(model).__name__} ({model!r:.60}) as its model. Valid is a torch.nn.Module: "
            "a model of Transformers (AutoModel...from_pretrained), or one that PEFT has put adapters in."
        )


def pretrained_of(layer: nn.Module) -> nn.Module:
    """Returns the pretrained layer that a wrapper of any kind stands in for, or the layer itself."""
    layer = inside(layer)
    return layer.pretrained if isinstance(layer, ReversibleLayer) else layer


def _merged(found: Iterator[Stack]) -> list[Stack]:
    """One stack for each list of layers, by the first of its names; a model may hold it under several."""
    by_list: dict[int, list[Stack]] = {}
    for stack in found:
        by_list.setdefault(id(stack.layers), []).append(stack)
    return [replace(first, aliases=tuple(others)) for first, *others in by_list.values()]


def _stacks(module: nn.Module, name: str, parent: nn.Module, owner: nn.Module) -> Iterator[Stack]:
    if isinstance(module, nn.ModuleList) and len(module):
        if all(_is_layer(inside(layer)) for layer in module) and not all(map(_convolutional, module)):
            yield Stack(name, module, parent, owner)
            return
    elif isinstance(module, PreTrainedModel):
        owner = module
    for child_name, child in module.named_children():
        yield from _stacks(child, f"{name}.{child_name}" if name else child_name, module, owner)


def _norm_width(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    if "norm" in type(module).__name__.lower() and isinstance(weight, nn.Parameter) and weight.dim() == 1:
        return weight.numel()
    return None


def _direct_norms(layer: nn.Module) -> list[int]:
    """Widths of a layer's norms; those of its children only if it has none of its own."""
    own = [size for child in layer.children() if (size := _norm_width(child)) is not None]
    return own or [size for module in layer.modules() if (size := _norm_width(module)) is not None]


def _is_layer(module: nn.Module) -> bool:
    cls = type(module)
    return isinstance(module, GradientCheckpointingLayer | ReversibleLayer) or (
        f"{cls.__module__}.{cls.__qualname__}" in _UNMARKED
    )


def _convolutional(layer: nn.Module) -> bool:
    """Tells layers that extract features (Wav2Vec2's convolutions) from those of a transformer."""
    kinds = [module for module in layer.modules() if isinstance(module, nn.Linear | _ConvNd)]
    return bool(kinds) and not any(isinstance(module, nn.Linear) for module in kinds)


def _recurrent(module: nn.Module) -> bool:
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) or _RECURRENT.search(type(module).__name__):
        return True
    own = [cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.")]
    functions = [inspect.unwrap(value) for cls in own for value in vars(cls).values() if inspect.isfunction(value)]
    return any(_RECURRENT_STATE.fullmatch(name) for function in functions for name in function.__code__.co_names)


def _recurrent_error(name: str, module: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} contains a {type(module).__name__}: state-space and recurrent layers carry a state from token to "
        "token beside the hidden state, which a reversible layer does not rebuild. Leave this stack out with "
        "stacks=[...], or fine-tune this model with gradient checkpointing."
    )


def _refuse(layer: nn.Module, name: str) -> None:
    """Refuses a layer that no coupling can take."""
    for module in layer.modules():
        if _recurrent(module):
            raise _recurrent_error(name, module)
    if layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise UnsupportedModelError(
            f"{name} has forward-pre or backward hooks, which a reversible layer would not run. Remove them before "
            "making the model reversible, and register them afterwards."
        )
