"""Random quantized weights, and products of theirs by a reference that takes one row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from hf_gptq_plugin.format.grid import QuantizedWeight
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.nn.ops import KernelWeight


def random_weight(
    spec: QuantSpec, rows: int, group: torch.Tensor, scales_dtype: torch.dtype = torch.float16
) -> QuantizedWeight:
    """A weight `[rows, K]` whose inputs are in groups `group [K]`: codes and zeros that the spec allows, scales of
    either sign."""
    groups = int(group.max()) + 1
    low, high = spec.zero_range
    zeros = torch.randint(low, high + 1, (groups, rows), dtype=torch.int32)
    if spec.sym:
        zeros.fill_(2 ** (spec.bits - 1))
    return QuantizedWeight(
        codes=torch.randint(0, spec.maxq + 1, (rows, len(group)), dtype=torch.uint8),
        scales=(torch.randn(groups, rows) * 0.02).to(scales_dtype),
        zeros=zeros,
        group=group,
        spec=spec,
    )


def kernel_weight(weight: QuantizedWeight) -> KernelWeight:
    """The weight as the kernels take it, in the layout of a checkpoint."""
    return KernelWeight.from_canonical(**weight.pack(), spec=weight.spec, in_features=weight.codes.shape[1])


def product_by_rows(
    reference: Callable[..., np.ndarray], weight: QuantizedWeight, kernel: KernelWeight, x: torch.Tensor
) -> torch.Tensor:
    """What one of `references.product_of_*` gives for every row of `x [M, K]`, in x's dtype, `[M, N]`."""
    order = torch.arange(x.shape[-1]) if kernel.perm is None else kernel.perm.long()
    rows = [
        reference(
            row.float().numpy(), weight.codes.numpy(), weight.scales.float().numpy(), weight.zeros.numpy(),
            weight.group.numpy(), order.numpy(), weight.spec.bits,
        )
        for row in x
    ]  # fmt: skip
    return torch.from_numpy(np.stack(rows)).to(x.dtype)
