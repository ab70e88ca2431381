"""Codes to int32 words and back, and the two orders in which the words of a weight lie in memory.

A column `n` of `qweight` is a little-endian bit stream over the input features: code `k` occupies bits
`[k * bits, (k + 1) * bits)`, so a 3-bit code may span two words. A row of `qzeros` is such a stream over the
output features. Counts that do not fill the last word leave its high bits zero.

*Canonical* is the checkpoint's order, words `[R, N]`. *Blocked* is the order the kernels read: the same
words in column blocks of 16, `[ceil(N / 16), R, 16]`, missing columns zero, so that one row of a block is one
cache line and a block's rows follow each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import WORD, words

BLOCK = 16  # columns per block


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Pack the last dimension of `codes` as bit streams.

    Args:
        codes: integers in `[0, 2**bits)`, shape `[..., L]`.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 `[..., ceil(L * bits / 32)]`.
    """
    length = codes.shape[-1]
    # 32 codes fill `bits` words exactly, whatever the width.
    chunks = torch.nn.functional.pad(codes, (0, -length % WORD)).unflatten(-1, (-1, WORD))
    out = torch.zeros(*chunks.shape[:-1], bits, dtype=torch.int64, device=codes.device)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        code = chunks[..., i].to(torch.int64)
        out[..., word] |= code << shift
        if shift + bits > WORD:
            out[..., word + 1] |= code >> (WORD - shift)
    # A word with its top bit set is a negative int32.
    return out.flatten(-2)[..., : words(length, bits)].to(torch.int32)


def unpack_stream(packed: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of `pack_stream`.

    Args:
        packed: int32 `[..., words(length, bits)]`.

    Returns:
        uint8 `[..., length]`.
    """
    count = -(-length // WORD) * bits
    chunks = torch.nn.functional.pad(packed, (0, count - packed.shape[-1])).unflatten(-1, (-1, bits))
    out = torch.empty(*chunks.shape[:-1], WORD, dtype=torch.uint8, device=packed.device)
    mask = 2**bits - 1
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        code = chunks[..., word] >> shift  # arithmetic: the mask below removes the copies of the sign
        if shift + bits > WORD:
            code = (code & (2 ** (WORD - shift) - 1)) | (chunks[..., word + 1] << (WORD - shift))
        out[..., i] = code & mask
    return out.flatten(-2)[..., :length]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes `[N, K]` to canonical qweight int32 `[ceil(K * bits / 32), N]`."""
    return pack_stream(codes, bits).T.contiguous()


def unpack_codes(qweight: Tensor, bits: int, in_features: int) -> Tensor:
    """Canonical qweight to codes, uint8 `[N, K]`."""
    return unpack_stream(qweight.T, bits, in_features)


def slice_codes(qweight: Tensor, bits: int, start: int, stop: int) -> Tensor:
    """Canonical qweight of input features `[start, stop)`, int32 `[ceil((stop - start) * bits / 32), N]`.

    Where both ends fall between words the words themselves are cut, without a copy.
    """
    if start * bits % WORD == 0 and stop * bits % WORD == 0:
        return qweight[start * bits // WORD : stop * bits // WORD]
    aligned = start // WORD * WORD  # 32 codes fill whole words, whatever the width
    needed = qweight[aligned * bits // WORD : words(stop, bits)]
    return pack_codes(unpack_codes(needed, bits, stop - aligned)[:, start - aligned :], bits)


def pack_zeros(zeros: Tensor, bits: int, zero_offset: int) -> Tensor:
    """Zeros `[G, N]` to qzeros int32 `[G, ceil(N * bits / 32)]`.

    Raises:
        ValueError: a zero whose field, `zero - zero_offset`, needs more than `bits` bits or is negative.
    """
    fields = zeros.to(torch.int32) - zero_offset
    low, high = int(fields.min()), int(fields.max())
    if low < 0 or high > 2**bits - 1:
        bad = low if low < 0 else high
        raise ValueError(
            f"zero point {bad + zero_offset} does not fit a {bits}-bit field of the "
            f"{'v1' if zero_offset else 'v2'} format; accepted are {zero_offset} to {2**bits - 1 + zero_offset}"
        )
    return pack_stream(fields, bits)


def unpack_zeros(qzeros: Tensor, bits: int, zero_offset: int, out_features: int) -> Tensor:
    """qzeros to zeros, int32 `[G, N]`. The offset is added per field, so nothing carries into a neighbour."""
    return unpack_stream(qzeros, bits, out_features).to(torch.int32) + zero_offset


def to_canonical(qweight: Tensor, out_features: int) -> Tensor:
    """Blocked `[ceil(N / 16), R, 16]` to canonical `[R, N]`; a canonical tensor is returned as it is."""
    if qweight.dim() == 2:
        return qweight
    return qweight.transpose(0, 1).flatten(1)[:, :out_features].contiguous()


def permute_rows(qweight: Tensor, bits: int, order: Tensor) -> Tensor:
    """Canonical qweight with input feature `order[i]` in place `i`. Shape `[ceil(K * bits / 32), N]`."""
    return pack_codes(unpack_codes(qweight, bits, order.numel())[:, order], bits)
