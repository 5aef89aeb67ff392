"""How weights may be spread over processes, and how they may not.

A reversible layer runs its functions again in the backward pass and returns the gradients of its parameters itself, so
these must be whole, and the same tensors, in both directions. `fully_shard` (FSDP2) on the layer does that: it gathers
a unit's weights before the unit's forward and backward pass. Units inside the layer, FSDP1 and DeepSpeed ZeRO-3 put
other tensors in the place of the weights in between.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from meft.errors import ConfigError, UnsupportedModelError

_FSDP1 = (
    "runs under FullyShardedDataParallel (FSDP1), which puts views of one flat tensor in the place of its weights. A "
    "reversible layer needs the weights themselves. Use FSDP2: torch.distributed.fsdp.fully_shard on every reversible "
    "layer and on the model, or fsdp_version: 2 in the configuration of accelerate."
)


def check_sharding(layer: nn.Module, pretrained: nn.Module, name: str) -> None:
    """Looks at the weights of a reversible layer before it runs.

    Args:
        layer: the reversible layer.
        pretrained: the layer it stands for.
        name: what messages call it.

    Raises:
        UnsupportedModelError: its weights are spread over processes in a way that it cannot be rebuilt under.
    """
    if _partitioned(layer):
        raise UnsupportedModelError(
            f"The weights of {name} are partitioned by DeepSpeed ZeRO-3, which takes them away between the forward "
            "pass of a module and its backward pass, so a reversible layer cannot return their gradients. Use ZeRO "
            "stage 2 (gradients and optimizer state are sharded), or FSDP2, which shards the weights as well."
        )
    inner = next(_units(pretrained), None)
    if inner is not None:
        where = f"{inner} inside it" if inner else "the pretrained layer inside it"
        raise UnsupportedModelError(
            f"{name} is reversible, and {where} was given to fully_shard. The layer is rebuilt as a whole, so it must "
            f"be one unit: call fully_shard on every {_name(layer)} and on nothing inside. With accelerate, "
            "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP does that where fsdp_transformer_layer_cls_to_wrap is "
            "left out."
        )
    if _distributed() and torch.is_grad_enabled() and any(not parameter.is_leaf for parameter in layer.parameters()):
        raise UnsupportedModelError(f"{name} {_FSDP1}")


def refuse_flat(variable: torch.Tensor, name: str) -> None:
    """Refuses the flat tensor of FSDP1, met in the graph of a stack's layer.

    Raises:
        UnsupportedModelError: it is one.
    """
    if getattr(variable, "_is_flat_param", False):
        raise UnsupportedModelError(f"A layer of {name} {_FSDP1}")


def refuse_sharded(model: nn.Module) -> None:
    """Refuses to convert a model, or to give it back, when its weights are spread over processes already.

    Raises:
        ConfigError: they are.
    """
    unit = next(_units(model), None)
    kind = "fully_shard" if unit is not None else "DeepSpeed ZeRO-3" if _partitioned(model) else None
    if kind is not None:
        where = f" ({unit})" if unit else ""
        raise ConfigError(
            f"The weights of {_name(model)}{where} are spread over processes by {kind} already, and layers "
            "can be exchanged only before that. Call make_reversible or get_peft_model first, then fully_shard. To "
            "take the layers back after training, save the full state dict and load it into a model that is not "
            "sharded."
        )


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _name(module: nn.Module) -> str:
    """The module's class; `fully_shard` puts its own in front."""
    return type(module).__name__.removeprefix("FSDP")


def _units(model: nn.Module) -> Iterator[str]:
    """The paths of the modules that `fully_shard` was called on."""
    if not _distributed():
        return
    from torch.distributed.fsdp import FSDPModule

    yield from (path for path, module in model.named_modules() if isinstance(module, FSDPModule))


def _partitioned(model: nn.Module) -> bool:
    """DeepSpeed marks all parameters or none, so the first one tells: this is asked before every call of a layer."""
    return hasattr(next(model.parameters(), None), "ds_status")
