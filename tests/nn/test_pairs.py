"""AVX512-BF16: bf16 activations two at a time, bit for bit as the C header says."""

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
    product_by_rows,
)

from hf_gptq_plugin import native
from hf_gptq_plugin.format.spec import BITS, QuantSpec

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
    check_every_number_of_rows(bits, sym, 122, (*range(1, 27), 95, 122), model)


def test_groups_that_begin_within_a_unit() -> None:
    check_groups_within_units(model)


def test_subnormal_activations_are_zeros() -> None:
    check_subnormal_activations_are_zeros()
