"""Finds the layer stacks of a model, makes them reversible in place, and gives them back unchanged.

This is the only module that changes a model somebody passes in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .architectures import split_of
from .couplings import OutputRule
from .errors import ConfigError, UnsupportedModelError
from .layers import ReversibleLayer, Segment
from .plan import Plan

logger = logging.get_logger(__name__)

_WIDTH_NAMES = ("hidden_size", "d_model", "n_embd", "dim")


@dataclass(frozen=True)
class Stack:
    """One stack of layers that a model calls in a loop.

    Attributes:
        name: of the ModuleList, as in `model.get_submodule(name)`.
        layers: the ModuleList itself.
        parent: the module whose loop calls the layers.
        owner: the nearest model above with a configuration.
    """

    name: str
    layers: nn.ModuleList
    parent: nn.Module
    owner: nn.Module

    @property
    def config(self) -> Any:
        return getattr(self.owner, "config", None)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden state that passes through the layers."""
        for name in _WIDTH_NAMES:
            width = getattr(self.config, name, None)
            if isinstance(width, int):
                return width
        raise UnsupportedModelError(
            f"The width of {self.name} in {type(self.owner).__name__} is not known: its configuration has none of "
            f"{', '.join(_WIDTH_NAMES)}."
        )

    def segment(self, plan: Plan) -> Segment:
        """Describes this stack under a plan, and refuses what the plan cannot do with it."""
        plan.check_depth(f"{self.name} of {type(self.owner).__name__}", len(self.layers))
        model = type(self.owner).__name__
        for index, layer in enumerate(self.layers):
            pretrained = pretrained_of(layer)
            if plan.coupling is not None and plan.coupling.name == "meft3":
                split_of(pretrained, f"{self.name}.{index} of {model}")
            if pretrained._forward_pre_hooks or pretrained._backward_hooks or pretrained._backward_pre_hooks:
                raise UnsupportedModelError(
                    f"{self.name}.{index} of {model} has forward-pre or backward hooks, which a reversible layer would "
                    "not run. Remove them before making the model reversible, and register them afterwards."
                )
        return Segment(plan, self.name, model, len(self.layers))


def find_stacks(model: nn.Module) -> list[Stack]:
    """Finds every stack of layers: a ModuleList of layers that Transformers could checkpoint, outermost ones only.

    Raises:
        UnsupportedModelError: there is none.
    """
    stacks = list(_stacks(model, "", model, model))
    if not stacks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no stack of layers: no ModuleList of Transformers layers "
            "(GradientCheckpointingLayer) was found. Pass a model of the Transformers library."
        )
    return stacks


