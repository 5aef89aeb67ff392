"""Where the feed-forward of a layer without a row in the table is: by the names its children usually have."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

Ends = tuple[nn.Module, nn.Module]

WHOLE = (
    "mlp",
    "feed_forward",
    "feedforward",
    "ffn",
    "ff",
    "ffwd",
    "mlp_block",
    "block_sparse_moe",
    "moe",
    "moe_layer",
    "moe_block",
    "DenseReluDense",
)
"""Children that are the whole feed-forward, mixtures of experts included."""

MIXERS = ("mixer", "mamba", "mamba_decoder", "temporal_block", "mlstm_layer", "linear_attn", "self_attn", "conv")
"""Children that mix tokens, beside which the adapter of a layer without a feed-forward stands."""

PAIRS = (
    ("fc1", "fc2"),
    ("linear1", "linear2"),
    ("lin1", "lin2"),
    ("ffn", "ffn_output"),
    ("intermediate", "output.dense"),
    ("intermediate_dense", "output_dense"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("wi", "wo"),
    ("ff.layer_1", "ff.layer_2"),
    ("ffn.linear_1", "ffn.linear_2"),
)
"""Where a feed-forward is entered and left, where it has no module of its own, or one that also adds its input and
norms the sum (XLNet, Funnel): what is beside that would come behind the layer's last norm."""


def usual(layer: nn.Module) -> list[Ends]:
    """Finds the feed-forwards with usual names: children of the layer, else of one of its children, else its mixer."""
    return list(_among(layer)) or [ends for part in _parts(layer) for ends in _among(part)] or list(_mixers(layer))


def submodule(layer: nn.Module, path: str) -> nn.Module | None:
    """The module under a dotted path, "-1" being the last of a list; None if there is none."""
    module: object = layer
    for name in path.split("."):
        if isinstance(module, nn.ModuleList | nn.Sequential) and name.lstrip("-").isdigit():
            index = int(name)
            module = module[index] if -len(module) <= index < len(module) else None
        else:
            module = getattr(module, name, None)
    return module if isinstance(module, nn.Module) and module is not layer else None


def _among(module: nn.Module) -> Iterator[Ends]:
    children = dict(module.named_children())
    inside = set()
    for first, last in PAIRS:
        entry, exit_ = submodule(module, first), submodule(module, last)
        if entry is not None and exit_ is not None and _fits(entry, exit_):
            inside.add(first.partition(".")[0])
            yield entry, exit_
    for name in WHOLE:
        if name in children and name not in inside and _fits(children[name], children[name]):
            yield children[name], children[name]


def _mixers(layer: nn.Module) -> Iterator[Ends]:
    """The one part of a layer without a feed-forward (Mamba): the adapter stands beside it."""
    children = dict(layer.named_children())
    mixer = next((children[name] for name in MIXERS if name in children), None)
    if mixer is not None:
        yield mixer, mixer


def _fits(entry: nn.Module, exit_: nn.Module) -> bool:
    """Containers are never called; a lone projection to another width is only the first half of a feed-forward."""
    if isinstance(entry, nn.ModuleList | nn.ModuleDict):
        return False
    width_in, width_out = getattr(entry, "in_features", None), getattr(exit_, "out_features", None)
    return width_in is None or width_out is None or width_in == width_out


def _parts(layer: nn.Module) -> Iterator[nn.Module]:
    """What may hold a feed-forward: children, and those in lists of children, attention aside."""
    for name, child in layer.named_children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif "att" not in name.lower():
            yield child
