"""Layers in stages: which can be run so, and the engine's chain for one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from meft.engine.stages import Boundary, Chain, Stage

from .architectures import Architecture, architecture_of, owner_of_forward
from .architectures.attentions import ATTENTIONS, Attention, rotary_of, rotary_tile
from .architectures.base import arguments, named
from .calls import CallArguments
from .recording import records

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "meft")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def staged(layer: nn.Module, modules: Sequence[nn.Module]) -> tuple[Architecture, Attention] | str:
    """What is known of a layer that can run in stages, or why it runs as one.

    Stages call the layer's projections, norms and feed-forward, and neither the layer's own `forward` nor that of its
    attention: who overrides or listens to one of those gets the layer whole. So does who listens to a module that would
    be given tiles, and what no library made, since it may mix tokens.

    Args:
        layer: the pretrained layer.
        modules: it and all modules below it, and adapters.
    """
    known = architecture_of(layer)
    if known is None or known.halves is None:
        return f"the stages of a {type(layer).__name__} are not known"
    reason = known.refuses(layer)
    if reason is not None:
        return reason
    if len(known.halves[0].modules) != 1:
        return "something follows its attention"
    attention = getattr(layer, known.halves[0].modules[0])
    owner = owner_of_forward(attention)
    row = None if owner is None or "_hf_hook" in vars(attention) else ATTENTIONS.get(owner)
    if row is None:
        return f"the stages of a {type(attention).__name__} are not known"
    strangers = {*layer._modules} - known.children | {*attention._modules} - row.children
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
    return known, row


def _hooks(module: nn.Module) -> list[Any]:
    return [hook for name in _HOOKS for hook in getattr(module, name).values()]


def _listens(hook: Any) -> bool:
    """Whether a hook is there for the user: neither one that records when it is asked to, nor one of a call's own."""
    return not records(hook) and not getattr(hook, "of_one_call", False)


def chain_of(
    layer: Any,
    known: Architecture,
    row: Attention,
    call: CallArguments,
    shape: torch.Size,
    tile: int,
    around: Callable[[], AbstractContextManager[None]],
    last: Callable[[Tensor], Tensor] | None,
) -> Chain | None:
    """The chain of one call of a layer; None if its arguments are not those of an ordinary training call.

    Args:
        layer: the pretrained layer.
        known: its row.
        row: that of its attention.
        call: the arguments.
        shape: of the hidden state.
        tile: how many tokens a token-wise stage gets at once.
        around: what the feed-forward is run within, for the adapter beside it.
        last: the adapter behind the layer.
    """
    assert known.halves is not None
    half = known.halves[0]
    attention = getattr(layer, half.modules[0])

    def given(outside: Sequence[Tensor]) -> dict[str, Any]:
        args, kwargs = call.arguments(None, outside)
        found = arguments(layer, args, kwargs)
        found = found if known.extras else named(layer, found)
        return {name: value for name, value in found.items() if name not in known.withheld}

    if not call.plain:
        return None
    first = given(call.outside)
    if not rotary_of(first, shape) or first.get("output_attentions"):
        return None

    def before(hidden: Tensor | None, boundary: Boundary, outside: Sequence[Tensor], part: slice) -> Boundary:
        assert hidden is not None
        tables = rotary_tile(given(outside)["position_embeddings"], shape, part)
        return row.before(attention, half.enter(layer, hidden), tables)

    def attend(hidden: Tensor | None, boundary: Boundary, outside: Sequence[Tensor], part: slice) -> Boundary:
        q, k, v = boundary
        return (row.attend(attention, q, k, v, given(outside)),)

    def after(hidden: Tensor | None, boundary: Boundary, outside: Sequence[Tensor], part: slice) -> Boundary:
        assert hidden is not None
        hidden = half.leave(layer, hidden, attention.o_proj(boundary[0]))
        with around():
            output = known.feed_forward_block(layer, hidden)
        return (output if last is None else output + last(output),)

    return Chain((Stage(before), Stage(attend, tokenwise=False, reads=False), Stage(after)), tile)
