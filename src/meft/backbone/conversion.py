"""Makes the layer stacks of a model reversible in place, and gives them back unchanged.

This is the only module that changes a model somebody passes in.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import unwrap
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from meft.engine.sharding import refuse_sharded
from meft.errors import ConfigError, MeftWarning
from meft.loss import attach, detach, heads
from meft.options import FUNCTION, checked, option_arguments, plan_options

from .checkpointing import FLAG, inside, is_wrapped, warn_dropped
from .discovery import Stack, check_module, find_stacks, post_norm, pretrained_of
from .experts import unordered
from .layers import ReversibleLayer
from .plan import Plan
from .recording import install_recording
from .refusal import as_it_was_if_refused
from .report import found_in
from .stack import ReversibleStack

logger = logging.get_logger(__name__)


@option_arguments(FUNCTION, positional=("coupling",))
def make_reversible(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Makes every layer stack of a model reversible, in place, without adding anything to train.

    Example:
        >>> model = get_peft_model(base, LoraConfig(...))    # or full fine-tuning: no adapter at all
        >>> meft.make_reversible(model)
        >>> ...                                              # train
        >>> meft.restore(model)                              # an ordinary LoRA model again

    Args:
        model: any module that runs a list of layers, as a rule a Transformers model, or one that PEFT has put adapters
            in. Only its layer stacks are replaced.
        options: those of the table (`meft.options`).

    Returns:
        The model that was passed in. `meft.report(model)` says what was found in it.

    Raises:
        ConfigError: an option is not valid, or the model is reversible already.
        TypeError: there is no such option.
        UnsupportedModelError: the model has no layer stack, or one that the coupling cannot take.
    """
    check_module(model, "make_reversible")
    options = checked(FUNCTION, options)
    planned = {name: options[name] for name in plan_options() if name in options}
    Plan.make(**planned)
    refuse_sharded(model)
    taken = find_stacks(model, options["stacks"])
    plan = Plan.make(**planned, post_norm=post_norm(taken))
    for stack in taken:
        _refuse_reversible(stack, plan)
    with as_it_was_if_refused(model):
        reversible_stacks = [stack.reversible_stack(plan) for stack in taken]
        install_recording(model)
        name_units(model, taken, reversible_stacks[0], ReversibleLayer.__name__)
        prepare_stacks(model, list(zip(taken, reversible_stacks, strict=True)))
        for stack, reversible_stack in zip(taken, reversible_stacks, strict=True):
            wrapped = [index for index, layer in enumerate(stack.layers) if is_wrapped(layer)]
            if wrapped:
                warn_dropped([reversible_stack.layer_name(index) for index in wrapped], stack.layers[wrapped[0]])
            _freeze(stack, reversible_stack)
            for index, layer in enumerate(stack.layers):
                stack.layers[index] = ReversibleLayer(layer, reversible_stack, index)
        if options["fused_loss"]:
            reversible_stacks[0].changes.extend(attach(model))
            reversible_stacks[0].heads.extend(heads(model))
    if logger.isEnabledFor(logging.INFO):
        logger.info(str(found_in(model)))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `make_reversible`, in place: the model gets back its own layers, with the weights as they are now.

    Returns:
        The model that was passed in.

    Raises:
        ConfigError: the model was never made reversible.
    """
    check_module(model, "restore")
    refuse_sharded(model)
    wrapped = [
        (container, index, layer)
        for container in model.modules()
        if isinstance(container, nn.ModuleList | nn.Sequential)
        for index, layer in enumerate(map(inside, container))
        if type(layer) is ReversibleLayer
    ]
    if not wrapped:
        raise ConfigError(
            f"{type(model).__name__} has no layer that make_reversible put there, so there is nothing to restore. Pass "
            "the model that was given to make_reversible; a MEFT adapter is removed by unload()."
        )
    for container, index, layer in wrapped:
        undo(layer._placement.reversible_stack)
        layer.pretrained.training = layer.training
        if layer.gradient_checkpointing and hasattr(layer.pretrained, FLAG):
            # Switched on since, but not met in a forward pass.
            layer.pretrained._gradient_checkpointing_func = layer._gradient_checkpointing_func
            layer.pretrained.gradient_checkpointing = True
        container[index] = layer.replaced
    # PEFT copies a head that it trains, together with what was done to it.
    detach(model)
    return model


def prepare_stacks(model: nn.Module, stacks: Sequence[tuple[Stack, ReversibleStack]]) -> None:
    """Changes what would go wrong in reversible stacks, and notes it in their reversible_stacks for `undo`.

    Warns:
        MeftWarning: layers would have been dropped at random.
    """
    dropped = []
    coupled = [
        (stack, reversible_stack) for stack, reversible_stack in stacks if reversible_stack.plan.coupling is not None
    ]
    for stack, reversible_stack in coupled:
        for place in (stack, *stack.aliases):
            for holder, name in _layer_drops(place):
                dropped.append(f"{name}={getattr(holder, name)!r} of {type(holder).__name__}")
                if not isinstance(holder, nn.Module):
                    _save_as_given(reversible_stack, holder, name)
                _change(reversible_stack, holder, name, 0.0)
        for config, attribute, value in unordered(stack.layers, stack.owner):
            logger.warning(
                f"The experts of {stack} run as {value} instead of eager until the layers are given back: on an "
                "accelerator that adds up in an order of its own, and a reversible layer has to return the same bits "
                f'twice. model.set_experts_implementation("{value}") chooses it yourself.'
            )
            _change(reversible_stack, config, attribute, value)
        owners = {id(place.owner): place.owner for place in (stack, *stack.aliases)}
        for owner in owners.values():
            reversible_stack.hooks.append(owner.register_forward_hook(reversible_stack.check_ended))
            reversible_stack.hooks.append(owner.register_forward_pre_hook(reversible_stack.unwrap))
    for _, reversible_stack in coupled[:1]:
        reversible_stack.hooks.append(model.register_forward_pre_hook(reversible_stack.hear_cache, with_kwargs=True))
    if dropped:
        warnings.warn(
            f"Layer drop ({', '.join(dropped)}) skips layers at random, which a reversible stack cannot: it was set to "
            "0 until the layers are given back. The configuration is saved with the value it had. Set it to 0 yourself "
            "to be rid of this warning.",
            MeftWarning,
            stacklevel=3,
        )


@contextmanager
def layer_drop_unsaid() -> Iterator[None]:
    """For models that nobody handed in, tried or estimated on their own: what is set aside in them is not said."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Layer drop", MeftWarning)
        yield


