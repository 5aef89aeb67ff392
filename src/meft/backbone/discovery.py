"""Finds the layer stacks of a model, and refuses those that no coupling can take."""

from __future__ import annotations

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
from .stack import Container, ReversibleStack

_WIDTH_NAMES = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")


@dataclass(frozen=True)
class Stack:
    """One stack of layers that a model calls in a loop.

    Attributes:
        name: of the ModuleList, as in `model.get_submodule(name)`.
        layers: the list itself, a ModuleList or a Sequential.
        parent: the module that holds the list; as a rule its loop calls the layers.
        owner: the nearest model of Transformers above, or the whole model.
        aliases: the same list under the other names that the model has for it.
        sure: Transformers marks the layers as such, or the user named the list. Any other is taken on trial: if the
            first forward pass does not run it as a stack, its layers run as they are.
    """

    name: str
    layers: Container
    parent: nn.Module
    owner: nn.Module
    aliases: tuple[Stack, ...] = ()
    sure: bool = True

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
        """Width of the hidden state that enters the layers."""
        return self.width(0)

    def width(self, index: int) -> int:
        """Width of the hidden state at a layer."""
        layer = pretrained_of(self.layers[index])
        inside = [size for module in layer.modules() if (size := _norm_width(module)) is not None]
        named = [size for name in _WIDTH_NAMES if isinstance(size := getattr(self.config, name, None), int)]
        for size in (*(size for size in named if size in inside), *_direct_norms(layer), *named):
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
        return order_of([pretrained_of(layer) for layer in self.layers], self.config, self.name)

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
        return ReversibleStack(plan, self.name, type(self.owner).__name__, order, self.layers, self.sure)


def find_stacks(model: nn.Module, chosen: Sequence[str] | None = None) -> list[Stack]:
    """Finds every stack of layers: a list of layers of one kind, outermost ones first.

    Lists that stand inside the layers of a list are taken in its place where their widths show that the hidden state
    changes its shape from one outer layer to the next (the stages of Swin).

    Example:
        >>> [stack.name for stack in find_stacks(BartForConditionalGeneration(config))]
        ['model.encoder.layers', 'model.decoder.layers']

    Args:
        model: any module; a model of Transformers, or one that PEFT has changed, as a rule.
        chosen: names of the stacks to take, or of modules they lie in ("vision_tower"); None for all. Any ModuleList or
            Sequential can be named, whatever it holds.

    Raises:
        UnsupportedModelError: there is none.
        ConfigError: a chosen name is none of the model's, or the model is no module.
    """
    check_module(model, "find_stacks")
    stacks = _merged(_stacks(model, "", model, model))
    if chosen is None:
        if not stacks:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no stack of layers: no ModuleList or Sequential of modules that have a "
                'norm and several linear layers each was found. Name the list of its layers with stacks=["..."], or '
                "train this model without meft."
            )
        return stacks
    names = [stack.name for stack in stacks]
    if isinstance(chosen, str) or not chosen:
        raise ConfigError(f"stacks={chosen!r} is no list of names. Valid: any of {names}, or None for all of them.")
    by_list = {id(stack.layers): replace(stack, sure=True) for stack in stacks}
    named = {name: by_list.get(id(stack.layers), stack) for name in chosen if (stack := _named(model, name))}
    # A list that is named takes the place of those inside it and around it.
    found = [
        stack
        for stack in stacks
        if not any(stack.layers is n.layers or stack.lies_in(n.name) or n.lies_in(stack.name) for n in named.values())
    ]
    for name in chosen:
        if name not in named and not any(stack.lies_in(name) for stack in stacks):
            raise ConfigError(
                f"stacks={list(chosen)!r} asks for {name!r}, but {type(model).__name__} has the stacks {names}. Name "
                "some of these, modules they lie in, or any other ModuleList or Sequential of layers."
            )
    found = [stack for stack in found if any(stack.lies_in(name) for name in chosen)]
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    unlike = {id(stack.layers): stack for stack in (*found, *named.values())}
    return sorted(unlike.values(), key=lambda stack: order[stack.name])


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
    if isinstance(module, PreTrainedModel):
        owner = module
    if isinstance(module, nn.ModuleList | nn.Sequential) and (kind := _kind(module)):
        inner = list(_inside(module, name, owner))
        if not inner or not (_of_changing_width(module, inner) or (kind == "alike" and _only_hold(module, inner))):
            yield Stack(name, module, parent, owner, sure=kind == "marked")
            return
        yield from inner
        return
    yield from _inside(module, name, owner)


