"""Tight packing of the remainders that fixed-point division would lose.

A lossy division by m leaves one remainder 0 <= r < m an element. `pack` stores n of them in
ceil(n * bits / 8) bytes, where bits = ceil(log2 m), and `unpack` gives them back.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_DIVISOR = 256


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
    if left_over == 0:
        groups = _grouped(flat.to(torch.uint8), per_byte)
        packed = groups[:, 0].clone()
        for slot in range(1, per_byte):
            packed |= groups[:, slot] << (slot * bits)
        return packed[:size]
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
    if left_over == 0:
        columns = [(packed >> (slot * bits)) & mask for slot in range(per_byte)]
        return torch.stack(columns, dim=1).reshape(-1)[:elements].to(torch.int32).reshape(shape)
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