def _layer_drops(stack: Stack) -> list[tuple[Any, str]]:
    """Where the loop over the layers may read a probability of skipping one: (module or configuration, attribute)."""
    names = {
        "layerdrop",
        *(name for name in unwrap(type(stack.parent).forward).__code__.co_names if "layerdrop" in name),
    }
    config = getattr(stack.parent, "config", None) or stack.config
    holders = {id(holder): holder for holder in (stack.parent, config, stack.config)}.values()
    return [(holder, name) for name in sorted(names) for holder in holders if getattr(holder, name, None)]


def _save_as_given(reversible_stack: ReversibleStack, config: Any, name: str) -> None:
    """Lets a configuration be written with the value that the user gave one of its attributes."""
    given = vars(config).get("to_dict")
    values = {name: getattr(config, name)}
    if isinstance(given, partial):
        values = {**given.keywords["values"], **values}
    else:
        reversible_stack.changes.append((config, "to_dict", None))
    vars(config)["to_dict"] = partial(_as_given, config, values=values)


def _as_given(config: Any, *, values: dict[str, Any]) -> dict[str, Any]:
    """What `config.to_dict()` gave before some of its values were changed."""
    written = type(config).to_dict(config)
    written.pop("to_dict")
    return {**written, **values}


def name_units(model: nn.Module, stacks: Sequence[Stack], reversible_stack: ReversibleStack, wrapper: str) -> None:
    """Lets the model say that wrappers are not to be split, by devices or by FSDP, in place of the layers they hold.

    Args:
        model: the model that is converted.
        stacks: the stacks whose layers get wrappers.
        reversible_stack: where the change is noted for `undo`.
        wrapper: name of the wrappers' class.
    """
    layers = {type(pretrained_of(layer)).__name__ for stack in stacks for layer in stack.layers}
    for module in model.modules():
        names = set(getattr(module, "_no_split_modules", None) or ()) if isinstance(module, PreTrainedModel) else set()
        if names & layers:
            _change(reversible_stack, module, "_no_split_modules", names - layers | {wrapper})


def undo(reversible_stack: ReversibleStack) -> None:
    """Takes back what conversion changed besides the layers."""
    while reversible_stack.changes:
        target, attribute, before = reversible_stack.changes.pop()
        if attribute == "to_dict":
            vars(target).pop(attribute, None)
        else:
            setattr(target, attribute, before)
    while reversible_stack.hooks:
        reversible_stack.hooks.pop().remove()


def _refuse_reversible(stack: Stack, plan: Plan) -> None:
    """Raises ConfigError, and says what a second conversion would change, if a stack was converted before."""
    wrapped = next((layer for layer in map(inside, stack.layers) if isinstance(layer, ReversibleLayer)), None)
    if wrapped is None:
        return
    name = str(stack)
    if type(wrapped) is not ReversibleLayer:
        raise ConfigError(
            f"{name} has a MEFT adapter, which makes it reversible already. Take it out first with "
            "model = model.unload(), or train that adapter as it is: it needs no make_reversible."
        )
    differing = plan.differences(wrapped._placement.reversible_stack.plan)
    change = f"with other options ({differing})" if differing else "with the options of this call"
    raise ConfigError(
        f"{name} is reversible already, {change}. To change them call meft.restore(model) first; otherwise leave the "
        "second make_reversible out, or name other stacks with stacks=[...]."
    )


def _freeze(stack: Stack, reversible_stack: ReversibleStack) -> None:
    """Spares the optimizer parameters that get no gradient; PEFT freezes a base model by itself."""
    for layer in list(stack.layers)[: reversible_stack.plan.frozen_layers]:
        for parameter in pretrained_of(layer).parameters():
            if parameter.requires_grad:
                _change(reversible_stack, parameter, "requires_grad", False)


def _change(reversible_stack: ReversibleStack, target: Any, attribute: str, value: Any) -> None:
    reversible_stack.changes.append((target, attribute, getattr(target, attribute)))
    setattr(target, attribute, value)
