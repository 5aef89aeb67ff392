"""MEFT as a PEFT method: the layer, the tuner, and their registration.

Adapter parameters lie flat, `meft_f_down.<adapter>.weight`, as PEFT's state dicts want them; a `Bottleneck` made of
them is what the couplings see.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, cast

import torch
from peft import PeftConfig, TaskType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn
from transformers.activations import ACT2CLS, ACT2FN
from transformers.utils import logging

from meft.backbone.adapters import Bottleneck, new_projections
from meft.backbone.architectures import feed_forward_of
from meft.backbone.checkpointing import inside, is_wrapped, warn_dropped
from meft.backbone.compilation import is_compiled
from meft.backbone.conversion import name_units, prepare_stacks, undo
from meft.backbone.discovery import Stack, find_stacks, post_norm, pretrained_of
from meft.backbone.layers import ReversibleLayer
from meft.backbone.plan import Plan
from meft.backbone.refusal import as_it_was_if_refused
from meft.backbone.stack import Placement, ReversibleStack
from meft.engine.sharding import refuse_sharded
from meft.errors import CheckpointError, ConfigError, UnsupportedModelError
from meft.loss import attach, detach, heads
from meft.options import ADAPTER_ONLY, PLACES

from .config import MeftConfig
from .peft_type import MEFT
from .saved_modules import check_modules_to_save

logger = logging.get_logger(__name__)

_ACTIVATION_NAMES = (
    "hidden_act",
    "activation_function",
    "hidden_activation",
    "activation",
    "dense_act_fn",
    "encoder_activation_function",
    "mlp_hidden_act",
)
_DROPOUT_NAMES = ("hidden_dropout_prob", "dropout", "hidden_dropout", "resid_pdrop", "dropout_rate", "resid_dropout")

_GENERATING = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
_BART_HEAD = "classification_head"


class MeftLayer(ReversibleLayer, BaseTunerLayer):
    """A pretrained layer (`base_layer`) with the MEFT adapters of any number of names.

    Args:
        layer: the pretrained layer.
        adapter_name: the first adapter.
        stack: the stack the layer belongs to.
        config: the adapter's options.
        reversible_stack: the stack under that adapter.
        index: the layer's position.
    """

    adapter_layer_names = ("meft_f_down", "meft_f_up", "meft_f_norm", "meft_g_down", "meft_g_up", "meft_g_norm")
    other_param_names = ("meft_places", "meft_f_dropout", "meft_g_dropout")
    own_names = ReversibleLayer.own_names | {
        "base_layer",
        "reversible_stacks",
        "merged_adapters",
        *adapter_layer_names,
        *other_param_names,
    }

    def __init__(
        self,
        layer: nn.Module,
        adapter_name: str,
        stack: Stack,
        config: MeftConfig,
        reversible_stack: ReversibleStack,
        index: int,
    ) -> None:
        nn.Module.__init__(self)
        self.base_layer = layer
        for name in (*self.adapter_layer_names, "meft_f_dropout", "meft_g_dropout"):
            setattr(self, name, nn.ModuleDict())
        self.meft_places: dict[str, tuple[ReversibleStack, int, Callable[[Tensor], Tensor], float]] = {}
        # Those of deleted adapters too: what they changed is taken back when the layer is.
        self.reversible_stacks: list[ReversibleStack] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = adapter_name
        self.merged_adapters: list[str] = []
        self.training = layer.training
        self.update_layer(adapter_name, stack, config, reversible_stack, index)

    @property
    def pretrained(self) -> nn.Module:
        return self.base_layer

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def update_layer(
        self, adapter_name: str, stack: Stack, config: MeftConfig, reversible_stack: ReversibleStack, index: int
    ) -> None:
        """Adds an adapter to this layer; a frozen layer gets none."""
        dropout = _dropout(stack) if config.adapter_dropout is None else config.adapter_dropout
        self.meft_places[adapter_name] = (reversible_stack, index, _activation(stack), dropout)
        self.reversible_stacks.append(reversible_stack)
        if reversible_stack.frozen(index):
            return
        # The parallel adapter must have a place before anything is changed.
        feed_forward_of(self.base_layer, reversible_stack.layer_name(index), config.feedforward_module)
        assert config.adapter_places is not None and config.adapter_init_std is not None
        width = stack.width(index)
        for function, place in PLACES[config.coupling].items():
            if place not in config.adapter_places:
                continue
            down, up = new_projections(width, config.bottleneck_dim, config.adapter_init_std)
            parts: dict[str, nn.Module] = {"down": down, "up": up}
            if config.adapter_norm:
                parts["norm"] = nn.LayerNorm(width)
            for part, module in parts.items():
                getattr(self, f"meft_{function}_{part}")[adapter_name] = module.to(self._reference().dtype)
            # A module, so that what switches dropout off in a model (TRL's trainers do) finds it.
            getattr(self, f"meft_{function}_dropout")[adapter_name] = nn.Dropout(dropout).train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def placement(self) -> Placement | None:
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.meft_places]
        if not active:
            return None
        _check_single(active)
        reversible_stack, index, activation, _ = self.meft_places[active[0]]
        coupling = ADAPTER_ONLY if reversible_stack.plan.coupling is None else reversible_stack.plan.coupling.name
        adapters = {
            place: adapter
            for function, place in PLACES[coupling].items()
            if (adapter := self._bottleneck(function, active[0], activation)) is not None
        }
        return Placement(reversible_stack, index, adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_names, str):
            _check_single(list(adapter_names))
        super().set_adapter(adapter_names, inference_mode)
        self._freeze_unread()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_unread()

    def _freeze_unread(self) -> None:
        """Trains nothing that adds to a stream which the output rule leaves out: it would never get a gradient.

        Trackers of unused parameters (DDP) and of optimizer states (FSDP) take that for a fault.
        """
        for name, (reversible_stack, index, *_) in self.meft_places.items():
            for function, part in product(reversible_stack.unread(index), ("down", "up", "norm")):
                held = getattr(self, f"meft_{function.lower()}_{part}", {})
                if name in held:
                    held[name].requires_grad_(False)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise _cannot_merge()

    def unmerge(self) -> None:
        raise _cannot_merge()

    def train(self, mode: bool = True) -> MeftLayer:
        nn.Module.train(self, mode)
        return self

    def _bottleneck(
        self, function: str, adapter_name: str, activation: Callable[[Tensor], Tensor]
    ) -> Bottleneck | None:
        down, up, dropout, norm = (
            getattr(self, f"meft_{function}_{part}") for part in ("down", "up", "dropout", "norm")
        )
        if adapter_name not in down:
            return None
        return Bottleneck(
            down[adapter_name],
            up[adapter_name],
            activation,
            dropout[adapter_name],
            self,
            norm[adapter_name] if adapter_name in norm else None,  # noqa: SIM401 (a ModuleDict has no get)
        )

    def _reference(self) -> Tensor:
        """The parameter whose device and dtype adapters follow: a whole layer has no weight of its own."""
        return next(parameter for parameter in self.base_layer.parameters() if parameter.is_floating_point())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, which calls it on weights it has just loaded as well: those are never rounded."""
        reference = self._reference()
        for name in self.adapter_layer_names:
            projections = getattr(self, name)
            if adapter_name not in projections:
                continue
            projection = projections[adapter_name]
            if not any(parameter.is_meta for parameter in projection.parameters()):
                dtype = torch.promote_types(reference.dtype, projection.weight.dtype)
                projection.to(device or reference.device, dtype)


