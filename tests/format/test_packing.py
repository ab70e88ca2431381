"""Packing, bit for bit, against a loop over bits and against bytes written down by hand."""

from __future__ import annotations

import numpy as np
import pytest
import references
import torch

from hf_gptq_plugin.format import packing
from hf_gptq_plugin.format.spec import BITS


def codes_of(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 32), (5, 33), (7, 100), (16, 576)])
def test_codes_pack_as_a_bit_stream(bits: int, shape: tuple[int, int]) -> None:
    codes = codes_of(bits, *shape)
    packed = packing.pack_codes(codes, bits)
    assert packed.dtype == torch.int32
    np.testing.assert_array_equal(packed.numpy(), references.pack_weight(codes.numpy(), bits))
    assert torch.equal(packing.unpack_codes(packed, bits, shape[1]), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("columns", [1, 40, 96])
def test_zeros_pack_as_a_bit_stream(bits: int, offset: int, columns: int) -> None:
    zeros = codes_of(bits, 3, columns).int() + offset
    packed = packing.pack_zeros(zeros, bits, offset)
    np.testing.assert_array_equal(packed.numpy(), references.pack_zeros(zeros.numpy(), bits, offset))
    assert torch.equal(packing.unpack_zeros(packed, bits, offset, columns), zeros)


# Written down from the format's definition: code k in bits [k * bits, (k + 1) * bits).
GOLDEN = {
    2: (list(range(4)) * 4, [0xE4E4E4E4]),
    4: (list(range(8)), [0x76543210]),
    8: ([0x01, 0x80, 0xFF, 0x7F], [0x7FFF8001]),
    # 0..7 four times; the 11th code (2 = 0b010) has two bits in the first word, the 22nd (5) one bit in the second.
    3: (list(range(8)) * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
}


@pytest.mark.parametrize("bits", BITS)
def test_golden_words(bits: int) -> None:
    codes, words = GOLDEN[bits]
    packed = packing.pack_stream(torch.tensor(codes, dtype=torch.uint8), bits)
    assert [w & 0xFFFFFFFF for w in packed.tolist()] == words


def test_v1_zero_of_the_whole_field_does_not_carry() -> None:
    # Fields 15, 0, 15, ...: adding a packed constant would carry from each 15 into its neighbour.
    packed = packing.pack_stream(torch.tensor([[15, 0] * 4]), 4)
    assert packing.unpack_zeros(packed, 4, 1, 8).tolist() == [[16, 1] * 4]


@pytest.mark.parametrize(("zero", "offset"), [(0, 1), (17, 1), (-1, 0), (16, 0)])
def test_zero_outside_the_field_is_refused(zero: int, offset: int) -> None:
    with pytest.raises(ValueError, match=f"zero point {zero} does not fit a 4-bit field.*accepted are {offset} to"):
        packing.pack_zeros(torch.tensor([[8, zero]]), 4, offset)


@pytest.mark.parametrize("columns", [1, 16, 40])
def test_blocked_layout(columns: int) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (5, columns), dtype=torch.int32)
    blocked = torch.zeros(-(-columns // 16), 5, 16, dtype=torch.int32)
    for r in range(5):
        for n in range(columns):
            blocked[n // 16, r, n % 16] = words[r, n]
    assert torch.equal(packing.to_canonical(blocked, columns), words)


@pytest.mark.parametrize("bits", BITS)
def test_permuted_rows(bits: int) -> None:
    codes, order = codes_of(bits, 6, 50), torch.randperm(50)
    permuted = packing.permute_rows(packing.pack_codes(codes, bits), bits, order)
    assert torch.equal(packing.unpack_codes(permuted, bits, 50), codes[:, order])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("start", "stop"), [(0, 32), (32, 96), (0, 100), (40, 77), (5, 6), (33, 33)])
def test_sliced_rows(bits: int, start: int, stop: int) -> None:
    codes = codes_of(bits, 6, 100)
    part = packing.slice_codes(packing.pack_codes(codes, bits), bits, start, stop)
    np.testing.assert_array_equal(part.numpy(), packing.pack_codes(codes[:, start:stop], bits).numpy())