def _inside(module: nn.Module, name: str, owner: nn.Module) -> Iterator[Stack]:
    for child_name, child in module.named_children():
        yield from _stacks(inside(child), f"{name}.{child_name}" if name else child_name, module, owner)


def _named(model: nn.Module, name: str) -> Stack | None:
    """The stack that a user names by the full name of a list."""
    owner = parent = module = model
    for part in name.split("."):
        child = module._modules.get(part) if isinstance(module, nn.Module) else None
        if child is None:
            return None
        owner, parent, module = module if isinstance(module, PreTrainedModel) else owner, module, child
    if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
        return None
    if any(layer is None or isinstance(layer, nn.ModuleList | nn.ModuleDict) for layer in module):
        return None
    return Stack(name, module, parent, owner)


def _kind(layers: Container) -> str:
    """Tells a list of layers: "marked" by Transformers, "alike" if it looks like one; empty for any other.

    What looks like a layer has a norm and at least three maps, two of them linear: experts and heads have no norm, and
    projections have fewer maps. Whether it is one shows when the model runs it.
    """
    children = [None if layer is None else inside(layer) for layer in layers._modules.values()]
    if None in children or not children:
        return ""  # a loop over a list with None in it does not run one layer after the other
    if all(map(_is_marked, children)):
        return "" if all(map(_convolutional, children)) else "marked"
    if any(isinstance(layer, nn.ModuleList | nn.ModuleDict | nn.Sequential) for layer in children):
        return ""
    alike = len({type(pretrained_of(layer)) for layer in children}) == 1
    return "alike" if alike and all(map(_looks_like_a_layer, children)) else ""


def _is_marked(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer | ReversibleLayer)


def _looks_like_a_layer(layer: nn.Module) -> bool:
    modules = [module for module in pretrained_of(layer).modules() if not isinstance(module, nn.Embedding)]
    maps = [p.dim() for module in modules for p in module._parameters.values() if p is not None and p.dim() > 1]
    return len(maps) > 2 and maps.count(2) > 1 and any(_norm_width(module) is not None for module in modules)


def _only_hold(layers: Container, inner: Sequence[Stack]) -> bool:
    """Whether the modules of a list are nothing but holders of lists (the groups of ALBERT)."""
    held = {parameter for stack in inner for parameter in stack.layers.parameters()}
    return all(parameter in held for parameter in layers.parameters())


def _of_changing_width(layers: Container, inner: Sequence[Stack]) -> bool:
    """Whether the widths of the lists inside show that the hidden state changes its shape on the way."""
    widths = {frozenset(_direct_norms(pretrained_of(stack.layers[0]))) for stack in inner}
    owners = [pretrained_of(layer) for layer in layers]
    outer = [{size for module in layer.modules() if (size := _norm_width(module))} for layer in owners]
    disjoint = any(sizes and outer[0] and sizes.isdisjoint(outer[0]) for sizes in outer[1:])
    alike = len({type(layer) for layer in owners}) == 1
    return disjoint or (alike and len(widths) > 1 and len(inner) >= len(owners))


def _norm_width(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    if "norm" in type(module).__name__.lower() and isinstance(weight, nn.Parameter) and weight.dim() == 1:
        return weight.numel()
    return None


def _direct_norms(layer: nn.Module) -> list[int]:
    """Widths of a layer's norms; those of its children only if it has none of its own."""
    own = [size for child in layer.children() if (size := _norm_width(child)) is not None]
    return own or [size for module in layer.modules() if (size := _norm_width(module)) is not None]


def _convolutional(layer: nn.Module) -> bool:
    """Tells layers that extract features (Wav2Vec2's convolutions) from those of a transformer."""
    kinds = [module for module in layer.modules() if isinstance(module, nn.Linear | _ConvNd)]
    return bool(kinds) and not any(isinstance(module, nn.Linear) for module in kinds)


def _refuse(layer: nn.Module, name: str) -> None:
    """Refuses a layer that no coupling can take."""
    if layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise UnsupportedModelError(
            f"{name} has forward-pre or backward hooks, which a reversible layer would not run. Remove them before "
            "making the model reversible, and register them afterwards."
        )
