"""AVX512-BF16: bf16 activations two at a time, bit for bit as the C header says."""

from __future__ import annotations

from functools import partial

import pytest
import references
import torch
from weights import check_every_bit, make, product_by_rows

from hf_gptq_plugin import native
from hf_gptq_plugin.format.grid import natural_groups
from hf_gptq_plugin.format.spec import BITS, QuantSpec
from hf_gptq_plugin.nn import ops

pytestmark = pytest.mark.skipif(
    native.status().isa != "avx512bf16",
    reason=f"the instruction set in use is {native.status().isa or 'none'}; tests/check_native.sh emulates avx512bf16",
)


model = partial(product_by_rows, references.product_of_pairs)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("columns", "group_size", "shuffled"),
    [(256, 64, False), (200, 48, False), (331, 128, False), (160, 32, True), (96, -1, False)],
)
def test_every_bit_of_the_sum(bits: int, sym: bool, columns: int, group_size: int, shuffled: bool) -> None:
    check_every_bit(
        QuantSpec(bits, group_size, sym),
        columns,
        shuffled,
        (torch.randn(rows, columns).bfloat16() for rows in (1, 3, 9, 14)),
        model,
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
def test_every_number_of_rows(bits: int, sym: bool) -> None:
    # Outputs in column blocks by eight, four, two and one, the last one ragged.
    weight, canonical = make(QuantSpec(bits, 64, sym), 245, natural_groups(160, 64))
    x = torch.randn(122, 160).bfloat16()
    expected = model(weight, canonical, x)
    for kernel in (canonical, canonical.packed()):
        for rows in (*range(1, 27), 95, 122):
            assert torch.equal(ops.linear(x[:rows], kernel), expected[:rows]), rows


def test_groups_that_begin_within_a_unit() -> None:
    group = torch.tensor([0] * 37 + [1] * 51 + [2] * 40, dtype=torch.int32)
    for bits in BITS:
        weight, kernel = make(QuantSpec(bits, 48, sym=False), 20, group)
        x = torch.randn(2, 128).bfloat16()
        # What is not the run's must not be touched, infinities included.
        x[0, 36] = float("inf")
        got = ops.linear(x, kernel)
        assert torch.equal(got[1:], model(weight, kernel, x[1:]))
        nonzero = weight.codes[:, 36] != weight.zeros[0]
        assert bool(got[0][nonzero].isinf().all())


def test_subnormal_activations_are_zeros() -> None:
    _, kernel = make(QuantSpec(4, 32), 16, natural_groups(64, 32))
    x = torch.full((1, 64), 2.0**-130, dtype=torch.bfloat16)
    assert bool((ops.linear(x, kernel) == 0).all())
    assert bool((ops.linear(x * 2.0**10, kernel) != 0).any())
