"""Activations rounded to 8 bits, on request: bit for bit as the C header says, and only where they were asked for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import references
import torch
from weights import check_every_bit, kernel_weight, make, product_by_rows

from hf_gptq_plugin import native
from hf_gptq_plugin.format.grid import natural_groups
from hf_gptq_plugin.format.spec import BITS, QuantSpec
from hf_gptq_plugin.nn import ops

ROWS = (1, 2, 6, 12, 31)  # a block of every kind, and several


def available() -> bool:
    """Whether there is such a product; what the environment asked for stays."""
    before = native.status().activations
    try:
        native.set_activations("int8")
    except native.NativeError:
        return False
    used = native.status().activations
    native.set_activations(before)
    return used == "int8"


needs_vnni = pytest.mark.skipif(
    not available(), reason=f"{native.status().isa or 'no native library'} in use; 8 bit activations need AVX-512 VNNI"
)


@pytest.fixture
def int8() -> Iterator[None]:
    before = native.status().activations
    native.set_activations("int8")
    yield
    native.set_activations(before)


model = partial(product_by_rows, references.product_of_bytes)


def activations(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of normal numbers, of outliers, of zeros, of tiny numbers, of numbers that count as zeros."""
    x = torch.randn(rows, columns)
    if rows > 5:
        x[1] *= torch.randn(columns) ** 8
        x[2, :: columns // 3] *= 3000
        x[3] = 0
        x[4] *= 1e-6 if dtype == torch.float16 else 1e-35
        x[5] *= 1e-6 if dtype == torch.float16 else 1e-37
    return x.clamp(-6e4, 6e4).to(dtype)


@needs_vnni
@pytest.mark.usefixtures("int8")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
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


@needs_vnni
@pytest.mark.usefixtures("int8")
def test_groups_that_begin_within_a_unit() -> None:
    for lengths in ((37, 51, 40), (37, 600)):
        group = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))
        for bits in BITS:
            weight, kernel = make(QuantSpec(bits, -(-sum(lengths) // len(lengths)), sym=False), 20, group)
            for rows in ROWS:
                x = activations(rows, sum(lengths), torch.bfloat16)
                assert torch.equal(ops.linear(x, kernel), model(weight, kernel, x)), (bits, rows)


@needs_vnni
@pytest.mark.usefixtures("int8")
def test_the_largest_sums_fit() -> None:
    """Every product as large as it can be, of either sign, at the length of a part."""
    for bits in BITS:
        weight, _ = make(QuantSpec(bits, -1, sym=False, checkpoint_format="gptq"), 16, natural_groups(256, -1))
        for code, zero, sign in ((2**bits - 1, 1, 1.0), (0, 2**bits, 1.0), (0, 2**bits, -1.0)):
            weight.codes.fill_(code)
            weight.zeros.fill_(zero)
            kernel = kernel_weight(weight)
            x = torch.full((5, 256), sign * 255.0)
            assert torch.equal(ops.linear(x, kernel), model(weight, kernel, x)), (bits, code)


@needs_vnni
@pytest.mark.usefixtures("int8")
def test_infinities_and_nan_reach_the_output() -> None:
    for sym in (True, False):
        weight, kernel = make(QuantSpec(4, 32, sym), 20, natural_groups(64, 32))
        x = torch.randn(6, 64)
        clean = ops.linear(x, kernel)
        x[1, 40], x[2, 3], x[3, 3] = float("inf"), float("-inf"), float("nan")
        for rows in (4, 6):
            y = ops.linear(x[:rows], kernel)
            for row, column, sign in ((1, 40, 1), (2, 3, -1)):
                difference = weight.codes[:, column].int() - weight.zeros[column // 32]
                factor = sign * difference * weight.scales[column // 32].float()
                wanted = torch.copysign(torch.tensor(float("inf")), factor)
                assert torch.equal(y[row][difference != 0], wanted[difference != 0])
                assert bool(y[row][difference == 0].isnan().all())
            assert bool(y[3].isnan().all())
            assert torch.equal(y[0], clean[0])


@needs_vnni
@pytest.mark.usefixtures("int8")
def test_a_row_has_the_same_bits_in_every_batch_and_with_every_number_of_threads() -> None:
    _, kernel = make(QuantSpec(4, 64), 300, natural_groups(512, 64))
    x, bias = torch.randn(700, 512).bfloat16(), torch.randn(300).bfloat16()
    whole = ops.linear(x, kernel, bias)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(ops.linear(x, kernel, bias), whole)
    finally:
        torch.set_num_threads(threads)
    for begin, end in ((0, 1), (1, 3), (3, 20), (20, 200), (699, 700)):
        assert torch.equal(ops.linear(x[begin:end], kernel, bias), whole[begin:end])
    apart = torch.randn(700, 1024).bfloat16()
    apart[:, ::2] = x  # not contiguous
    assert torch.equal(ops.linear(apart[:, ::2], kernel, bias), whole)


@needs_vnni
def test_what_is_not_rounded(int8: None) -> None:
    """Codes whose groups change with every code, and gradients."""
    columns = 160
    group = natural_groups(columns, 32)[torch.randperm(columns)].contiguous()
    _, scattered = make(QuantSpec(4, 32), 37, group)
    _, natural = make(QuantSpec(4, 32), 37, natural_groups(columns, 32))
    x, g = torch.randn(9, columns), torch.randn(9, 37)
    rounded = ops.linear(x, natural)
    got = ops.linear(x, scattered), ops.linear_transposed(g, natural, columns), ops.dequantize(natural, columns)
    native.set_activations("exact")
    exact = ops.linear(x, scattered), ops.linear_transposed(g, natural, columns), ops.dequantize(natural, columns)
    for a, b in zip(got, exact, strict=True):
        assert torch.equal(a, b)
    error = (rounded - ops.linear(x, natural)).norm() / ops.linear(x, natural).norm()
    assert 1e-3 < error < 1.2e-2  # 1 / (127 sqrt(12)) of the largest of a group, which is two to three deviations


@needs_vnni
def test_exact_for_the_length_of_a_block(int8: None) -> None:
    assert native.status().activations == "int8"
    with pytest.raises(KeyError), native.exact_activations():
        assert native.status().activations == "exact"
        raise KeyError
    assert native.status().activations == "int8"


@needs_vnni
def test_exact_while_any_block_is_open(int8: None) -> None:
    """Blocks of two threads that overlap, the first one to begin being the first to end."""
    first, second = native.exact_activations(), native.exact_activations()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert native.status().activations == "exact"
    with pytest.raises(native.NativeError, match="a calibration is running"):
        native.set_activations("int8")
    second.__exit__(None, None, None)
    assert native.status().activations == "int8"
    with native.exact_activations():
        native.set_activations("exact")
    assert native.status().activations == "exact"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'int4'.*'exact', 'int8'"):
        native.set_activations("int4")
    assert native.status().activations == "exact"
