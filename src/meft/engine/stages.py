"""Chains of stages: a step's function in parts, so that one part's activations exist at a time (`engine`, rule 9).

A stage maps boundary tensors to boundary tensors. A token-wise one acts on each token alone and is run tile by tile; a
whole one (attention) sees all tokens at once. The first reads the stream; later ones read what the one before returned,
and the stream too where they say so. Boundaries have the hidden state's dimensions but for the last.

The forward pass keeps nothing but the present boundary. The backward pass runs the chain once more: whole stages keep
their graph until their gradient comes, token-wise ones are run again, tile by tile, when it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .routes import Attach, Severed, placeholder
from .tiles import tile_of, tiles, tokens

Boundary = tuple[Tensor, ...]
"""What stands between two stages: tensors of the hidden state's shape but for the last dimension."""


@dataclass(frozen=True)
class Stage:
    """One part of a step's function.

    Attributes:
        function: (stream as hidden state or None, boundary, outside tensors, tile) -> boundary; for the last stage the
            value of the step's function, alone.
        tokenwise: whether it acts on each token alone. It is then given tiles, of shape (1, ..., tokens, width), and
            the slice of all tokens, flattened, that they are.
        reads: whether it reads the stream.
    """

    function: Callable[[Tensor | None, Boundary, Sequence[Tensor], slice], Boundary]
    tokenwise: bool = True
    reads: bool = True


@dataclass(frozen=True)
class Chain:
    """A step's function as a chain of stages.

    Attributes:
        stages: in order; the last one is token-wise, and reads the stream or not.
        tile_size: how many tokens a token-wise stage gets at once.
    """

    stages: tuple[Stage, ...]
    tile_size: int | None

    @property
    def last(self) -> int:
        return len(self.stages) - 1

    def tiles(self, index: int, shape: torch.Size) -> list[slice]:
        """The tiles in which a stage is run."""
        return tiles(shape, self.tile_size if self.stages[index].tokenwise else None)

    def cached(self, source: Tensor, outside: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Runs the chain under ordinary autograd; returns its value."""
        boundary: Boundary = ()
        for index, stage in enumerate(self.stages):
            pieces = []
            for part in self.tiles(index, shape):
                hidden = tile_of(source, part) if stage.reads else None
                pieces.append(stage.function(hidden, cut(boundary, part), outside, part))
            boundary = tuple(_joined(column, shape) for column in zip(*pieces, strict=True))
        return boundary[0]


def cut(boundary: Boundary, part: slice) -> Boundary:
    """A tile of every tensor of a boundary."""
    return tuple(tile_of(tensor, part) for tensor in boundary)


class Gathered:
    """A boundary that is put together tile by tile, each written to its place: no second copy of it ever exists."""

    def __init__(self, shape: torch.Size, parts: int) -> None:
        self.shape, self.parts = shape, parts
        self.found: list[Tensor | None] = []

    def put(self, part: slice, pieces: Sequence[Tensor | None]) -> None:
        """Takes the tensors of one tile; None where there is none in this tile (a gradient that is zero)."""
        if self.parts == 1:
            self.found = list(pieces)
            return
        self.found = self.found or [None] * len(pieces)
        for index, piece in enumerate(pieces):
            if piece is None:
                continue
            whole = self.found[index]
            if whole is None:
                whole = self.found[index] = piece.new_zeros((*self.shape[:-1], piece.shape[-1]))
            tokens(whole)[part] = tokens(piece)

    def values(self) -> Boundary:
        return tuple(tensor for tensor in self.found if tensor is not None)


def _joined(pieces: Sequence[Tensor], shape: torch.Size) -> Tensor:
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([tokens(piece) for piece in pieces]).view(*shape[:-1], pieces[0].shape[-1])


@dataclass
class Run:
    """One run of a stage with its graph.

    Attributes:
        source: the leaf that stands for the stream, or None.
        leaves: those that stand for the boundary.
        ends: where the graph of this run ends: these, and what was given in their place.
        values: what the stage returned.
        entry: where gradients of the stream are summed up, all but the leaf; None in the forward run.
    """

    source: Tensor | None
    leaves: tuple[Tensor, ...]
    ends: tuple[Tensor, ...]
    values: Boundary
    entry: GradientEdge | None = None

    def edges(self) -> list[tuple[GradientEdge, torch.dtype] | None]:
        """Edges of the graph in the place of the values, which are let go of."""
        found = [(get_gradient_edge(value), value.dtype) if value.requires_grad else None for value in self.values]
        self.values = self.ends = ()
        return found


def run_stage(
    stage: Stage,
    hidden: Tensor | None,
    boundary: Boundary,
    outside: Sequence[Tensor],
    part: slice,
    attach: Callable[[Tensor, slice], Tensor] | None = None,
    handle: Tensor | None = None,
) -> Run:
    """Runs one stage on one tile, with a graph that ends at what it read.

    Args:
        stage: the stage.
        hidden: the stream's tile as a hidden state, where it reads it.
        boundary: the tile of what the stage before returned.
        outside: the step's outside tensors.
        part: the tile.
        attach: hangs what it reads on to the graph below, in the forward run.
        handle: beside `attach`, what boundaries hang on to, to say that no gradient can pass them.
    """
    source: Tensor | None = None
    read: Tensor | None = None
    if hidden is not None:
        # The leaf holds no memory, so that the hidden state lives no longer than the function needs it.
        source = placeholder(hidden).requires_grad_()
        read = Attach.apply(hidden, source) if attach is None else attach(hidden, part)
    leaves = tuple(placeholder(tensor).requires_grad_() for tensor in boundary)
    if attach is None or handle is None:
        given = tuple(Attach.apply(tensor, leaf) for tensor, leaf in zip(boundary, leaves, strict=True))
    else:
        given = tuple(Severed.apply(tensor, handle) for tensor in boundary)
    values = stage.function(read, given, [tensor.view_as(tensor) for tensor in outside], part)
    ends = (*leaves, *given, *(tensor for tensor in (source, read) if tensor is not None))
    entry = None if read is None or attach is not None else get_gradient_edge(read)
    return Run(source, leaves, ends, values, entry)