def make_reversible(
    model: nn.Module,
    coupling: str = "momentum",
    *,
    gamma: float | None = None,
    lam: float | None = None,
    beta: float | None = None,
    output: OutputRule | None = None,
    arithmetic: str = "exact",
    backward: str = "reversible",
    fraction_bits: int = 16,
    frozen_layers: int = 0,
    cached_layers: int = 0,
    drift_tolerance: float = 1e-2,
    anchor_every: int | None = None,
) -> nn.Module:
    """Makes every layer stack of a model reversible, in place, without adding anything to train.

    Example:
        >>> model = get_peft_model(base, LoraConfig(...))    # or full fine-tuning: no adapter at all
        >>> meft.make_reversible(model)
        >>> ...                                              # train
        >>> meft.restore(model)                              # an ordinary LoRA model again

    Args:
        model: a Transformers model, or one that PEFT has put adapters in. Only its layer stacks are replaced.
        coupling: "momentum", "meft1", "meft2" or "meft3", without the adapters the latter have in `MeftConfig`.
        gamma: factor of `momentum`; None for 1/4.
        lam: factor of the first stream of the others; None for the coupling's own.
        beta: factor of their second stream; None for the coupling's own.
        output: how the last streams are read; None for the coupling's own.
        arithmetic: "exact" rebuilds activations bit for bit; "float" does not.
        backward: "reversible" rebuilds activations; "cached" keeps them, the reference.
        fraction_bits: binary places of exact streams, 4 to 24.
        frozen_layers: lowest layers of each stack that run without any backward pass; their parameters are set not
            to require gradients until `restore`.
        cached_layers: highest layers of each stack that keep their activations.
        drift_tolerance: relative error of rebuilt streams past which float arithmetic warns.
        anchor_every: keep the streams every so many layers and restart the reconstruction there, for kernels that are
            not deterministic; the integrity check then warns past `drift_tolerance` instead of raising.

    Returns:
        The model that was passed in.

    Raises:
        ConfigError: an option is not valid, or the model is reversible already.
        UnsupportedModelError: the model has no layer stack, or one that the coupling cannot take.
    """
    plan = Plan.make(
        coupling=coupling,
        lam=lam,
        beta=beta,
        gamma=gamma,
        output=output,
        arithmetic=arithmetic,
        backward=backward,
        fraction_bits=fraction_bits,
        frozen_layers=frozen_layers,
        cached_layers=cached_layers,
        drift_tolerance=drift_tolerance,
        anchor_every=anchor_every,
    )
    stacks = find_stacks(model)
    for stack in stacks:
        if any(isinstance(layer, ReversibleLayer) for layer in stack.layers):
            raise ConfigError(
                f"{stack.name} of {type(stack.owner).__name__} is reversible already. Call meft.restore(model) first, "
                "or unload the MEFT adapter."
            )
    segments = [stack.segment(plan) for stack in stacks]
    _install_recording(model)
    for stack, segment in zip(stacks, segments, strict=True):
        prepare_stack(stack, segment)
        _freeze(stack, segment)
        for index, layer in enumerate(stack.layers):
            stack.layers[index] = ReversibleLayer(layer, segment, index)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `make_reversible`, in place: the model gets back its own layers, with the weights as they are now.

    Returns:
        The model that was passed in.

    Raises:
        ConfigError: the model was never made reversible.
    """
    wrapped = [
        (container, index, layer)
        for container in model.modules()
        if isinstance(container, nn.ModuleList)
        for index, layer in enumerate(container)
        if type(layer) is ReversibleLayer
    ]
    if not wrapped:
        raise ConfigError(
            f"{type(model).__name__} has no layer that make_reversible put there, so there is nothing to restore. Pass "
            "the model that was given to make_reversible; a MEFT adapter is removed by unload()."
        )
    for container, index, layer in wrapped:
        undo(layer._placement.segment)
        layer.pretrained.training = layer.training
        container[index] = layer.pretrained
    return model


def prepare_stack(stack: Stack, segment: Segment) -> None:
    """Changes what would go wrong in a reversible stack, and notes it in the segment for `undo`."""
    layerdrop = getattr(stack.parent, "layerdrop", 0.0)
    if layerdrop and segment.plan.coupling is not None:
        logger.warning_once(f"Layer drop ({layerdrop}) skips layers, which a reversible stack cannot: it was set to 0.")
        _change(segment, stack.parent, "layerdrop", 0.0)


def undo(segment: Segment) -> None:
    """Takes back what conversion changed besides the layers."""
    while segment.changes:
        target, attribute, before = segment.changes.pop()
        setattr(target, attribute, before)


def _freeze(stack: Stack, segment: Segment) -> None:
    """Spares the optimizer parameters that get no gradient; PEFT freezes a base model by itself."""
    for layer in stack.layers[: segment.plan.frozen_layers]:
        for parameter in pretrained_of(layer).parameters():
            if parameter.requires_grad:
                _change(segment, parameter, "requires_grad", False)


def pretrained_of(layer: nn.Module) -> nn.Module:
    """Returns the pretrained layer that a wrapper stands in for, or the layer itself."""
    return layer.pretrained if isinstance(layer, ReversibleLayer) else layer


def _change(segment: Segment, target: Any, attribute: str, value: Any) -> None:
    segment.changes.append((target, attribute, getattr(target, attribute)))
    setattr(target, attribute, value)


def _stacks(module: nn.Module, name: str, parent: nn.Module, owner: nn.Module) -> Iterator[Stack]:
    if isinstance(module, nn.ModuleList) and len(module):
        if all(isinstance(layer, GradientCheckpointingLayer | ReversibleLayer) for layer in module):
            yield Stack(name, module, parent, owner)
            return
    elif isinstance(module, PreTrainedModel):
        owner = module
    for child_name, child in module.named_children():
        yield from _stacks(child, f"{name}.{child_name}" if name else child_name, module, owner)


def _install_recording(model: nn.Module) -> None:
    """Lets Transformers put its output-recording hooks on the layers while it can still find them."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        nested = [child for child in module.modules() if isinstance(child, PreTrainedModel)]
        # Installing on a model installs on the models inside it as well, without looking whether they have them.
        if not any(getattr(child, "_output_capturing_hooks_installed", False) for child in nested):
            maybe_install_capturing_hooks(module)
