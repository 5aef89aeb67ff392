"""What is known of each family of pretrained layers: where its feed-forward is, and where a layer splits in two.

One file a family or layout, each with `ROWS`: one row a layer class. Layers without a row work with every coupling that
takes the layer as a black box, as long as their feed-forward has a usual name (`placement.py`) or is named by
`feedforward_module`. docs/architectures.md explains the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from meft.errors import ConfigError, UnsupportedModelError

from . import (
    albert,
    bart,
    bert,
    bloom,
    clip,
    deberta,
    dinov2,
    distilbert,
    gemma,
    gpt2,
    gpt_neox,
    granite,
    llama,
    llama4,
    mbart,
    modernbert,
    moonshine,
    olmo2,
    opt,
    parallel,
    t5,
    t5gemma,
    vit,
    wav2vec2,
)
from .base import Architecture
from .norms import last_is_norm
from .placement import PAIRS, WHOLE, submodule, usual

FAMILIES = (
    albert,
    bart,
    bert,
    bloom,
    clip,
    deberta,
    dinov2,
    distilbert,
    gemma,
    gpt2,
    gpt_neox,
    granite,
    llama,
    llama4,
    mbart,
    modernbert,
    moonshine,
    olmo2,
    opt,
    t5,
    t5gemma,
    vit,
    wav2vec2,
)

TABLE: dict[str, Architecture] = {name: row for family in FAMILIES for name, row in family.ROWS.items()}
"""Layer classes of Transformers, by name, and what is known of them."""

__all__ = [
    "FAMILIES",
    "TABLE",
    "Architecture",
    "architecture_of",
    "ends_in_norm",
    "feed_forward_of",
    "owner_of_forward",
    "split_of",
]

_INSTEAD = 'Use coupling="meft1", "meft2" or "momentum", which take a layer as a whole.'


def architecture_of(layer: nn.Module) -> Architecture | None:
    """Returns what is known of a pretrained layer, or None.

    A row holds for a layer that runs the `forward` of the row's class: for subclasses too unless they override it, and
    not for other classes that happen to have the name.
    """
    owner = owner_of_forward(layer)
    return None if owner is None else TABLE.get(owner)


def ends_in_norm(layer: nn.Module, width: int) -> bool:
    """Tells whether what a layer returns was made by a norm (BERT), or by adding to its input (GPT-2, Llama).

    The layer is asked, not its name: the part of it that needs nothing but a hidden state is run on two tokens, its
    feed-forward block where the table knows one, the whole layer otherwise. A layer that does not run so counts as one
    that does not end in a norm.
    """
    try:
        # What the layer keeps of a run, it keeps on the copy, which shares the weights alone.
        layer = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
    except Exception:
        return False
    known = architecture_of(layer)
    if known is None or known.refuses(layer) is not None:
        return last_is_norm(layer, layer, width)
    return last_is_norm(layer, partial(known.feed_forward_block, layer), width)


def feed_forward_of(layer: nn.Module, name: str, chosen: str | None = None) -> tuple[nn.Module, nn.Module]:
    """Finds the modules through which a layer's feed-forward is entered and left.

    Args:
        layer: the pretrained layer.
        name: its place in the model, for messages.
        chosen: the user's choice, which wins over the table and the rule: a module of the layer by its dotted path, or
            "first:last" where the feed-forward is entered and left through two.

    Raises:
        ConfigError: the layer has no module called `chosen`.
        UnsupportedModelError: nothing was chosen, and the feed-forward is not known.
    """
    if chosen is not None:
        entry, _, exit_ = chosen.partition(":")
        return _chosen(layer, name, chosen, entry), _chosen(layer, name, chosen, exit_ or entry)
    known = architecture_of(layer)
    if known is not None:
        ends = submodule(layer, known.feed_forward_entry), submodule(layer, known.feed_forward_exit)
        if ends[0] is not None and ends[1] is not None:
            return ends[0], ends[1]
    found = usual(layer)
    if len(found) == 1:
        return found[0]
    why = "none" if not found else "several"
    raise UnsupportedModelError(
        f"{name} is a {type(layer).__name__}, whose feed-forward is not known: of its children "
        f"{_children(layer)}, {why} can be told to be the feed-forward. Usual names are {', '.join(WHOLE)}, and pairs "
        f"such as {' and '.join(PAIRS[0])}. Name it with feedforward_module, such as "
        'feedforward_module="mlp", or use make_reversible(model, coupling="momentum") with LoRA instead.'
    )


def split_of(layer: nn.Module, name: str, asked: str = 'coupling="meft3"') -> Architecture:
    """Returns how a layer splits into an attention block and a feed-forward block.

    Args:
        layer: the pretrained layer.
        name: what messages call it.
        asked: the option that needs the blocks, for messages.

    Raises:
        UnsupportedModelError: the layer has no row in the table, is laid out so that it does not split, or has a child
            that its blocks would leave out.
    """
    owner, kind = owner_of_forward(layer), type(layer).__name__
    known = architecture_of(layer)
    refused = f"{asked} cannot split {name}, a {kind}, into an attention and a feed-forward block"
    reason = parallel.always(layer, owner) if known is None else known.refuses(layer)
    if reason is not None:
        raise UnsupportedModelError(f"{refused}: {reason}. {_INSTEAD}")
    if known is None:
        families = ", ".join(family.__name__.rpartition(".")[2] for family in FAMILIES)
        unknown = "its forward is not the one of Transformers" if owner is None and kind in TABLE else "it is not known"
        raise UnsupportedModelError(
            f"{refused}: {unknown}. The known layers are those of {families} and what is laid out as they are "
            f"(meft.backbone.architectures.TABLE). {_INSTEAD}"
        )
    strangers = [child for child, _ in layer.named_children() if child not in known.children]
    if strangers:
        raise UnsupportedModelError(
            f"{refused}: it has {' and '.join(strangers)} besides {', '.join(sorted(known.children))}, and the blocks "
            f"would leave {'them' if len(strangers) > 1 else 'it'} out. {_INSTEAD}"
        )
    return known


def owner_of_forward(layer: nn.Module) -> str | None:
    """Returns the name of the Transformers class whose `forward` a layer runs; None if it runs code from elsewhere."""
    if "forward" in vars(layer) and not hasattr(layer, "_hf_hook"):
        return None  # Replaced on the instance; Accelerate does so too, around the same code.
    forward = _unwrapped(type(layer).forward)
    if not _module(forward).startswith("transformers.models."):
        return None
    owner, _, method = forward.__qualname__.rpartition(".")
    return owner if method == "forward" else None


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Looks through decorators of Transformers (gradient checkpointing wraps each class), not through others."""
    while hasattr(function, "__wrapped__") and _module(function).startswith("transformers."):
        function = function.__wrapped__
    return function


def _module(function: Callable[..., Any]) -> str:
    """Where a function's code stands; its `__module__` is copied by wrappers."""
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


def _chosen(layer: nn.Module, name: str, chosen: str, path: str) -> nn.Module:
    module = submodule(layer, path)
    if module is None or isinstance(module, nn.ModuleList | nn.ModuleDict):
        found = "names no module" if module is None else "names a list of modules, which is never called,"
        raise ConfigError(
            f"feedforward_module={chosen!r} {found} in {name}, a {type(layer).__name__}. Its children are "
            f'{_children(layer)}. Give one of them, a dotted path such as "output.dense", or the first and the last '
            'of a feed-forward in two modules, such as "fc1:fc2".'
        )
    return module


def _children(layer: nn.Module) -> str:
    return ", ".join(child for child, _ in layer.named_children()) or "none"
