"""What the baselines train: the linear layers for LoRA, keys, values and feed-forwards for (IA)3, biases for BitFit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import peft
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as PEFT_FEEDFORWARDS,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as PEFT_TARGETS,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from meft.backbone.architectures import feed_forward_of
from meft.backbone.conversion import find_stacks
from meft.backbone.discovery import Stack
from meft.errors import UnsupportedModelError
from meft.tuner.saved_modules import HEADS_OF_TASKS, check_modules_to_save

# Parts of the names of projections to keys and values, alone or fused with others: k_proj, kv_b_proj, query_key_value.
_KEYS, _VALUES = {"k", "key", "keys", "wk"}, {"v", "value", "values", "wv"}
_BOTH = {"kv", "qkv", "wqkv"}
# Projections down to a compressed state, from which keys and values are made by others (multi-head latent attention).
_COMPRESSED = {"a", "down"}


def linear_layers_pattern(model: nn.Module) -> str:
    """A regular expression for the linear layers inside the transformer layers.

    PEFT's `"all-linear"` would reach the pooler and projections outside the layers as well, which no other method
    here trains. A pattern, unlike a set of names, is written to `adapter_config.json` the same way every time.
    """
    return _pattern((stack, name) for stack in find_stacks(model) for _, name, _ in _linear_layers(stack))


def ia3_config(model: nn.Module, task_type: str | None, modules_to_save: list[str] | None) -> peft.IA3Config:
    """PEFT's (IA)3 (Liu et al. 2022, arXiv 2205.05638): keys, values and the inner states of feed-forwards are scaled.

    For the model types that PEFT knows, its choice of modules is taken. For others they are found by structure: the
    projections to keys and values by their names, and the last linear layer of each feed-forward, whose input is
    scaled.

    Raises:
        UnsupportedModelError: The keys and values, or the feed-forward, of a layer are not known.
    """
    stacks = find_stacks(model)
    options: dict[str, Any] = {"task_type": task_type, "modules_to_save": modules_to_save}
    # PEFT would warn of the transposed weights of GPT-2 otherwise.
    transposed = any(isinstance(module, Conv1D) for stack in stacks for _, _, module in _linear_layers(stack))
    if _known_to_peft(model, stacks):
        return peft.IA3Config(fan_in_fan_out=transposed, **options)
    attended = [(stack, name) for stack in stacks for name in _keys_and_values(stack)]
    inner = [(stack, name) for stack in stacks for name in _feed_forward_exits(stack)]
    return peft.IA3Config(
        target_modules=_pattern([*attended, *inner]),
        feedforward_modules=_pattern(inner),
        fan_in_fan_out=transposed,
        **options,
    )


def train_biases(
    model: PreTrainedModel, task_type: str | None, modules_to_save: Sequence[str] | None
) -> PreTrainedModel:
    """BitFit (Ben Zaken et al. 2022, arXiv 2106.10199): trains every bias of the model, and the task head in full.

    PEFT has no such method, and none is needed: the biases are the model's own, so the trained model is saved and
    loaded as an ordinary one.

    Args:
        model: Changed in place.
        task_type: PEFT's; it decides which modules are the task head.
        modules_to_save: Names of other modules to train in full, matched by their ends as PEFT does.

    Raises:
        ConfigError: There is no module of such a name.
        UnsupportedModelError: The model has no biases.
    """
    names = {name for name, _ in model.named_modules()}
    check_modules_to_save(model, modules_to_save, task_type)
    # PEFT, which does not have this method, would train the same heads.
    ends = (*HEADS_OF_TASKS.get(task_type or "", ()), *(modules_to_save or ()))
    heads = {name for name in names if any(_ends_with(name, end) for end in ends)}
    biases = 0
    for name, parameter in model.named_parameters():
        in_head = any(name.startswith(f"{head}.") for head in heads)
        bias = name.rpartition(".")[2].endswith("bias")
        parameter.requires_grad_(in_head or bias)
        biases += bias and not in_head
    if not biases:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no biases outside of its task head, so method 'bitfit' has nothing to train "
            "(Llama and its kin have none). Choose lora, ia3 or another method."
        )
    return model


def _known_to_peft(model: nn.Module, stacks: Sequence[Stack]) -> bool:
    """Whether each module that PEFT's table names for the model's type is there.

    The table may be older than the model's code: where Mixtral's experts became one tensor, it would scale the
    attention only, in silence.
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    named = PEFT_TARGETS.get(model_type, []) if PEFT_FEEDFORWARDS.get(model_type) else []
    layers = [f".{name}" for stack in stacks for _, name, _ in _linear_layers(stack)]
    return bool(named) and all(any(layer.endswith(f".{name}") for layer in layers) for name in named)


def _linear_layers(stack: Stack) -> Iterator[tuple[int, str, nn.Module]]:
    """Index of the layer, name in the layer, and the module itself."""
    for index, layer in enumerate(stack.layers):
        for name, module in layer.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                yield index, name, module


def _keys_and_values(stack: Stack) -> set[str]:
    """Names, in a layer, of the projections to keys and values.

    Raises:
        UnsupportedModelError: A layer has none of either.
    """
    found: set[str] = set()
    for index, layer in enumerate(stack.layers):
        parts = {
            name: set(re.split(r"[_\d]+", name.rpartition(".")[2].lower()))
            for at, name, _ in _linear_layers(stack)
            if at == index
        }
        keys = [name for name, words in parts.items() if words & (_KEYS | _BOTH) and not words & _COMPRESSED]
        values = [name for name, words in parts.items() if words & (_VALUES | _BOTH) and not words & _COMPRESSED]
        if not keys or not values:
            raise _unknown(
                f"{stack.layer_name(index)}, a {type(layer).__name__}", "projections to keys and values", stack
            )
        found.update(keys, values)
    return found


def _feed_forward_exits(stack: Stack) -> set[str]:
    """Names, in a layer, of the last linear layer of its feed-forward, one for each expert.

    Raises:
        UnsupportedModelError: A layer's feed-forward is not known, or has no linear layer back to the hidden state.
    """
    found: set[str] = set()
    for index, layer in enumerate(stack.layers):
        place = f"{stack.layer_name(index)}, a {type(layer).__name__}"
        _, exit_ = feed_forward_of(layer, place)
        last: dict[str, str] = {}
        inside = set(exit_.modules())
        for at, name, module in _linear_layers(stack):
            if at == index and module in inside and _outputs(module) == stack.hidden_size:
                last[name.rpartition(".")[0]] = name  # the last one of a module
        if not last:
            raise _unknown(place, "the second linear layer of the feed-forward", stack)
        found.update(last.values())
    return found


def _outputs(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else int(module.nf)  # type: ignore[arg-type]


def _unknown(place: str, what: str, stack: Stack) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Method 'ia3' scales keys, values and the inner state of feed-forwards, but {what} of {place}, "
        f"{'were' if what.startswith('projections') else 'was'} not found among the linear layers of "
        f"{type(stack.owner).__name__}. Choose lora or another method, or give PEFT an IA3Config of your own."
    )


def _pattern(names: Iterable[tuple[Stack, str]]) -> str:
    """One regular expression for modules of these names in any layer of their stacks."""
    return "|".join(sorted({rf"{re.escape(stack.name)}\.\d+\.{re.escape(name)}" for stack, name in names}))


def _ends_with(name: str, end: str) -> bool:
    """Whether a module's name is `end`, or ends in it after a dot."""
    return name == end or name.endswith(f".{end}")
