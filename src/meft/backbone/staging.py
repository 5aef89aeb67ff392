"""Layers in stages: which can be run so, and the engine's chain for one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meft.engine.stages import Boundary, Chain, Stage

from .architectures import Architecture, architecture_of, owner_of_forward
from .architectures.attentions import ATTENTIONS
from .architectures.base import arguments, named
from .architectures.stages import Stages
from .calls import CallArguments
from .recording import records

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "meft")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def staged(layer: nn.Module, modules: Sequence[nn.Module]) -> tuple[Architecture, Stages] | str:
    """What is known of a layer that can run in stages, or why it runs as one.

    Stages call the layer's projections, norms and feed-forward, and neither the layer's own `forward` nor that of its
    attention: who overrides or listens to one of those gets the layer whole. So does who listens to a module that would
    be given tiles, and what no library made, since it may mix tokens.

    Args:
        layer: the pretrained layer.
        modules: it and all modules below it, and adapters.
    """
    known = architecture_of(layer)
    if known is None or (known.stages is None and known.halves is None):
        return f"the stages of a {type(layer).__name__} are not known"
    reason = known.refuses(layer)
    if reason is not None:
        return reason
    strangers = {*layer._modules} - known.children
    stages = known.stages
    if stages is None:
        assert known.halves is not None
        attention = getattr(layer, known.halves[0].modules[0])
        if len(known.halves[0].modules) != 1:
            return "something follows its attention"
        row = ATTENTIONS.get(_owner(attention))
        if row is None:
            return f"the stages of a {type(attention).__name__} are not known"
        strangers |= {*attention._modules} - row.children
        stages = row.stages(known)
    for path, replaced in stages.replaced.items():
        module = layer.get_submodule(path)
        if _owner(module) not in replaced.owners:
            return f"the stages of a {type(module).__name__} are not known"
        strangers |= {*module._modules} - replaced.children
    reason = stages.refuses(layer)
    if reason is not None:
        return reason
    if strangers:
        return f"it has {' and '.join(sorted(strangers))}, which its stages would leave out"
    for module in modules:
        kind = type(module)
        if kind.__module__.partition(".")[0] not in _LIBRARIES:
            return f"a {kind.__name__} may mix tokens"
        if "forward" in vars(module):
            return f"the forward of its {kind.__name__} was replaced"
        if any(map(_listens, _hooks(module))):
            return f"a hook on its {kind.__name__} would see tiles"
    return known, stages


def _owner(module: nn.Module) -> str:
    """The class of Transformers whose `forward` a module runs; "" if it runs other code, or Accelerate's around it."""
    return "" if "_hf_hook" in vars(module) else owner_of_forward(module) or ""


def _hooks(module: nn.Module) -> list[Any]:
    return [hook for name in _HOOKS for hook in getattr(module, name).values()]


def _listens(hook: Any) -> bool:
    """Whether a hook is there for the user: neither one that records when it is asked to, nor one of a call's own."""
    return not records(hook) and not getattr(hook, "of_one_call", False)


def chain_of(
    layer: Any,
    known: Architecture,
    stages: Stages,
    call: CallArguments,
    shape: torch.Size,
    tile: int,
    after: Callable[[Tensor, Tensor], Tensor],
) -> Chain | None:
    """The chain of one call of a layer; None if its arguments are not those of an ordinary training call.

    Args:
        layer: the pretrained layer.
        known: its row.
        stages: how it runs in stages.
        call: the arguments.
        shape: of the hidden state.
        tile: how many tokens a token-wise stage gets at once.
        after: (tile of the hidden state, tile of what attention made) -> the value: the last stage, adapters included.
    """

    def given(outside: Sequence[Tensor]) -> dict[str, Any]:
        args, kwargs = call.arguments(None, outside)
        found = arguments(layer, args, kwargs)
        found = found if known.extras else named(layer, found)
        return {name: value for name, value in found.items() if name not in known.withheld}

    if not call.plain or not stages.accepts(layer, given(call.outside), shape):
        return None
    if stages.returns_tuple:
        call.return_tuple()

    def before(hidden: Tensor | None, boundary: Boundary, outside: Sequence[Tensor], part: slice) -> Boundary:
        assert hidden is not None
        return stages.before(layer, hidden, given(outside), shape, part)

    def attend(hidden: Tensor | None, boundary: Boundary, outside: Sequence[Tensor], part: slice) -> Boundary:
        return (stages.attend(layer, boundary, given(outside)),)

    def behind(hidden: Tensor | None, boundary: Boundary, outside: Sequence[Tensor], part: slice) -> Boundary:
        assert hidden is not None
        return (after(hidden, boundary[0]),)

    return Chain((Stage(before), Stage(attend, tokenwise=False, reads=False), Stage(behind)), tile)
