"""`ReversibleLayer`: what stands in for a pretrained layer in a model's own loop over its layers.

The model goes on calling one layer after the other with masks, positions and caches; each wrapper passes the streams
of the running forward pass through its layer and hands the model the newest stream. The first wrapper of a stack
starts the tape, the last one applies the output rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from transformers.utils import logging

from meft.engine.engine import Function, LayerCall, finish, readout, run_layer
from meft.engine.replay import RngState
from meft.engine.sharding import check_sharding
from meft.engine.stages import Chain
from meft.errors import ConfigError, UnsupportedModelError

from .adapters import behind, beside
from .architectures import Architecture, feed_forward_of, split_of
from .architectures.stages import Stages
from .calls import (
    Block,
    CallArguments,
    OtherShapeError,
    recording,
    recording_off,
    requiring,
    split_hidden,
    split_output,
    without_cache,
)
from .checkpointing import FLAG, checkpointed, flagged, inside, is_wrapped, unflagged
from .compilation import Compiler, is_compiled, options_around, options_of, run, surrounding, uncompiled, whole
from .foreign import check_transforms
from .patching import Patched
from .recording import records
from .stack import Container, Placement, ReversibleStack
from .staging import chain_of, staged
from .standin import StandIn

logger = logging.get_logger(__name__)

Runner = Callable[[Callable[..., Any], nn.Module, Tensor, tuple[Any, ...], Mapping[str, Any]], Any]
"""Runs (block, layer, hidden state, args, kwargs): `compilation.run` as it is, a `Compiler` compiled."""

__all__ = ["Placement", "ReversibleLayer", "ReversibleStack"]


class ReversibleLayer(StandIn):
    """Stands in for one pretrained layer and runs it as a step of a reversible stack.

    Parameters, buffers and children are the pretrained layer's own, under their own names: state dicts, optimizers
    and adapters put in later see no difference. Attributes that are set or deleted here are the pretrained layer's as
    well (`layer.dropout = 0`), and a `forward` that is set is run as a part of the step.

    Args:
        layer: the pretrained layer; kept unchanged as `pretrained`. One that is compiled is compiled here too.
        reversible_stack: the stack it belongs to.
        index: its position there, from 0.
    """

    gradient_checkpointing = False
    compiler: Compiler | None = None

    def __init__(self, layer: nn.Module, reversible_stack: ReversibleStack, index: int) -> None:
        super().__init__()
        options = options_of(uncompiled(layer) if is_wrapped(layer) else layer, reversible_stack.layer_name(index))
        # What `restore` gives back.
        self.__dict__["replaced"] = layer
        layer = inside(layer)
        # Not registered as a child, and the registries shared: names stay what they were.
        self.__dict__["pretrained"] = layer
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            setattr(self, registry, getattr(layer, registry))
        self.training = layer.training
        self._placement = Placement(reversible_stack, index)
        if options is not None:
            self.compile(**options)

    def placement(self) -> Placement | None:
        """Where the layer stands and with which adapters; None runs the pretrained layer as it is."""
        return self._placement

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the functions that are rebuilt, in place, with the options of `torch.compile`.

        Raises:
            UnsupportedModelError: the layer has MEFT adapters.
            ConfigError: the options ask for CUDA graphs, or are not given by name.
        """
        placement = self.placement()
        if placement is None or placement.has_adapters:
            raise UnsupportedModelError(
                f"A layer of {type(self.pretrained).__name__} with MEFT adapters cannot be compiled: hooks place the "
                "adapters, and a compiled program would fix those of its first call. Compile the whole model "
                "(torch.compile(model)), which leaves these layers as they are, or use make_reversible with LoRA."
            )
        if args:
            raise ConfigError(
                f"compile() was given {args[0]!r} by position. The options of torch.compile are named: write "
                'layer.compile(backend="inductor").'
            )
        self.compiler = placement.reversible_stack.compiler(kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # A constant of the trace if a compiler traces this, as part of the model or of a region of its own.
        around = options_around() if torch.compiler.is_compiling() else None
        return self._forward(around, args, kwargs)

    # A compiler cannot trace the tape, which outlives the call: it breaks its graph here, and the layer's functions are
    # compiled each by itself.
    @torch.compiler.disable
    def _forward(self, around: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        patch = vars(self.pretrained).get("forward")
        if type(patch) is Patched and patch.running:
            return patch.before(self.pretrained, *args, **kwargs)
        placement = self.placement()
        if placement is None:
            return self.pretrained(*args, **kwargs)
        reversible_stack = placement.reversible_stack
        if reversible_stack.left_out is not None:
            return self._as_it_is(placement, args, kwargs)
        modules = (self.pretrained, *modules_of(self))
        if reversible_stack.plan.coupling is not None or reversible_stack.frozen(placement.index):
            self._switch_off_checkpointing(modules, reversible_stack)
        self._refuse_replica(placement)
        check_sharding(self, self.pretrained, placement.name)
        try:
            hidden, args, kwargs = split_hidden(self.pretrained, placement.name, args, kwargs)
        except UnsupportedModelError as error:
            if not reversible_stack.on_trial:
                raise
            reversible_stack.leave_out(str(error))
            return self._as_it_is(placement, args, kwargs)
        training = torch.is_grad_enabled() and reversible_stack.in_training()
        if reversible_stack.plan.coupling is not None:
            check_transforms(placement.name, modules, training)
        if training:
            args, kwargs = without_cache(self.pretrained, placement.name, args, kwargs)
            self._unpack(modules)
        if reversible_stack.frozen(placement.index):
            return self._frozen(reversible_stack, hidden, args, kwargs)
        deployed = reversible_stack.as_deployed()
        if deployed:
            reversible_stack.end()  # what a forward pass cut short may have left
        if deployed or reversible_stack.plan.coupling is None:
            output = self._uncoupled(placement, hidden, args, kwargs)
            self._tell_hooks(hidden, args, kwargs, output)
            return output
        if placement.index in reversible_stack.plain:
            return self._between_runs(placement, hidden, args, kwargs)
        before = _State.take(self.pretrained, hidden) if reversible_stack.first_run(placement.index) else None
        try:
            return self._coupled(placement, self._compiler(placement, around), modules, hidden, args, kwargs)
        except OtherShapeError:
            if before is None or placement.has_adapters:
                reversible_stack.end()
                raise
            before.put()
            reversible_stack.show_again(hidden)
            reversible_stack.plain.add(placement.index)
            return self._between_runs(placement, hidden, args, kwargs)
        except UnsupportedModelError as error:
            if before is None or not reversible_stack.on_trial:
                reversible_stack.end()
                raise
            before.put()
            reversible_stack.leave_out(str(error))
            reversible_stack.end()
            return self._as_it_is(placement, (hidden, *args), kwargs)
        except BaseException:
            reversible_stack.end()
            raise

    def _as_it_is(self, placement: Placement, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A layer of a list that turned out to be no stack."""
        if placement.has_adapters:
            raise UnsupportedModelError(
                f"{placement.reversible_stack.name} of {placement.reversible_stack.model} has MEFT adapters but is no "
                f"stack of layers: {placement.reversible_stack.left_out} Leave it out with stacks=[...]."
            )
        return self.pretrained(*args, **kwargs)

    def _between_runs(self, placement: Placement, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A layer that changes the hidden state's shape: the run below ends, and the next one begins anew."""
        hidden = placement.reversible_stack.leave(placement.index, hidden)
        output = self._uncoupled(placement, hidden, args, kwargs)
        placement.reversible_stack.ran(placement.index)
        self._tell_hooks(hidden, args, kwargs, output)
        return output

    def _compiler(self, placement: Placement, around: int | None) -> Compiler | None:
        """What compiles this call: only training rebuilds, and what Transformers records is taken from the modules."""
        if not torch.is_grad_enabled() or not placement.reversible_stack.in_training() or recording():
            return None
        if placement.has_adapters:
            return None
        options = surrounding(around)
        return self.compiler if options is None else placement.reversible_stack.compiler(options)

    def _frozen(self, reversible_stack: ReversibleStack, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The layer as it is, without gradients of its own weights; what lies below it gets its gradients through it.

        That may be embeddings, prompts, a vision tower before the stack, and an encoder beside it.
        """
        if not torch.is_grad_enabled():
            return self.pretrained(hidden, *args, **kwargs)
        with (
            reversible_stack.weights_fixed(self.pretrained),
            torch.set_grad_enabled(hidden.requires_grad or requiring(args, kwargs)),
        ):
            return self.pretrained(hidden, *args, **kwargs)

    def _coupled(
        self,
        placement: Placement,
        compiler: Compiler | None,
        modules: tuple[nn.Module, ...],
        hidden: Tensor,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        reversible_stack = placement.reversible_stack
        self._refuse_wrapped(placement)
        tape = reversible_stack.tape(placement.index, hidden)
        position = reversible_stack.position()
        # Of a stack in training every layer is rebuilt, also one that was put into evaluation for its dropout.
        reversible = (
            torch.is_grad_enabled() and reversible_stack.in_training() and reversible_stack.reversible(position)
        )
        call = CallArguments(args, kwargs, placement.name, hidden)
        vet = reversible and reversible_stack.vet(placement.index, modules)
        layer = self._layer(placement, call, hidden, compiler, modules, vet=vet)
        state, *further = run_layer(tape, layer, reversible=reversible)
        reversible_stack.ran(placement.index)
        last = position == reversible_stack.depth - 1
        if last:
            state = finish(tape)
            reversible_stack.end()
        output = call.output(state, further)
        if self._heard():
            seen = output if last else _with_state(output, readout(tape, inner=True))
            self._tell_hooks(hidden, args, kwargs, seen)
        return output

    def _uncoupled(self, placement: Placement, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The ordinary layer with the same adapters."""
        layer = self._whole(placement, run)

        def forward(hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
            with unflagged(self.pretrained):
                return layer(hidden, args, kwargs)

        # The layer's own checkpointing would leave the adapters out of what is run again. Its flag decides, if it has
        # one: Transformers may set it on every other layer.
        if getattr(self.pretrained, FLAG, self.gradient_checkpointing) and self.training and torch.is_grad_enabled():
            return checkpointed(self._gradient_checkpointing_func, forward, hidden, args, kwargs)
        return forward(hidden, args, kwargs)

    def _layer(
        self,
        placement: Placement,
        call: CallArguments,
        hidden: Tensor,
        compiler: Compiler | None,
        modules: tuple[nn.Module, ...],
        *,
        vet: bool,
    ) -> LayerCall:
        """Describes this call to the engine: the functions F and G of the coupling's table."""
        coupling = placement.reversible_stack.plan.coupling
        assert coupling is not None
        runner: Runner = run if compiler is None else partial(_compiled, compiler)
        tiles: dict[str, int] = {}
        if coupling.splits:
            split = split_of(self.pretrained, placement.name)
            chain = self._chain(placement, call, hidden, modules) if compiler is None else None
            attention = call.function("F", self._attention(split, placement, runner)) if chain is None else chain
            functions: dict[str, Function | Chain] = {
                "F": attention,
                "G": call.function("G", self._feed_forward(split, placement, runner), main=False),
            }
            tile = placement.reversible_stack.plan.tile(hidden.shape[:-1].numel())
            if tile is not None and not recording() and tokenwise(self.pretrained):
                tiles["G"] = tile
        else:
            main, other = ("G", "F") if coupling.name == "meft2" else ("F", "G")
            chain = self._chain(placement, call, hidden, modules) if compiler is None else None
            functions = {main: call.function(main, self._whole(placement, runner)) if chain is None else chain}
            alone = placement.adapter("function")
            if alone is not None:
                functions[other] = lambda hidden, outside: alone(hidden)
        own = {id(p): p for module in modules for p in module._parameters.values() if p is not None and p.requires_grad}
        parameters = tuple(own.values())
        compiled = compiler is not None or any(map(is_compiled, modules))
        return LayerCall(functions, parameters, call.outside, modules, call.tensors, tiles, vet, compiled)

    def _chain(
        self, placement: Placement, call: CallArguments, hidden: Tensor, modules: tuple[nn.Module, ...]
    ) -> Chain | None:
        """The layer, or its attention block if it splits, in stages: where it is long enough and can be run so."""
        plan, layer = placement.reversible_stack.plan, self.pretrained
        tile = plan.stage_tile(hidden.shape[:-1].numel())
        if tile is None or not torch.is_grad_enabled() or recording():
            return None
        found = self._stages(modules)
        if isinstance(found, str):
            return None
        known, stages = found
        assert plan.coupling is not None
        adapter, last = placement.adapter("feed_forward"), placement.adapter("layer")
        ends = None if adapter is None else feed_forward_of(layer, placement.name, plan.feedforward_module)

        def after(hidden: Tensor, o: Tensor) -> Tensor:
            with nullcontext() if ends is None else beside(*ends, adapter, placement.name):
                output = known.feed_forward_block(layer, stages.after(layer, hidden, o))
            return output if last is None else output + last(output)

        def after_attention(hidden: Tensor, o: Tensor) -> Tensor:
            exit_ = layer.get_submodule(stages.exit or known.attention_exit)
            with behind(exit_, placement.adapter("attention")):
                return stages.after(layer, hidden, o)

        behind_it = after_attention if plan.coupling.splits else after
        return chain_of(layer, known, stages, call, hidden.shape, tile, behind_it)

    def why_whole(self) -> str | None:
        """Why this layer runs as one stage however many tokens there are; None where it runs in stages."""
        placement = self.placement()
        plan = None if placement is None else placement.reversible_stack.plan
        if plan is None or plan.coupling is None:
            return "it is not coupled"
        if plan.tile_size is None:
            return "tile_size is None"
        if self.compiler is not None:
            return "it is compiled"
        found = self._stages((self.pretrained, *modules_of(self)))
        return found if isinstance(found, str) else None

    def _stages(self, modules: Sequence[nn.Module]) -> tuple[Architecture, Stages] | str:
        """What is known of the stages of the layer, or why it runs whole."""
        if any(map(is_compiled, modules)):
            return "it is compiled"
        if not tokenwise(self.pretrained):
            return "its feed-forward may mix tokens"
        return staged(self.pretrained, [module for module in modules if module is not self])

    def _whole(self, placement: Placement, runner: Runner) -> Block:
        layer, chosen = self.pretrained, placement.reversible_stack.plan.feedforward_module
        adapter, last = placement.adapter("feed_forward"), placement.adapter("layer")
        ends = None if adapter is None else feed_forward_of(layer, placement.name, chosen)

        def block(hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
            if placement.reversible_stack.plan.coupling is not None:
                # TRL switches it on again between the forward pass and the recomputation.
                self._switch_off_checkpointing((layer,), placement.reversible_stack)
            with nullcontext() if ends is None else beside(*ends, adapter, placement.name):
                output = runner(whole, layer, hidden, args, kwargs)
            if last is None:
                return output
            state, _ = split_output(output, hidden, placement.name)
            return _with_state(output, state + last(state))

        return block

    def _attention(self, split: Architecture, placement: Placement, runner: Runner) -> Block:
        layer, adapter = self.pretrained, placement.adapter("attention")

        def block(hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
            with behind(layer.get_submodule(split.attention_exit), adapter):
                return runner(split.attention_block, layer, hidden, args, kwargs)

        return block

    def _feed_forward(self, split: Architecture, placement: Placement, runner: Runner) -> Block:
        layer, chosen = self.pretrained, placement.reversible_stack.plan.feedforward_module
        adapter, last = placement.adapter("feed_forward"), placement.adapter("layer")

        def block(hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
            with ExitStack() as stack:
                if adapter is not None:
                    ends = feed_forward_of(layer, placement.name, chosen)
                    stack.enter_context(beside(*ends, adapter, placement.name))
                output: Tensor = runner(split.feed_forward_block, layer, hidden, (), {})
            return output if last is None else output + last(output)

        return block

    def _heard(self) -> bool:
        """Tells whether a forward hook of the pretrained layer listens; those that record outputs often do not."""
        hooks = self.pretrained._forward_hooks.values()
        return any(recording() or not records(hook) for hook in hooks)

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

    def _unpack(self, modules: Sequence[nn.Module]) -> None:
        """Takes back what bitsandbytes does to 4-bit weights evaluated on a CPU: packed ones pass no gradient on."""
        for module in modules:
            quantised = getattr(module._parameters.get("weight"), "quant_state", None)
            if getattr(quantised, "packing_format_for_cpu", False):
                # Unpacks the weights of the module itself, as it is always asked to before saving.
                module.state_dict()

    def _switch_off_checkpointing(self, modules: Sequence[nn.Module], reversible_stack: ReversibleStack) -> None:
        """Takes Transformers' flags off the layer and what is in it, until the layer is given back."""
        found = flagged(modules)
        if not found:
            return
        for module in found:
            # The wrapper's own is noted for the layer, which does not see it.
            layer = self.pretrained if module is self else module
            vars(module)[FLAG] = False
            if hasattr(layer, FLAG):
                reversible_stack.note_change(layer, FLAG, True)
                checkpoint = vars(self).get("_gradient_checkpointing_func")
                if module is self and checkpoint is not None:
                    vars(layer)["_gradient_checkpointing_func"] = checkpoint
        logger.warning_once(
            "Gradient checkpointing is redundant on reversible layers, which keep no activations, and was switched "
            "off for them."
        )

    def _refuse_wrapped(self, placement: Placement) -> None:
        """An activation wrapper around this one would run it again by itself, outside of a pass through the stack."""
        held = placement.reversible_stack.layers[placement.index]
        if held is not self and is_wrapped(held):
            raise UnsupportedModelError(
                f"{placement.name} is reversible, and {type(uncompiled(held)).__name__} was put around it, which would "
                "run it a second time by itself. Reversible layers keep no activations: leave the wrapper out, or call "
                "the model that holds the stack, which takes it off."
            )

    def _refuse_replica(self, placement: Placement) -> None:
        if getattr(self, "_is_replica", False):
            raise UnsupportedModelError(
                f"{placement.name} runs under torch.nn.DataParallel, whose replicas have no parameters of their own to "
                "give gradients to. Use one process a device (accelerate launch, torchrun), or show the process one "
                "device (CUDA_VISIBLE_DEVICES)."
            )


def shared_by(layers: Container) -> ReversibleStack | None:
    """What the wrappers of a list of layers share, or None if they run their layers as they are."""
    for layer in map(inside, layers):
        placement = layer.placement() if isinstance(layer, ReversibleLayer) else None
        if placement is not None:
            return placement.reversible_stack
    return None


class _State:
    """What a run of a layer changes that is thrown away: random generators and buffers."""

    def __init__(self, rng: RngState, buffers: list[tuple[Tensor, Tensor]]) -> None:
        self.rng, self.buffers = rng, buffers

    @classmethod
    def take(cls, layer: nn.Module, hidden: Tensor) -> _State:
        return cls(RngState.take(hidden.device), [(buffer, buffer.clone()) for buffer in layer.buffers()])

    def put(self) -> None:
        self.rng.put()
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)


def tokenwise(layer: nn.Module) -> bool:
    """Tells whether a layer's feed-forward block surely acts on each token alone.

    Batch norms and convolutions mix tokens, dropped paths are drawn for whole samples, experts of limited capacity turn
    tokens away, and feed-forwards in chunks of their own want to divide the sequence.
    """
    if getattr(layer, "chunk_size_feed_forward", 0):
        return False
    for module in modules_of(layer):
        if isinstance(module, _NormBase) or (isinstance(module, _ConvNd) and max(module.kernel_size) > 1):
            return False
        kind = type(module)
        # Looked up where it may be: that a module lacks an attribute takes `hasattr` long to find out.
        if "DropPath" in kind.__name__ or "expert_capacity" in vars(module) or hasattr(kind, "expert_capacity"):
            return False
    return True


def modules_of(module: nn.Module) -> list[nn.Module]:
    """A module and all below it, each once, as `module.modules()` but several times as fast: every call asks."""
    found = [module]
    seen = {module}
    for each in found:
        for child in each._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def _compiled(compiler: Compiler, *given: Any) -> Any:
    with recording_off():
        return compiler(*given)


def _with_state(output: Any, state: Tensor) -> Any:
    return state if isinstance(output, Tensor) else type(output)((state, *output[1:]))
