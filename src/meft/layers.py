"""`ReversibleLayer`: what stands in for a pretrained layer in a model's own loop over its layers.

The model goes on calling one layer after the other with masks, positions and caches; each wrapper passes the streams
of the running forward pass through its layer and hands the model the newest stream. The first wrapper of a stack
starts the tape, the last one applies the output rule. `Segment` is what the wrappers of one stack share.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.utils import logging
from transformers.utils.output_capturing import _active_collector

from .adapters import Bottleneck, behind, beside
from .architectures import feed_forward_of, split_of
from .engine import Function, Layer, Tape, finish, readout, run_layer
from .errors import UnsupportedModelError
from .plan import Plan

logger = logging.get_logger(__name__)

_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")


@dataclass
class Segment:
    """One stack of layers under one plan, and the forward passes running through it.

    Attributes:
        plan: how the stack is run.
        name: the stack's name in the model, for messages.
        model: the model's class, for messages.
        depth: number of layers.
        changes: what conversion changed besides the layers, as (object, attribute, value before).
    """

    plan: Plan
    name: str
    model: str
    depth: int
    changes: list[tuple[Any, str, Any]] = field(default_factory=list)
    _running: dict[int, Tape] = field(default_factory=dict, repr=False)

    def frozen(self, index: int) -> bool:
        return index < self.plan.frozen_layers

    def reversible(self, index: int) -> bool:
        return self.plan.reversible and index < self.depth - self.plan.cached_layers

    def tape(self, index: int, hidden: Tensor) -> Tape:
        """Starts a forward pass at the lowest coupled layer, and finds the running one at the others.

        Raises:
            UnsupportedModelError: the hidden state is not what the layer before returned, or is no float tensor.
        """
        if index == self.plan.frozen_layers:
            return self._start(hidden)
        tape = self._running.get(threading.get_ident())
        if tape is None or tape.forward_depth != index - self.plan.frozen_layers:
            reached = "no layer" if tape is None else f"{self.name}.{tape.forward_depth + self.plan.frozen_layers - 1}"
            raise UnsupportedModelError(
                f"{self.model} called {self.name}.{index} after {reached}, but a reversible stack runs every layer "
                "once, in order. Models that skip or repeat layers cannot be made reversible."
            )
        if not (tape.passed_on(hidden) and _followed(tape, hidden)):
            raise UnsupportedModelError(
                f"{self.model} changes the hidden state between {self.name}.{index - 1} and {self.name}.{index}: layer "
                f"{index} was given another tensor (shape {tuple(hidden.shape)}) than layer {index - 1} returned, or "
                "one modified in place, and what happened in between would be lost in the second stream. Remove the "
                f"hook or code between these layers, or freeze the layers below with frozen_layers={index}."
            )
        return tape

    def end(self) -> None:
        """Forgets the running forward pass; its graph, if any, keeps the tape alive."""
        tape = self._running.pop(threading.get_ident(), None)
        if tape is not None:
            tape.abandon()

    def _start(self, hidden: Tensor) -> Tape:
        self.end()
        if not hidden.is_floating_point():
            raise UnsupportedModelError(
                f"The hidden state of {self.model} that enters {self.name} has dtype {hidden.dtype}. Reversible layers "
                "need float16, bfloat16, float32 or float64. Load the model in one of these."
            )
        assert self.plan.coupling is not None
        tape = Tape(
            self.plan.coupling,
            self.plan.arithmetic,
            hidden,
            drift_tolerance=self.plan.drift_tolerance,
            anchor_every=self.plan.anchor_every,
            name=self.name,
        )
        self._running[threading.get_ident()] = tape
        return tape

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": {}}


@dataclass(frozen=True)
class Placement:
    """One adapter's view of a layer: where the layer stands, and the adapters inside F and G (or None)."""

    segment: Segment
    index: int
    f: Bottleneck | None = None
    g: Bottleneck | None = None


