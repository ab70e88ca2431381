"""Codes, scales and zeros: the arithmetic that every other part refers to.

`weight[n, k] = (code[n, k] - zero[g, n]) * scale[g, n]` with `g = group[k]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import packing
from .spec import QuantSpec


def natural_groups(in_features: int, group_size: int, device: torch.device | str = "cpu") -> Tensor:
    """The trivial g_idx: `k // group_size`, int32 `[K]`."""
    width = in_features if group_size == -1 else min(group_size, in_features)  # more overflows int32
    return torch.arange(in_features, dtype=torch.int32, device=device) // width


def quantize(weight: Tensor, scales: Tensor, zeros: Tensor, group: Tensor, bits: int) -> Tensor:
    """Round to the nearest code.

    Args:
        weight: float `[N, K]`.
        scales: `[G, N]`, finite and nonzero, either sign.
        zeros: integers `[G, N]`.
        group: group of every column, `[K]`.
        bits: width of a code.

    Returns:
        uint8 codes `[N, K]`. Halves go to the even neighbour.
    """
    index = group.long()
    s, z = scales.T[:, index].to(weight.dtype), zeros.T[:, index].to(weight.dtype)
    return (torch.round(weight / s) + z).clamp_(0, 2**bits - 1).to(torch.uint8)


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor, group: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Codes `[N, K]` back to a weight `[N, K]`: the product in fp32, rounded once to `dtype`."""
    index = group.long()
    s = scales.T[:, index].float()
    return ((codes.float() - zeros.T[:, index].float()) * s).to(dtype)


@dataclass
class QuantizedWeight:
    """One quantized weight `[N, K]`, unpacked.

    Args:
        codes: uint8 `[N, K]`.
        scales: `[G, N]` in the dtype they are stored in.
        zeros: int32 `[G, N]`.
        group: int32 `[K]`, the checkpoint's g_idx.
        spec: bits, format.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group: Tensor
    spec: QuantSpec

    def pack(self) -> dict[str, Tensor]:
        """The canonical tensors qweight, qzeros, scales, g_idx."""
        return {
            "qweight": packing.pack_codes(self.codes, self.spec.bits),
            "qzeros": packing.pack_zeros(self.zeros, self.spec.bits, self.spec.zero_offset),
            "scales": self.scales,
            "g_idx": self.group,
        }

    @classmethod
    def unpack(cls, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, spec: QuantSpec) -> QuantizedWeight:
        """From canonical tensors; `K` is g_idx's length, `N` is scales' width."""
        return cls(
            codes=packing.unpack_codes(qweight, spec.bits, g_idx.numel()),
            scales=scales,
            zeros=packing.unpack_zeros(qzeros, spec.bits, spec.zero_offset, scales.shape[1]),
            group=g_idx,
            spec=spec,
        )

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same on another device."""
        tensors = {name: getattr(self, name).to(device) for name in ("codes", "scales", "zeros", "group")}
        return replace(self, **tensors)

    def rows(self, rows: slice) -> QuantizedWeight:
        """The same for some output features."""
        return QuantizedWeight(self.codes[rows], self.scales[:, rows], self.zeros[:, rows], self.group, self.spec)

    def slabs(self, weights: int = 1 << 21) -> Iterator[slice]:
        """Rows in pieces of about so many weights, for work that needs several times their memory."""
        step = max(1, weights // max(1, self.codes.shape[1]))
        for start in range(0, self.codes.shape[0], step):
            yield slice(start, start + step)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` that the codes stand for."""
        return dequantize(self.codes, self.scales, self.zeros, self.group, dtype)
