"""AVX2: 16-bit activations as integers, bit for bit as the C header says."""

from __future__ import annotations

from functools import partial

import pytest
import references
import torch
from weights import check_every_bit, kernel_weight, make, product_by_rows

from hf_gptq_plugin import native
from hf_gptq_plugin.format.grid import natural_groups
from hf_gptq_plugin.format.spec import BITS, QuantSpec
from hf_gptq_plugin.nn import ops

pytestmark = pytest.mark.skipif(
    native.status().isa != "avx2",
    reason=f"the instruction set in use is {native.status().isa or 'none'}; HF_GPTQ_ISA=avx2 takes this one",
)
ROWS = (1, 2, 3, 8, 23)  # a block of every height, and several


model = partial(product_by_rows, references.product_of_integers)


def activations(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows whose low parts are zero, many and few, one of zeros, one of tiny numbers; the rest leave theirs out."""
    x = torch.randn(rows, columns)
    x[0] = torch.randint(-100, 101, (columns,)) / 64
    if rows > 2:
        x[1] *= torch.randn(columns) ** 8
        x[2, :: columns // 3] *= 3000
    if rows > 6:
        x[3] = 0
        x[4] *= 1e-6 if dtype == torch.float16 else 1e-37
    return x.clamp(-6e4, 6e4).to(dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("columns", "group_size", "shuffled"),
    [(256, 64, False), (200, 48, False), (331, 128, False), (160, 32, True), (700, -1, False)],
)
def test_every_bit_of_the_sum(
    bits: int, sym: bool, dtype: torch.dtype, columns: int, group_size: int, shuffled: bool
) -> None:
    check_every_bit(
        QuantSpec(bits, group_size, sym), columns, shuffled, (activations(rows, columns, dtype) for rows in ROWS), model
    )


def test_groups_that_begin_within_a_unit() -> None:
    group = torch.tensor([0] * 37 + [1] * 51 + [2] * 40, dtype=torch.int32)
    for bits in BITS:
        weight, kernel = make(QuantSpec(bits, 48, sym=False), 20, group)
        for rows in ROWS:
            x = activations(rows, 128, torch.bfloat16)
            assert torch.equal(ops.linear(x, kernel), model(weight, kernel, x)), (bits, rows)


def test_the_largest_sums_fit() -> None:
    """Every product as large as it can be, of either sign, at the length of a part."""
    for bits in BITS:
        weight, kernel = make(QuantSpec(bits, -1, sym=False, checkpoint_format="gptq"), 16, natural_groups(256, -1))
        for code, zero, sign in ((2**bits - 1, 1, 1.0), (0, 2**bits, 1.0), (0, 2**bits, -1.0)):
            weight.codes.fill_(code)
            weight.zeros.fill_(zero)
            kernel = kernel_weight(weight)
            for dtype, largest in ((torch.bfloat16, 255.0), (torch.float16, 2047.0)):
                x = torch.full((5, 256), sign * largest, dtype=dtype)
                assert torch.equal(ops.linear(x, kernel), model(weight, kernel, x)), (bits, code, dtype)


def test_infinities_and_nan_reach_the_output() -> None:
    weight, kernel = make(QuantSpec(4, 32), 20, natural_groups(64, 32))
    x = torch.randn(6, 64).bfloat16()
    clean = ops.linear(x, kernel)
    x[1, 40], x[2, 3], x[3, 3] = float("inf"), float("-inf"), float("nan")
    for rows in (4, 6):
        y = ops.linear(x[:rows], kernel)
        for row, column, sign in ((1, 40, 1), (2, 3, -1)):
            difference = weight.codes[:, column].int() - weight.zeros[column // 32]
            assert torch.equal(y[row][difference != 0], torch.copysign(torch.tensor(float("inf")), (
                sign * difference[difference != 0] * weight.scales[column // 32][difference != 0]
            )).bfloat16())  # fmt: skip
            assert bool(y[row][difference == 0].isnan().all())
        assert bool(y[3].isnan().all())
        assert torch.equal(y[0], clean[0])
    # Where parts share a unit, in rows out of order.
    _, kernel = make(QuantSpec(4, 48), 20, natural_groups(96, 48)[torch.randperm(96)])
    x = torch.randn(2, 96).bfloat16()
    x[1, 50] = float("inf")
    y = ops.linear(x, kernel)
    assert bool(y[0].isfinite().all()) and not bool(y[1].isfinite().any())
