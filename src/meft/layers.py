"""`ReversibleLayer`: what stands in for a pretrained layer in a model's own loop over its layers.

The model goes on calling one layer after the other with masks, positions and caches; each wrapper passes the streams
of the running forward pass through its layer and hands the model the newest stream. The first wrapper of a stack
starts the tape, the last one applies the output rule.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from transformers.utils import logging

from .adapters import Bottleneck, behind, beside
from .architectures import Architecture, feed_forward_of, split_of
from .calls import Block, Call, recording, split_hidden, split_output, without_cache
from .engine import Layer, finish, readout, run_layer
from .errors import UnsupportedModelError
from .segment import Placement, Segment

logger = logging.get_logger(__name__)

__all__ = ["Placement", "ReversibleLayer", "Segment"]


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
        segment = placement.segment
        if segment.plan.coupling is not None or segment.frozen(placement.index):
            self._switch_off_checkpointing()
        self._refuse_replica(placement)
        hidden, args, kwargs = split_hidden(self.pretrained, placement.name, args, kwargs)
        if self.training and torch.is_grad_enabled():
            args, kwargs = without_cache(self.pretrained, placement.name, args, kwargs)
            self._unpack()
        if segment.frozen(placement.index):
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

    def _coupled(self, placement: Placement, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        segment = placement.segment
        tape = segment.tape(placement.index, hidden)
        position = segment.plan.frozen_layers + tape.forward_depth
        reversible = self.training and segment.reversible(position)
        call = Call(args, kwargs, placement.name)
        vet = reversible and torch.is_grad_enabled() and segment.vet(placement.index)
        layer = self._layer(placement, call, hidden, vet=vet)
        state, *further = run_layer(tape, layer, reversible=reversible)
        last = position == segment.depth - 1
        if last:
            state = finish(tape)
            segment.end()
        output = call.output(state, further)
        if self._heard():
            seen = output if last else _with_state(output, readout(tape, inner=True))
            self._tell_hooks(hidden, args, kwargs, seen)
        return output

    def _uncoupled(self, placement: Placement, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The ordinary layer with the same adapters: f beside its feed-forward, g behind the layer."""
        layer = self._whole(placement, placement.f)

        def run(hidden: Tensor) -> Any:
            output = layer(hidden, args, kwargs)
            if placement.g is None:
                return output
            state, _ = split_output(output, hidden, placement.name)
            return _with_state(output, state + placement.g(state))

        if getattr(self.pretrained, "gradient_checkpointing", False):
            # Its own would leave the adapters out of what is run again.
            self.gradient_checkpointing, self.pretrained.gradient_checkpointing = True, False
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(run, hidden)
        return run(hidden)

    def _layer(self, placement: Placement, call: Call, hidden: Tensor, *, vet: bool) -> Layer:
        """Describes this call to the engine: the functions F and G of the coupling's table."""
        coupling = placement.segment.plan.coupling
        assert coupling is not None
        tiles: dict[str, int] = {}
        if coupling.splits:
            # meft3 has adapters in both blocks; momentum has one beside the feed-forward, wherever it is.
            behind_attention, beside_feed_forward = (placement.f, placement.g)
            if coupling.name == "momentum":
                behind_attention, beside_feed_forward = None, placement.f
            split = split_of(self.pretrained, placement.name)
            functions = {
                "F": call.function("F", self._attention(split, behind_attention)),
                "G": call.function("G", self._feed_forward(split, placement, beside_feed_forward), main=False),
            }
            tile = placement.segment.plan.tile(hidden.shape[:-1].numel())
            if tile is not None and not recording() and tokenwise(self.pretrained):
                tiles["G"] = tile
        else:
            whole, other = ("G", "F") if coupling.name == "meft2" else ("F", "G")
            inside, alone = (placement.g, placement.f) if whole == "G" else (placement.f, placement.g)
            functions = {whole: call.function(whole, self._whole(placement, inside))}
            if alone is not None:
                functions[other] = lambda hidden, outside: alone(hidden)
        parameters = tuple(parameter for parameter in self.parameters() if parameter.requires_grad)
        return Layer(functions, parameters, call.outside, (self.pretrained, *self.modules()), tiles, vet)

    def _whole(self, placement: Placement, adapter: Bottleneck | None) -> Block:
        layer, chosen = self.pretrained, placement.segment.plan.feedforward_module
        ends = None if adapter is None else feed_forward_of(layer, placement.name, chosen)

        def block(hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
            # `forward`, not the call: the layer's hooks see the streams' readout instead, once.
            with nullcontext() if ends is None else beside(*ends, adapter, placement.name):
                return layer.forward(hidden, *args, **kwargs)

        return block

    def _attention(self, split: Architecture, adapter: Bottleneck | None) -> Block:
        layer = self.pretrained

        def block(hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
            with behind(layer.get_submodule(split.attention_exit), adapter):
                return split.attention_block(layer, hidden, *args, **kwargs)

        return block

    def _feed_forward(self, split: Architecture, placement: Placement, adapter: Bottleneck | None) -> Block:
        layer, chosen = self.pretrained, placement.segment.plan.feedforward_module

        def block(hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
            with ExitStack() as stack:
                if adapter is not None:
                    ends = feed_forward_of(layer, placement.name, chosen)
                    stack.enter_context(beside(*ends, adapter, placement.name))
                return split.feed_forward_block(layer, hidden)

        return block

    def _heard(self) -> bool:
        """Tells whether a forward hook of the pretrained layer listens; those that record outputs often do not."""
        hooks = self.pretrained._forward_hooks.values()
        return any(recording() or not _records(hook) for hook in hooks)

    def _tell_hooks(self, hidden: Tensor, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Shows the pretrained layer's forward hooks (output recording) the hidden state a user should see."""
        layer = self.pretrained
        for identity, hook in list(layer._forward_hooks.items()):
            if identity in layer._forward_hooks_with_kwargs:
                changed = hook(layer, (hidden, *args), kwargs, output)
            else:
                changed = hook(layer, (hidden, *args), output)
            if changed is not None and changed is not output:
                raise UnsupportedModelError(
                    f"A forward hook on a {type(layer).__name__} returns another output. A reversible stack cannot "
                    "pass that on, since its second stream would not know. Remove the hook."
                )

    def _unpack(self) -> None:
        """Takes back what bitsandbytes does to 4-bit weights evaluated on a CPU: packed ones pass no gradient on."""
        for module in self.modules():
            quantised = getattr(module._parameters.get("weight"), "quant_state", None)
            if getattr(quantised, "packing_format_for_cpu", False):
                # Unpacks the weights of the module itself, as it is always asked to before saving.
                module.state_dict()

    def _switch_off_checkpointing(self) -> None:
        if self.gradient_checkpointing or getattr(self.pretrained, "gradient_checkpointing", False):
            self.gradient_checkpointing = self.pretrained.gradient_checkpointing = False
            logger.warning_once(
                "Gradient checkpointing is redundant on reversible layers, which keep no activations, and was switched "
                "off for them."
            )

    def _refuse_replica(self, placement: Placement) -> None:
        if getattr(self, "_is_replica", False):
            raise UnsupportedModelError(
                f"{placement.name} runs under torch.nn.DataParallel, whose replicas have no parameters of their own to "
                "give gradients to. Use one process a device (accelerate launch, torchrun), or show the process one "
                "device (CUDA_VISIBLE_DEVICES)."
            )


def tokenwise(layer: nn.Module) -> bool:
    """Tells whether a layer's feed-forward block surely acts on each token alone.

    Batch norms and convolutions mix tokens, dropped paths are drawn for whole samples, experts of limited capacity turn
    tokens away, and feed-forwards in chunks of their own want to divide the sequence.
    """
    if getattr(layer, "chunk_size_feed_forward", 0):
        return False
    for module in layer.modules():
        if isinstance(module, _NormBase) or (isinstance(module, _ConvNd) and max(module.kernel_size) > 1):
            return False
        if "DropPath" in type(module).__name__ or hasattr(module, "expert_capacity"):
            return False
    return True


def _with_state(output: Any, state: Tensor) -> Any:
    return state if isinstance(output, Tensor) else type(output)((state, *output[1:]))


def _records(hook: Any) -> bool:
    """Tells whether a forward hook is one with which Transformers records outputs."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
