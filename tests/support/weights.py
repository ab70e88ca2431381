"""Random quantized weights, and products of theirs by a reference that takes one row."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import BITS, QuantSpec
from hf_gptq_plugin.nn import ops
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


def make(spec: QuantSpec, rows: int, group: torch.Tensor) -> tuple[QuantizedWeight, KernelWeight]:
    """A random weight, and the same as the kernels take it."""
    weight = random_weight(spec, rows, group)
    return weight, kernel_weight(weight)


def check_every_bit(
    spec: QuantSpec,
    columns: int,
    shuffled: bool,
    batches: Iterable[torch.Tensor],
    model: Callable[[QuantizedWeight, KernelWeight, torch.Tensor], torch.Tensor],
) -> None:
    """Products of a random weight `[37, columns]` with every batch `[M, columns]` have the bits that `model` says, in a
    checkpoint's layout and packed. Shuffled, every code is its own run in the former, which is computed otherwise."""
    group = natural_groups(columns, spec.group_size)
    if shuffled:
        group = group[torch.randperm(columns)].contiguous()
    weight, canonical = make(spec, 37, group)
    batches = list(batches)
    assert batches
    for kernel in (canonical.packed(),) if shuffled else (canonical, canonical.packed()):
        for x in batches:
            assert torch.equal(ops.linear(x, kernel), model(weight, kernel, x)), len(x)


def check_every_number_of_rows(
    bits: int, sym: bool, most: int, numbers: Iterable[int],
    model: Callable[[QuantizedWeight, KernelWeight, torch.Tensor], torch.Tensor],
) -> None:  # fmt: skip
    """The first rows of `most` have the bits that `model` says, however many there are.

    Outputs in column blocks by eight and less, the last one ragged.
    """
    weight, canonical = make(QuantSpec(bits, 64, sym), 245, natural_groups(160, 64))
    x = torch.randn(most, 160).bfloat16()
    expected = model(weight, canonical, x)
    numbers = list(numbers)
    assert numbers
    for kernel in (canonical, canonical.packed()):
        for rows in numbers:
            assert torch.equal(ops.linear(x[:rows], kernel), expected[:rows]), rows


def check_groups_within_units(
    model: Callable[[QuantizedWeight, KernelWeight, torch.Tensor], torch.Tensor],
) -> None:
    """Groups may begin within a unit of codes: what is not theirs must not be touched, infinities included."""
    group = torch.tensor([0] * 37 + [1] * 51 + [2] * 40, dtype=torch.int32)
    for bits in BITS:
        weight, kernel = make(QuantSpec(bits, 48, sym=False), 20, group)
        x = torch.randn(2, 128).bfloat16()
        x[0, 36] = float("inf")
        got = ops.linear(x, kernel)
        assert torch.equal(got[1:], model(weight, kernel, x[1:]))
        nonzero = weight.codes[:, 36] != weight.zeros[0]
        assert bool(got[0][nonzero].isinf().all())


def check_subnormal_activations_are_zeros() -> None:
    _, kernel = make(QuantSpec(4, 32), 16, natural_groups(64, 32))
    x = torch.full((1, 64), 2.0**-130, dtype=torch.bfloat16)
    assert bool((ops.linear(x, kernel) == 0).all())
    assert bool((ops.linear(x * 2.0**10, kernel) != 0).any())
