"""Makes the layer stacks of a model reversible in place, and gives them back unchanged.

This is the only module that changes a model somebody passes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from meft.engine.couplings import OutputRule
from meft.engine.sharding import refuse_sharded
from meft.errors import ConfigError
from meft.loss import attach, detach

from .compilation import uncompiled
from .discovery import Stack, check_module, find_stacks, pretrained_of
from .layers import ReversibleLayer
from .plan import Plan
from .stack import ReversibleStack

logger = logging.get_logger(__name__)


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
    stacks: Sequence[str] | None = None,
    granularity: str = "layer",
    tile_size: int | str | None = "auto",
    fused_loss: bool = True,
    sign: str = "fixed",
) -> nn.Module:
    """Makes every layer stack of a model reversible, in place, without adding anything to train.

    Example:
        >>> model = get_peft_model(base, LoraConfig(...))    # or full fine-tuning: no adapter at all
        >>> meft.make_reversible(model)
        >>> ...                                              # train
        >>> meft.restore(model)                              # an ordinary LoRA model again

    Args:
        model: any module that runs a list of layers; a Transformers model, or one that PEFT has put adapters in, as a
            rule. Only its layer stacks are
            replaced.
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
        stacks: names of the stacks to take, or of modules they lie in ("vision_tower"); None for all. Any ModuleList or
            Sequential of layers can be named, in models that are not of Transformers too ("encoder.blocks").
        granularity: "block" couples the attention and the feed-forward block of a layer in turn, so that only one of
            them is rebuilt at a time (`momentum`, in families whose layers split).
        tile_size: tokens that a feed-forward block is given at once where it is coupled by itself ("block", `meft3`);
            "auto" for a quarter of them from 1024 up, None for all.
        fused_loss: take the cross-entropy of a language model in tiles, so that its logits never exist whole in
            training (`meft.loss`).
        sign: "random" draws the sign of gamma in training, for each sample in each step, so that on average the plain
            model is trained; in evaluation the model is the plain one (`momentum`).

    Returns:
        The model that was passed in. `meft.report(model)` says what was found in it.

    Raises:
        ConfigError: an option is not valid, or the model is reversible already.
        UnsupportedModelError: the model has no layer stack, or one that the coupling cannot take.
    """
    check_module(model, "make_reversible")
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
        granularity=granularity,
        tile_size=tile_size,
        sign=sign,
    )
    refuse_sharded(model)
    taken = find_stacks(model, stacks)
    for stack in taken:
        _refuse_reversible(stack, plan)
    reversible_stacks = [stack.reversible_stack(plan) for stack in taken]
    _install_recording(model)
    name_units(model, taken, reversible_stacks[0], ReversibleLayer.__name__)
    for stack, reversible_stack in zip(taken, reversible_stacks, strict=True):
        prepare_stack(stack, reversible_stack)
        _freeze(stack, reversible_stack)
        for index, layer in enumerate(stack.layers):
            stack.layers[index] = ReversibleLayer(layer, reversible_stack, index)  # type: ignore[assignment]
    if fused_loss:
        reversible_stacks[0].changes.extend(attach(model))
    from meft.stack_report import report  # which runs models, as verification does, and so imports this module

    logger.info(str(report(model)))
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
        for index, layer in enumerate(map(uncompiled, container))
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
        container[index] = layer.replaced
    # PEFT copies a head that it trains, together with what was done to it.
    detach(model)
    return model


def prepare_stack(stack: Stack, reversible_stack: ReversibleStack) -> None:
    """Changes what would go wrong in a reversible stack, and notes it in the reversible_stack for `undo`."""
    if reversible_stack.plan.coupling is None:
        return
    for holder in (stack.parent, stack.config):
        layerdrop = getattr(holder, "layerdrop", 0.0)
        if layerdrop:
            logger.warning_once(
                f"Layer drop ({layerdrop}) skips layers, which a reversible stack cannot: it was set to 0."
            )
            _change(reversible_stack, holder, "layerdrop", 0.0)
    reversible_stack.hooks.append(stack.owner.register_forward_hook(reversible_stack.check_ended))


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
        setattr(target, attribute, before)
    while reversible_stack.hooks:
        reversible_stack.hooks.pop().remove()


def _refuse_reversible(stack: Stack, plan: Plan) -> None:
    """Raises ConfigError, and says what a second conversion would change, if a stack was converted before."""
    wrapped = next((layer for layer in map(uncompiled, stack.layers) if isinstance(layer, ReversibleLayer)), None)
    if wrapped is None:
        return
    name = f"{stack.name} of {type(stack.owner).__name__}"
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
    for layer in stack.layers[: reversible_stack.plan.frozen_layers]:
        for parameter in pretrained_of(layer).parameters():
            if parameter.requires_grad:
                _change(reversible_stack, parameter, "requires_grad", False)


def _change(reversible_stack: ReversibleStack, target: Any, attribute: str, value: Any) -> None:
    reversible_stack.changes.append((target, attribute, getattr(target, attribute)))
    setattr(target, attribute, value)


def _install_recording(model: nn.Module) -> None:
    """Lets Transformers put its output-recording hooks on the layers while it can still find them."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        nested = [child for child in module.modules() if isinstance(child, PreTrainedModel)]
        # Installing on a model installs on the models inside it as well, without looking whether they have them.
        if not any(getattr(child, "_output_capturing_hooks_installed", False) for child in nested):
            maybe_install_capturing_hooks(module)
