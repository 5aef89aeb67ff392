from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meft.engine import residues
from meft.engine.residues import bits_for, pack, packed_bytes, unpack


@pytest.mark.parametrize(
    ("divisor", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (10, 4), (16, 4), (129, 8), (256, 8)]
)
def test_bits_are_the_ceiling_of_the_logarithm(divisor: int, bits: int) -> None:
    assert bits_for(divisor) == bits


@given(st.integers(1, 8), st.integers(0, 70), st.randoms(use_true_random=False))
def test_unpack_gives_back_what_pack_stored_in_the_exact_size(bits: int, elements: int, random) -> None:
    values = torch.tensor([random.randrange(2**bits) for _ in range(elements)], dtype=torch.int32)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.nbytes == -(-elements * bits // 8) == packed_bytes(elements, bits)
    assert torch.equal(unpack(packed, bits, values.shape), values)


def test_three_bits_pack_eight_to_three_bytes_and_four_bits_two_to_a_byte() -> None:
    eight = torch.arange(8, dtype=torch.int32)
    assert pack(eight, 3).nbytes == 3
    assert pack(eight, 4).nbytes == 4
    # Low bits first: 0b111_110_101_100_011_010_001_000.
    assert pack(eight, 3).tolist() == [0b10001000, 0b11000110, 0b11111010]


def test_non_contiguous_values_and_their_shape_survive() -> None:
    values = torch.randint(0, 8, (3, 4, 5), dtype=torch.int32).transpose(0, 2)[:, 1:]
    assert torch.equal(unpack(pack(values, 3), 3, values.shape), values)


def test_packed_residues_own_no_more_memory_than_they_need() -> None:
    packed = pack(torch.zeros(1001, dtype=torch.int32), 3)
    assert packed.untyped_storage().nbytes() == 376


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("elements", [0, 1, 7, 8, 1003])
def test_whole_words_are_packed_as_single_places(bits: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(0, 2**bits, (elements,), dtype=torch.int32)
    packed = pack(values, bits)
    monkeypatch.setattr(residues, "_LITTLE", False)
    assert torch.equal(pack(values, bits), packed)
    assert torch.equal(unpack(packed, bits, values.shape), values)