class ReversibleLayer(nn.Module):
    """Stands in for one pretrained layer and runs it as a step of a reversible stack.

    Parameters, buffers and children are the pretrained layer's own, under their own names: state dicts, optimizers
    and adapters put in later see no difference.

    Args:
        layer: the pretrained layer; kept unchanged as `pretrained`.
        segment: the stack it belongs to.
        index: its position there, from 0.
    """

    gradient_checkpointing = False

    def __init__(self, layer: nn.Module, segment: Segment, index: int) -> None:
        super().__init__()
        # Not registered as a child, and the registries shared: names stay what they were.
        self.__dict__["pretrained"] = layer
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            setattr(self, registry, getattr(layer, registry))
        self.training = layer.training
        self._placement = Placement(segment, index)

    def placement(self) -> Placement | None:
        """Where the layer stands and with which adapters; None runs the pretrained layer as it is."""
        return self._placement

    def train(self, mode: bool = True) -> ReversibleLayer:
        self.pretrained.training = mode
        return super().train(mode)

    def __getattr__(self, name: str) -> Any:
        """Some models read attributes of their layers in the loop; the pretrained layer has them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("pretrained", "base_layer", "_modules"):
                raise
            return getattr(self.pretrained, name)

    # A compiler cannot trace the tape, which outlives the call: layers break its graph and run as they are.
    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        placement = self.placement()
        if placement is None:
            return self.pretrained(*args, **kwargs)
        segment, index = placement.segment, placement.index
        if segment.plan.coupling is not None or segment.frozen(index):
            self._switch_off_checkpointing()
        if getattr(self, "_is_replica", False):
            raise UnsupportedModelError(
                f"{segment.name}.{index} of {segment.model} runs under torch.nn.DataParallel, whose replicas have no "
                "parameters of their own to give gradients to. Use one process a device (accelerate launch, torchrun), "
                "or show the process one device (CUDA_VISIBLE_DEVICES)."
            )
        hidden, args, kwargs = _split_hidden(args, kwargs)
        if self.training and torch.is_grad_enabled():
            kwargs = _without_cache(kwargs, segment, index)
        if segment.frozen(index):
            with torch.no_grad():
                return self.pretrained(hidden, *args, **kwargs)
        if segment.plan.coupling is None:
            output = self._uncoupled(placement, hidden, args, kwargs)
            self._tell_hooks(hidden, args, kwargs, output)
            return output
        try:
            return self._coupled(placement, hidden, args, kwargs)
        except BaseException:
            segment.end()
            raise

    def _coupled(self, placement: Placement, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        segment, index = placement.segment, placement.index
        tape = segment.tape(index, hidden)
        layer = self._layer(placement, args, kwargs)
        reversible = self.training and segment.reversible(index)
        output = run_layer(tape, layer, reversible=reversible)
        if reversible:
            _detach_recordings()
        if index == segment.depth - 1:
            output = finish(tape)
            segment.end()
            self._tell_hooks(hidden, args, kwargs, output)
        elif self.pretrained._forward_hooks:
            self._tell_hooks(hidden, args, kwargs, readout(tape))
        return output

    def _uncoupled(self, placement: Placement, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The ordinary layer with the same adapters: f beside its feed-forward, g behind the layer."""
        layer = self._whole(placement, placement.f)

        def run(hidden: Tensor) -> Tensor:
            hidden = layer(hidden, args, kwargs)
            return hidden if placement.g is None else hidden + placement.g(hidden)

        if getattr(self.pretrained, "gradient_checkpointing", False):
            # Its own would leave the adapters out of what is run again.
            self.gradient_checkpointing, self.pretrained.gradient_checkpointing = True, False
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(run, hidden)
        return run(hidden)

    def _layer(self, placement: Placement, args: tuple, kwargs: dict[str, Any]) -> Layer:
        """Describes this call to the engine."""
        leaves, structure = tree_flatten((args, kwargs))
        slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        outside = tuple(leaves[slot] for slot in slots)

        def bound(block: Any) -> Function:
            def function(hidden: Tensor, outside: Sequence[Tensor]) -> Tensor:
                if not slots:
                    return block(hidden, args, kwargs)
                given = list(leaves)
                for slot, tensor in zip(slots, outside, strict=True):
                    given[slot] = tensor
                return block(hidden, *tree_unflatten(given, structure))

            return function

        blocks = {name: bound(block) for name, block in self._blocks(placement).items()}
        parameters = tuple(parameter for parameter in self.parameters() if parameter.requires_grad)
        return Layer(blocks, parameters, outside, (self.pretrained, *self.modules()))

    def _blocks(self, placement: Placement) -> dict[str, Any]:
        """The functions F and G of the coupling's table, each (hidden, args, kwargs) -> hidden."""
        coupling = placement.segment.plan.coupling
        assert coupling is not None
        if coupling.name == "meft3":
            return {"F": self._attention(placement), "G": self._feed_forward(placement)}
        whole, adapter = ("G", "F") if coupling.name == "meft2" else ("F", "G")
        beside_whole, alone = (placement.g, placement.f) if whole == "G" else (placement.f, placement.g)
        blocks: dict[str, Any] = {whole: self._whole(placement, beside_whole)}
        if alone is not None:
            blocks[adapter] = lambda hidden, args, kwargs: alone(hidden)
        return blocks

    def _whole(self, placement: Placement, adapter: Bottleneck | None) -> Any:
        layer, name = self.pretrained, _name(placement)
        ends = None if adapter is None else feed_forward_of(layer, name)

        def block(hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
            # `forward`, not the call: the layer's hooks see the streams' readout instead, once.
            with nullcontext() if ends is None else beside(*ends, adapter):
                return _tensor(layer.forward(hidden, *args, **kwargs), layer, name)

        return block

    def _attention(self, placement: Placement) -> Any:
        layer = self.pretrained
        split = split_of(layer, _name(placement))

        def block(hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
            with behind(layer.get_submodule(split.attention_exit), placement.f):
                return split.attention_block(layer, hidden, *args, **kwargs)

        return block

    def _feed_forward(self, placement: Placement) -> Any:
        layer = self.pretrained
        split = split_of(layer, _name(placement))

        def block(hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
            with ExitStack() as stack:
                if placement.g is not None:
                    stack.enter_context(beside(*feed_forward_of(layer, _name(placement)), placement.g))
                return split.feed_forward_block(layer, hidden)

        return block

    def _tell_hooks(self, hidden: Tensor, args: tuple, kwargs: dict[str, Any], state: Tensor) -> None:
        """Shows the pretrained layer's forward hooks (output recording) the hidden state a user should see."""
        layer = self.pretrained
        for identity, hook in list(layer._forward_hooks.items()):
            if identity in layer._forward_hooks_with_kwargs:
                changed = hook(layer, (hidden, *args), kwargs, state)
            else:
                changed = hook(layer, (hidden, *args), state)
            if changed is not None and changed is not state:
                raise UnsupportedModelError(
                    f"A forward hook on a {type(layer).__name__} returns another output. A reversible stack cannot "
                    "pass that on, since its second stream would not know. Remove the hook."
                )

    def _switch_off_checkpointing(self) -> None:
        if self.gradient_checkpointing or getattr(self.pretrained, "gradient_checkpointing", False):
            self.gradient_checkpointing = self.pretrained.gradient_checkpointing = False
            logger.warning_once(
                "Gradient checkpointing is redundant on reversible layers, which keep no activations, and was switched "
                "off for them."
            )


def _followed(tape: Tape, hidden: Tensor) -> bool:
    """Puts the alias that a hook returned in the place of the visible hidden state; False if it was detached.

    Hooks on the gradient of a layer's output (FSDP, full backward hooks) hang on the alias.
    """
    newest, handles = tape.coupling.newest, list(tape.live_handles())
    if hidden.requires_grad != handles[newest].requires_grad:
        return False
    handles[newest] = hidden
    tape.handles = (handles[0], handles[1])
    return True


def _name(placement: Placement) -> str:
    return f"{placement.segment.name}.{placement.index} of {placement.segment.model}"


def _tensor(output: Any, layer: nn.Module, name: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    raise UnsupportedModelError(
        f"{name}, a {type(layer).__name__}, returns a {type(output).__name__} where a reversible stack needs one "
        "tensor, the hidden state."
    )


def _split_hidden(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _detach_recordings() -> None:
    """Cuts attention weights that Transformers recorded in this layer from the graph of one call they lie in.

    A loss on them would reach the weights of this one layer and no other, without a word; detached, it says so.
    """
    for name, values in (_active_collector.get() or {}).items():
        if name != "hidden_states" and isinstance(values, list) and values and isinstance(values[-1], Tensor):
            values[-1] = values[-1].detach()


def _without_cache(kwargs: dict[str, Any], segment: Segment, index: int) -> dict[str, Any]:
    """Takes the key-value cache out of a training call, as Transformers does under gradient checkpointing."""
    caches = {name: kwargs[name] for name in _CACHE_ARGUMENTS if kwargs.get(name) is not None}
    if not caches and not kwargs.get("use_cache"):
        return kwargs
    for name, cache in caches.items():
        length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        if int(length) > 0:
            raise UnsupportedModelError(
                f"{segment.name}.{index} was called in training with {name} holding {int(length)} tokens (prefix "
                "tuning, or a cache from a generation). A rebuilt layer would read another cache than the original. "
                "Train without a cache."
            )
    logger.warning_once(
        "A key-value cache is of no use in training with reversible layers: use_cache was switched off."
    )
    changed: dict[str, Any] = {**kwargs, **dict.fromkeys(caches)}
    if "use_cache" in changed:
        changed["use_cache"] = False
    return changed
