"""What is known of each family of pretrained layers: where its feed-forward is, and where a layer splits in two.

One file a family, one row a layer class in the table below. Layers without a row work with every coupling that takes
the layer as a black box, as long as their feed-forward is one child with a usual name (`GENERIC_FEED_FORWARD`).
"""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedModelError
from . import bart, bert, opt
from .base import Architecture

TABLE: dict[str, Architecture] = {
    "BertLayer": bert.LAYER,
    "RobertaLayer": bert.LAYER,
    "BartEncoderLayer": bart.ENCODER_LAYER,
    "BartDecoderLayer": bart.DECODER_LAYER,
    "OPTDecoderLayer": opt.LAYER,
}

GENERIC_FEED_FORWARD = ("mlp", "feed_forward", "ffn")

__all__ = ["TABLE", "Architecture", "architecture_of", "feed_forward_of", "split_of"]


def architecture_of(layer: nn.Module) -> Architecture | None:
    """Returns what is known of a pretrained layer's class, or None."""
    for cls in type(layer).__mro__:
        if cls.__name__ in TABLE:
            return TABLE[cls.__name__]
    return None


def feed_forward_of(layer: nn.Module, name: str) -> tuple[nn.Module, nn.Module]:
    """Finds the modules through which a layer's feed-forward is entered and left.

    Raises:
        UnsupportedModelError: the layer has no row in the table and no child with a usual name.
    """
    known = architecture_of(layer)
    if known is not None:
        return layer.get_submodule(known.feed_forward_entry), layer.get_submodule(known.feed_forward_exit)
    children = dict(layer.named_children())
    found = [children[child] for child in GENERIC_FEED_FORWARD if child in children]
    if len(found) == 1:
        return found[0], found[0]
    raise UnsupportedModelError(
        f"{name} is a {type(layer).__name__}, whose feed-forward is not known: it has the children "
        f"{', '.join(children)}. Known layers: {', '.join(TABLE)}; others need one child named "
        f'{" or ".join(GENERIC_FEED_FORWARD)}. Use make_reversible(model, coupling="momentum") with LoRA instead.'
    )


def split_of(layer: nn.Module, name: str) -> Architecture:
    """Returns how a layer splits into an attention block and a feed-forward block.

    Raises:
        UnsupportedModelError: the layer has no row in the table.
    """
    known = architecture_of(layer)
    if known is None:
        raise UnsupportedModelError(
            f'coupling="meft3" cannot split {name}, a {type(layer).__name__}, into an attention and a feed-forward '
            f'block. It knows {", ".join(TABLE)}. Use coupling="meft1", "meft2" or "momentum", which take a layer as a '
            "whole."
        )
    return known
