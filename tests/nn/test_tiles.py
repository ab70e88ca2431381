"""AMX: bf16 activations by tiles, bit for bit as the C header says."""

from __future__ import annotations

from functools import partial

import pytest
import references
import torch
from weights import (
    check_every_bit,
    check_every_number_of_rows,
    check_groups_within_units,
    check_subnormal_activations_are_zeros,
    make,
    product_by_rows,
)

from hf_gptq_plugin import native
from hf_gptq_plugin.format.grid import natural_groups
from hf_gptq_plugin.format.spec import BITS, QuantSpec
from hf_gptq_plugin.nn import ops

pytestmark = pytest.mark.skipif(
    native.status().isa != "amx",
    reason=f"the instruction set in use is {native.status().isa or 'none'}; tests/check_native.sh emulates amx",
)


model = partial(product_by_rows, references.product_of_tiles)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("columns", "group_size", "shuffled"),
    [(256, 64, False), (200, 48, False), (331, 128, False), (160, 32, True), (96, -1, False), (700, -1, False)],
)
def test_every_bit_of_the_sum(bits: int, sym: bool, columns: int, group_size: int, shuffled: bool) -> None:
    check_every_bit(
        QuantSpec(bits, group_size, sym),
        columns,
        shuffled,
        (torch.randn(rows, columns).bfloat16() for rows in (1, 17, 35)),
        model,
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
def test_every_number_of_rows(bits: int, sym: bool) -> None:
    check_every_number_of_rows(bits, sym, 50, (*range(1, 35), 47, 50), model)


def test_more_rows_than_are_packed_at_a_time() -> None:
    weight, kernel = make(QuantSpec(4, 32), 40, natural_groups(64, 32))
    x = torch.randn(1100, 64).bfloat16()
    got = ops.linear(x, kernel)
    rows = [0, 15, 16, 511, 549, 550, 551, 1099]
    assert torch.equal(got[rows], model(weight, kernel, x[rows]))
    assert torch.equal(got, torch.cat([ops.linear(part, kernel) for part in x.split(7)]))


def test_rows_beside_infinities_are_as_without() -> None:
    weight, kernel = make(QuantSpec(4, 64), 40, natural_groups(128, 64))
    x = torch.randn(20, 128).bfloat16()
    expected = ops.linear(x, kernel)
    x[3, 7], x[18, 100] = float("inf"), float("nan")
    got = ops.linear(x, kernel)
    others = [row for row in range(20) if row not in (3, 18)]
    assert torch.equal(got[others], expected[others]) and bool(got[18].isnan().all())
    nonzero = weight.codes[:, 7] != 8
    assert bool(got[3][nonzero].isinf().all()) and bool(got[3][~nonzero].isnan().all())


def test_groups_that_begin_within_a_unit() -> None:
    check_groups_within_units(model)


def test_transposed_rows_are_alike_among_any_others() -> None:
    for rows, columns in ((245, 160), (96, 331), (17, 64)):
        weight, kernel = make(QuantSpec(4, 32, sym=False), rows, natural_groups(columns, 32))
        x = torch.randn(70, rows).bfloat16()
        whole = ops.linear_transposed(x, kernel, columns)
        truth = x.double() @ weight.dequantize().bfloat16().double()
        assert float((whole.double() - truth).norm() / truth.norm()) < 3e-3
        for count in (1, 2, 15, 16, 17, 33, 69):
            assert torch.equal(ops.linear_transposed(x[:count], kernel, columns), whole[:count]), count


def test_subnormal_activations_are_zeros() -> None:
    check_subnormal_activations_are_zeros()
