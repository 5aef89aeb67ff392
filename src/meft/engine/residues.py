"""Tight packing of the remainders that fixed-point division would lose.

A lossy division by m leaves one remainder 0 <= r < m an element. `pack` stores n of them in
ceil(n * bits / 8) bytes, where bits = ceil(log2 m), and `unpack` gives them back.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

MAX_DIVISOR = 256

# Where several remainders share a byte, as many bytes as share one make up a word of this type, and whole words are
# shifted at once: a strided pass over each place in a byte takes ten times as long.
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_LITTLE = sys.byteorder == "little"


def bits_for(divisor: int) -> int:
    """Returns how many bits a remainder of `divisor` needs: ceil(log2 divisor).

    Example:
        >>> bits_for(1), bits_for(8), bits_for(10), bits_for(256)
        (0, 3, 4, 8)
    """
    return (divisor - 1).bit_length()


def packed_bytes(elements: int, bits: int) -> int:
    """Returns the size in bytes of `elements` packed remainders: ceil(elements * bits / 8)."""
    return (elements * bits + 7) // 8


def pack(remainders: Tensor, bits: int) -> Tensor:
    """Packs remainders into bytes, eight of them to `bits` bytes.

    Example:
        >>> pack(torch.tensor([1, 2, 3, 0]), bits=2)
        tensor([57], dtype=torch.uint8)

    Args:
        remainders: integers in [0, 2**bits), any shape, any integer dtype.
        bits: 1 to 8.

    Returns:
        uint8 tensor of shape (ceil(n * bits / 8),) on the same device.
    """
    flat = remainders.reshape(-1)
    size = packed_bytes(flat.numel(), bits)
    per_byte, left_over = divmod(8, bits)
    if bits == 8:
        return flat.to(torch.uint8, copy=True)
    if left_over == 0 and _LITTLE:
        words = _grouped(flat.to(torch.uint8), per_byte).view(_WORDS[per_byte]).reshape(-1)
        packed = words.clone()
        for slot in range(1, per_byte):
            # From its own byte down to its place in the lowest one; what lands above is cut off.
            packed |= words >> slot * (8 - bits)
        return packed.to(torch.uint8)
    groups = _grouped(flat, 8)
    word = groups[:, 0].to(torch.int64)
    for slot in range(1, 8):
        word |= groups[:, slot].to(torch.int64) << (slot * bits)
    columns = [(word >> (8 * byte)).to(torch.uint8) for byte in range(bits)]
    return torch.stack(columns, dim=1).reshape(-1)[:size].clone()


def unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Gives back what `pack` stored, as int32 of the given shape."""
    elements = shape.numel()
    mask = (1 << bits) - 1
    per_byte, left_over = divmod(8, bits)
    if bits == 8:
        return packed.to(torch.int32).reshape(shape)
    if left_over == 0 and _LITTLE:
        packed = packed.to(_WORDS[per_byte])
        words = packed.clone()
        for slot in range(1, per_byte):
            words |= packed << slot * (8 - bits)
        words &= int.from_bytes(bytes([mask] * per_byte), "little")
        return words.view(torch.uint8)[:elements].to(torch.int32).reshape(shape)
    groups = _grouped(packed, bits)
    word = groups[:, 0].to(torch.int64)
    for byte in range(1, bits):
        word |= groups[:, byte].to(torch.int64) << (8 * byte)
    columns = [((word >> (slot * bits)) & mask).to(torch.int32) for slot in range(8)]
    return torch.stack(columns, dim=1).reshape(-1)[:elements].reshape(shape)


def _grouped(flat: Tensor, size: int) -> Tensor:
    """Views a vector as rows of `size`, padded with zeros at the end where it does not divide."""
    missing = -flat.numel() % size
    if missing:
        flat = torch.nn.functional.pad(flat, (0, missing))
    return flat.reshape(-1, size)
