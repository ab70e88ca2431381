"""Quantized weights as GGUF's blocks of 32: codes and scales go over as they are, nothing is quantized again.

===== =========================================== =================== =========================================
type  block of 32 weights                         weight              holds
===== =========================================== =================== =========================================
Q4_0  fp16 d, 16 bytes of nibbles                 d (q - 8)           code - zero from -8 to 7: symmetric 4 bit,
                                                                      and every 2 and 3 bit
Q4_1  fp16 d, fp16 m, 16 bytes of nibbles         d q + m             every 4 bit; m = -scale zero is rounded
Q8_0  fp16 d, 32 signed bytes                     d q                 code - zero from -128 to 127
===== =========================================== =================== =========================================

Nibble `i` of a block's low halves is weight `i`, of its high halves weight `16 + i`.
Source: the dequantizers of the `gguf` package.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..format.grid import QuantizedWeight, natural_groups
from ..format.spec import CheckpointError

BLOCK = 32
TYPES = ("auto", "q4_0", "q4_1", "q8_0")
# Bytes of a block.
SIZES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Choice:
    """A GGUF type for one weight.

    Args:
        type: "Q4_0", "Q4_1", "Q8_0" or, where no block fits, "F16".
        reason: why no block fits, or "".
    """

    type: str
    reason: str = ""


def choose(weight: QuantizedWeight, wanted: str = "auto") -> Choice:
    """The smallest type that holds a weight's codes.

    Args:
        weight: `[N, K]`.
        wanted: one of `TYPES`; "auto" takes Q4_0 before Q4_1 before Q8_0.
    """
    spec, in_features = weight.spec, weight.codes.shape[1]
    if in_features % BLOCK:
        return Choice("F16", f"in_features={in_features} is no multiple of {BLOCK}")
    if not torch.equal(weight.group, natural_groups(in_features, spec.group_size)):
        return Choice("F16", "groups are in act-order (g_idx)")
    if spec.groups(in_features) > 1 and spec.width(in_features) % BLOCK:
        return Choice("F16", f"group_size={spec.group_size} is no multiple of {BLOCK}")
    if float(weight.scales.abs().max()) > _LARGEST_HALF:
        return Choice("F16", f"scales reach {float(weight.scales.abs().max()):.3g}, and those of GGUF are float16")
    low, high = int(-weight.zeros.max()), int(spec.maxq - weight.zeros.min())
    fits = {"Q4_0": low >= -8 and high <= 7, "Q4_1": spec.bits <= 4, "Q8_0": low >= -128 and high <= 127}
    names = [wanted.upper()] if wanted != "auto" else list(fits)
    for name in names:
        if fits[name]:
            return Choice(name)
    return Choice("F16", f"code - zero runs from {low} to {high}, and {' or '.join(names)} does not hold that")


def blocks(weight: QuantizedWeight, kind: str) -> np.ndarray:
    """Bytes of a weight `[N, K]`: uint8 `[N, K / 32 * bytes of a block]`.

    Args:
        weight: as `choose` accepts it for `kind`.
        kind: "Q4_0", "Q4_1" or "Q8_0".
    """
    return torch.cat([_blocks(weight.rows(rows), kind) for rows in weight.slabs()]).numpy()


def _blocks(weight: QuantizedWeight, kind: str) -> Tensor:
    rows = weight.codes.shape[0]
    first = weight.group[::BLOCK].long()  # the group of every block
    scales, zeros = weight.scales.T[:, first], weight.zeros.T[:, first]  # [N, K / 32]
    codes = weight.codes.reshape(rows, -1, BLOCK).int()
    parts = [_halves(scales)]
    if kind == "Q4_1":
        parts.append(_halves(-scales.float() * zeros.float()))
    else:
        codes = codes - zeros[..., None]
    if kind == "Q8_0":
        parts.append(codes.to(torch.int8).view(torch.uint8))
    else:
        codes = codes + 8 if kind == "Q4_0" else codes
        parts.append((codes[..., :16] | codes[..., 16:] << 4).to(torch.uint8))
    return torch.cat(parts, -1).reshape(rows, -1)


def rotary_order(rows: int, heads: int) -> Tensor:
    """Where llama.cpp wants the rows of Llama's query and key projections: pairs that rotate together are neighbours.

    Args:
        rows: `N`.
        heads: that they belong to.

    Returns:
        int64 `[N]`: the source's row for every place.

    Raises:
        CheckpointError: rows that are not whole pairs per head.
    """
    if heads < 1 or rows % (2 * heads):
        raise CheckpointError(f"{rows} rows are not {heads} heads of an even width; config.json is not this model's")
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _halves(values: Tensor) -> Tensor:
    """fp16 as bytes, `[N, B, 2]`."""
    return values.to(torch.float16).contiguous().view(torch.uint8).view(*values.shape, 2)