class MeftModel(BaseTuner):
    """The tuner: puts a `MeftLayer` in the place of every layer of every stack."""

    prefix = "meft_"
    tuner_layer_cls = MeftLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT declares it so)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with as_it_was_if_refused(model):
            self._inject(model, adapter_name, *args, **kwargs)

    def _inject(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = cast(MeftConfig, self.peft_config[adapter_name])
        _check_name(adapter_name)
        refuse_sharded(model)
        _refuse_task(model, config)
        stacks = find_stacks(model, config.stacks)
        config.reopen()
        plan = config.plan(post_norm(stacks))
        _refuse_plain_reversible(stacks)
        _refuse_same_name(stacks, adapter_name, config)
        self._check_base(config, stacks)
        # Everything that can be refused is refused here, before the model is changed: what PEFT does afterwards, out of
        # reach of `inject_adapter`, is not taken back.
        places = {}
        for stack in stacks:
            reversible_stack = stack.reversible_stack(plan)
            _refuse_shared(stack)
            for index, layer in enumerate(stack.layers):
                if not reversible_stack.frozen(index):
                    pretrained = pretrained_of(layer)
                    feed_forward_of(pretrained, reversible_stack.layer_name(index), config.feedforward_module)
                    _refuse_compiled(layer, reversible_stack.layer_name(index))
                places[f"{stack.name}.{index}"] = (stack, reversible_stack, index)
        _refuse_held_elsewhere(model, stacks)
        _refuse_saved_inside(model, stacks, config)
        check_modules_to_save(model, config.modules_to_save, config.task_type)
        config.fill_in(plan)
        self._places = places
        for stack in stacks:
            _take_wrappers_off(stack, plan)
        pairs = {id(reversible_stack): (stack, reversible_stack) for stack, reversible_stack, _ in places.values()}
        prepare_stacks(model, list(pairs.values()))
        name_units(model, stacks, next(iter(places.values()))[1], MeftLayer.__name__)
        _train_head(model, config)
        # Which layers are taken follows from the model, not from the names in a state dict.
        kwargs.pop("state_dict", None)
        super().inject_adapter(model, adapter_name, *args[:2], **kwargs)
        if config.fused_loss and config.coupling != ADAPTER_ONLY:
            attach(model)
            next(iter(pairs.values()))[1].heads.extend(heads(model))

    def _check_target_module_exists(self, peft_config: MeftConfig, key: str) -> bool:  # type: ignore[override]
        return key in self._places

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        stack, reversible_stack, index = self._places[current_key]
        config = cast(MeftConfig, peft_config)
        if isinstance(target, MeftLayer):
            target.update_layer(adapter_name, stack, config, reversible_stack, index)
            return
        layer = MeftLayer(target, adapter_name, stack, config, reversible_stack, index)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's own reads `weight` of the layers, which whole layers lack."""
        if isinstance(child, MeftLayer):
            for reversible_stack in child.reversible_stacks:
                undo(reversible_stack)
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT runs every call within this; for other methods it gives each row of a batch its own adapter."""
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                f"adapter_names={kwargs['adapter_names']!r} asks for another adapter in each row of the batch, but two "
                "streams follow one coupling. Run the model once for each adapter, after model.set_adapter(...)."
            )
        yield

    def unload(self) -> nn.Module:
        """Takes the adapters out of the model, and what was done to its loss head."""
        model = super().unload()
        detach(model)
        return model

    def _check_merge_allowed(self) -> None:
        raise _cannot_merge()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_name, str):
            _check_single(list(adapter_name))
        super().set_adapter(adapter_name, inference_mode)

    def _check_base(self, config: MeftConfig, stacks: list[Stack]) -> None:
        """Refuses a saved adapter that was made for another base model, and notes what a new one is made for."""
        found = [
            {
                "layer": type(pretrained_of(stack.layers[0])).__name__,
                "layers": len(stack.layers),
                "hidden_size": stack.hidden_size,
            }
            for stack in stacks
        ]
        # A configuration that was injected before may serve another model; one that was saved may not.
        if config.base_layers not in (None, found) and not config.injected:
            raise CheckpointError(
                f"The adapter in {config.loaded_from or 'this configuration'} was made for another base model: for "
                f"{_described(config.base_layers)}, but {type(self.model).__name__} has {_described(found)}. Load "
                f"it on its own base model ({config.base_model_name_or_path}); base_layers=None takes its options "
                "only."
            )
        config.base_layers, config.injected = found, True


def _train_head(model: nn.Module, config: MeftConfig) -> None:
    """BART calls its head for sequences by a name that PEFT does not know; it would stay random, untrained."""
    if config.task_type != TaskType.SEQ_CLS or not isinstance(getattr(model, _BART_HEAD, None), nn.Module):
        return
    if _BART_HEAD not in (config.modules_to_save or []):
        config.modules_to_save = [*(config.modules_to_save or []), _BART_HEAD]


def _check_single(adapter_names: list[str]) -> None:
    if len(adapter_names) > 1:
        raise ConfigError(
            f"MEFT adapters {adapter_names} are active together, but two streams can follow one coupling only. "
            f"Activate one of them: model.set_adapter({adapter_names[0]!r})."
        )


def _cannot_merge() -> ConfigError:
    return ConfigError(
        "MEFT adapters cannot be merged: two coupled streams are not a change of the pretrained weights. Keep the "
        'adapter beside its base model, or train LoRA under make_reversible(model, coupling="momentum"), whose result '
        "merges."
    )


def _refuse_plain_reversible(stacks: list[Stack]) -> None:
    for stack in stacks:
        if any(type(layer) is ReversibleLayer for layer in stack.layers):
            raise ConfigError(
                f"{stack} was made reversible by make_reversible. Call "
                "meft.restore(model) before adding a MEFT adapter."
            )


def _refuse_same_name(stacks: list[Stack], adapter_name: str, config: MeftConfig) -> None:
    """PEFT only warns when a model is given adapters a second time, and one would take the other's place."""
    for stack in stacks:
        for layer in stack.layers:
            if isinstance(layer, MeftLayer) and adapter_name in layer.meft_places:
                plan = layer.meft_places[adapter_name][0].plan
                coupling = ADAPTER_ONLY if plan.coupling is None else plan.coupling.name
                raise ConfigError(
                    f"{stack} has a MEFT adapter {adapter_name!r} already, of "
                    f"coupling={coupling!r}; another one of coupling={config.coupling!r} cannot take its place. Add it "
                    "under a name of its own, model.add_adapter(name, config), and switch with "
                    "model.set_adapter(name); or call model.unload() first."
                )


def _refuse_shared(stack: Stack) -> None:
    """PEFT visits a module once, however often it stands in a list."""
    if len({id(layer) for layer in stack.layers}) < len(stack.layers):
        raise UnsupportedModelError(
            f"{stack} holds the same layer several times, which would share one "
            "set of adapters. Use make_reversible with LoRA, or give each place a layer of its own."
        )


def _refuse_held_elsewhere(model: nn.Module, stacks: list[Stack]) -> None:
    """PEFT puts an adapter where it meets a layer first; another place that holds the layer would run it without."""
    names = {id(pretrained_of(layer)): f"{stack.name}.{i}" for stack in stacks for i, layer in enumerate(stack.layers)}
    lists = {id(stack.layers): stack.name for stack in stacks}
    for path, module in model.named_modules():
        if isinstance(module, MeftLayer):
            continue
        for child, held in module._modules.items():
            if held is None or inside(module) is not module:
                continue
            name = names.get(id(pretrained_of(held)))
            if name is not None and name != f"{lists.get(id(module))}.{child}":
                raise UnsupportedModelError(
                    f"{type(model).__name__} holds the layer {name} as {path + '.' if path else ''}{child} as well, "
                    "which would run without the adapter that stands in the other place. Use make_reversible with "
                    "LoRA, delete one of the two places, or hold the whole list of layers under two names."
                )


def _check_name(adapter_name: Any) -> None:
    """Refuses names of adapters that PyTorch refuses as names of modules."""
    text = isinstance(adapter_name, str) and adapter_name and "." not in adapter_name
    if not text or hasattr(nn.ModuleDict(), adapter_name):
        raise ConfigError(
            f"adapter_name={adapter_name!r} cannot be the name of a module. Valid: a text without a full stop that is "
            "no attribute of modules (forward, train, keys, ...). Choose another, such as 'default'."
        )


def _refuse_task(model: nn.Module, config: MeftConfig) -> None:
    """PEFT's classes for models that generate fail on others when they have changed them."""
    if config.task_type in _GENERATING and not hasattr(model, "prepare_inputs_for_generation"):
        raise ConfigError(
            f"task_type={str(config.task_type).removeprefix('TaskType.')!r} is for models that generate, and "
            f"{type(model).__name__} does not. Valid for it: 'FEATURE_EXTRACTION', None, or the task of its head."
        )


def _refuse_saved_inside(model: nn.Module, stacks: list[Stack], config: MeftConfig) -> None:
    """PEFT keeps `modules_to_save` from the children of a layer that a tuner holds, when it has changed the model."""
    own = (*MeftLayer.adapter_layer_names, *(name for name in MeftLayer.other_param_names if name.endswith("dropout")))
    for chosen in config.modules_to_save or ():
        if any(name.endswith(chosen) for name in own):
            raise ConfigError(
                f"modules_to_save={config.modules_to_save!r}: {chosen!r} is the end of the names of MEFT's own modules "
                f"({', '.join(own)}), which are trained and saved anyway. Give more of the name of the module that you "
                "mean."
            )
        for stack in stacks:
            for index, layer in enumerate(stack.layers):
                place = f"{stack.name}.{index}"
                children = [f"{place}.{child}" for child, _ in pretrained_of(layer).named_children()]
                above = [place[: end.start()] for end in re.finditer(r"\.", place)]
                met = next((name for name in (*children, place, *above) if name.endswith(chosen)), None)
                if met is not None:
                    deeper = next((n for n, _ in pretrained_of(layer).named_modules() if n.count(".")), None)
                    also = f", one further inside ({deeper!r})" if deeper and met in children else ""
                    raise ConfigError(
                        f"modules_to_save={config.modules_to_save!r}: {chosen!r} names {met} of {type(model).__name__} "
                        "(PEFT compares the ends of names), and a module of which a MEFT layer consists cannot be "
                        f"copied aside. Valid: modules outside of {stack.name}{also}. To train weights of the layers "
                        "themselves use make_reversible with LoRA, whose modules_to_save may name them."
                    )


def _take_wrappers_off(stack: Stack, plan: Plan) -> None:
    """Takes activation wrappers off layers that are to be reversible.

    Raises:
        UnsupportedModelError: the layers are not to be coupled, so that the wrappers have a purpose.
    """
    wrapped = [index for index, layer in enumerate(stack.layers) if is_wrapped(layer)]
    if not wrapped:
        return
    names = [stack.layer_name(index) for index in wrapped]
    if plan.coupling is None:
        raise UnsupportedModelError(
            f"{names[0]} is inside a {type(stack.layers[wrapped[0]]).__name__}, where adapters cannot be placed. Add "
            "the adapter first and put the wrappers around its layers afterwards, or use "
            "model.gradient_checkpointing_enable()."
        )
    warn_dropped(names, stack.layers[wrapped[0]])
    for index in wrapped:
        stack.layers[index] = inside(stack.layers[index])


def _refuse_compiled(layer: nn.Module, name: str) -> None:
    """Adapters are placed by hooks, which a compiled module may not run."""
    for path, module in layer.named_modules():
        if is_compiled(module):
            raise UnsupportedModelError(
                f"{path + ' in ' if path else ''}{name} is compiled, and a compiled module may leave out the adapters "
                "that MEFT places in it. Add the adapter to a model that is not compiled, and compile the whole model "
                "afterwards (torch.compile(model))."
            )


def _described(layers: list[dict[str, Any]] | None) -> str:
    return " and ".join(f"{s['layers']} {s['layer']} of width {s['hidden_size']}" for s in layers or [])


def _activation(stack: Stack) -> Callable[[Tensor], Tensor]:
    """The model's own non-linearity: named by its configuration, or a module of its layers; else GELU, with a word."""
    for name in _ACTIVATION_NAMES:
        value = getattr(stack.config, name, None)
        if isinstance(value, str) and value in ACT2FN:
            activation = ACT2FN[value]
            # Some have parameters of their own, which are the model's.
            if not _has_parameters(activation):
                return activation
        if callable(value) and not isinstance(value, type):
            return value
    values = (value[0] if isinstance(value, tuple) else value for value in ACT2CLS.values())
    known = tuple(value for value in values if isinstance(value, type))
    for module in pretrained_of(stack.layers[0]).modules():
        if isinstance(module, known) and not _has_parameters(module):
            return module
    logger.warning_once(
        f"The non-linearity of {type(stack.owner).__name__} is not known: its configuration has none of "
        f"{', '.join(_ACTIVATION_NAMES)}. The adapters use GELU."
    )
    return ACT2FN["gelu"]


def _has_parameters(activation: Any) -> bool:
    return isinstance(activation, nn.Module) and next(activation.parameters(), None) is not None


def _dropout(stack: Stack) -> float:
    for name in _DROPOUT_NAMES:
        value = getattr(stack.config, name, None)
        if isinstance(value, int | float):
            return float(value)
    return 0.0


def register() -> None:
    """Registers the method with PEFT; importing `meft` does it."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if MEFT not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="meft", config_cls=MeftConfig, model_cls=MeftModel, prefix="meft_")
