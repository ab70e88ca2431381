"""Quantize and dequantize against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import references
import torch

from hf_gptq_plugin.format.grid import QuantizedWeight, dequantize, natural_groups, quantize
from hf_gptq_plugin.format.spec import BITS, QuantSpec


def test_natural_groups_have_a_shorter_last_one() -> None:
    assert natural_groups(5, 2).tolist() == [0, 0, 1, 1, 2]
    assert natural_groups(3, -1).tolist() == [0, 0, 0]


@pytest.mark.parametrize("group_size", [100, 2**31, 2**32, 2**70])
def test_groups_wider_than_the_weight_are_one(group_size: int) -> None:
    assert natural_groups(64, group_size).tolist() == [0] * 64


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantize(bits: int, dtype: torch.dtype) -> None:
    codes = torch.randint(0, 2**bits, (7, 20), dtype=torch.uint8)
    scales = (torch.randn(4, 7) * 0.01).to(dtype)
    zeros = torch.randint(0, 2**bits + 1, (4, 7), dtype=torch.int32)
    group = torch.randint(0, 4, (20,), dtype=torch.int32)
    truth = references.dequantize(codes.numpy(), scales.double().numpy(), zeros.numpy(), group.numpy())
    # One rounding of an exact integer times an exact scale.
    np.testing.assert_allclose(dequantize(codes, scales, zeros, group).double().numpy(), truth, rtol=2**-24, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_quantize_finds_the_nearest_code(bits: int) -> None:
    weight = torch.randn(5, 12)
    scales, zeros = torch.rand(3, 5) * 0.5 + 0.05, torch.randint(1, 2**bits, (3, 5), dtype=torch.int32)
    scales[1] *= -1
    group = natural_groups(12, 4)
    codes = quantize(weight, scales, zeros, group, bits)
    for n in range(5):
        for k in range(12):
            g = group[k]
            values = (torch.arange(2**bits) - zeros[g, n]) * scales[g, n]
            chosen = abs(values[int(codes[n, k])] - weight[n, k])
            assert chosen <= abs(values - weight[n, k]).min() + 1e-6


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("group_size", [7, 16, -1, 1000])
def test_pack_and_unpack_are_inverse(bits: int, fmt: str, group_size: int) -> None:
    spec = QuantSpec(bits, group_size, sym=False, checkpoint_format=fmt)
    group = natural_groups(50, group_size)
    groups = spec.groups(50)
    assert groups == int(group.max()) + 1
    low, high = spec.zero_range
    whole = QuantizedWeight(
        codes=torch.randint(0, 2**bits, (11, 50), dtype=torch.uint8),
        scales=torch.rand(groups, 11).half(),
        zeros=torch.randint(low, high + 1, (groups, 11), dtype=torch.int32),
        group=group,
        spec=spec,
    )
    packed = whole.pack()
    assert {k: tuple(v.shape) for k, v in packed.items()} == spec.shapes(50, 11)
    again = QuantizedWeight.unpack(**packed, spec=spec)
    assert torch.equal(again.codes, whole.codes)
    assert torch.equal(again.zeros, whole.zeros)
    assert torch.equal(again.dequantize(), whole.dequantize())
