"""Streams in pieces: tiles of tokens for functions that act on each alone, slabs of elements for the coupling.

A function that acts on each token alone (norm and feed-forward) can be run, inverted and differentiated tile by tile,
so that only one tile's activations exist at a time. The coupling acts on each element alone; in slabs, its temporaries
are small beside a stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Multiples of 8 elements, so that packed residues of any width begin at whole bytes. A slab of a CPU stays in its
# cache; on an accelerator few launches matter more.
_SMALLEST_SLAB = {"cpu": 1 << 18}
_SMALLEST_SLAB_ELSEWHERE = 1 << 24
_SLABS = 16


def tiles(shape: torch.Size, size: int | None) -> list[slice]:
    """Splits the tokens of a hidden state, all its dimensions but the last, into tiles of `size` (None: one tile).

    Example:
        >>> tiles(torch.Size([2, 5, 8]), 4)
        [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    """
    tokens = shape[:-1].numel()
    if size is None or tokens <= size:
        return [slice(0, tokens)]
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def tokens(stream: Tensor) -> Tensor:
    """Views a stream as (tokens, width)."""
    return stream.reshape(-1, stream.shape[-1])


def tile_of(stream: Tensor, tile: slice) -> Tensor:
    """Cuts a tile out of a stream, in as many dimensions: (1, ..., tokens, width); the stream itself if it is whole."""
    rows = tokens(stream)
    if tile.stop - tile.start == rows.shape[0]:
        return stream
    return rows[tile].view(*(1,) * (stream.dim() - 2), -1, stream.shape[-1])


def joined(pieces: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Puts the tiles of a stream together again; a single one is the stream itself."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([tokens(piece) for piece in pieces]).view(shape)


def slabs(stream: Tensor) -> Iterator[slice]:
    """Splits the elements of a stream, flattened, into at most 16 slabs that begin at multiples of 8."""
    elements = stream.numel()
    smallest = _SMALLEST_SLAB.get(stream.device.type, _SMALLEST_SLAB_ELSEWHERE)
    size = max(smallest, -(-elements // (8 * _SLABS)) * 8)
    for start in range(0, elements, size):
        yield slice(start, min(start + size, elements))


def packed_slab(residue: Tensor, elements: slice, bits: int) -> Tensor:
    """The bytes that hold the packed residues of some elements."""
    return residue[elements.start * bits // 8 : -(-elements.stop * bits // 8)]
