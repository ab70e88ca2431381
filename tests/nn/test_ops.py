"""The ops against dense float64, for every bits, grid, order and dtype, with and without the native library."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import pytest
import references
import torch
import weights

from hf_gptq_plugin import native
from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import BITS, QuantSpec
from hf_gptq_plugin.nn import ops
from hf_gptq_plugin.nn.ops import KernelWeight

SHAPES = [(1, 1, 1), (3, 40, 100), (2, 33, 576), (17, 16, 64)]  # M, N, K
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@contextlib.contextmanager
def without_library() -> Iterator[None]:
    """The state of a machine where the package was built without a compiler."""
    original = native._load
    absent = functools.cache(lambda: (None, native.Status("absent", "", "switched off by the test")))
    native._load = absent
    op, torch.ops.hf_gptq.linear = torch.ops.hf_gptq.linear, torch.ops.hf_gptq.linear_checked
    try:
        yield
    finally:
        native._load = original
        torch.ops.hf_gptq.linear = op


@pytest.fixture(params=["native", "pytorch"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native":
        if native.library() is None:
            pytest.skip(f"no native library: {native.status().detail}")
        yield "native"
    else:
        with without_library():
            yield "pytorch"


def random_weight(
    spec: QuantSpec, rows: int, columns: int, order: str = "natural", dtype: torch.dtype = torch.float16
) -> tuple[QuantizedWeight, torch.Tensor]:
    """A random quantized weight, and the float64 matrix it stands for."""
    group = natural_groups(columns, spec.group_size)
    if order == "shuffled":
        group = group[torch.randperm(columns)].contiguous()
    weight = weights.random_weight(spec, rows, group, dtype)
    truth = references.dequantize(
        weight.codes.numpy(), weight.scales.double().numpy(), weight.zeros.numpy(), group.numpy()
    )
    return weight, torch.from_numpy(truth)


def layouts(weight: QuantizedWeight) -> dict[str, KernelWeight]:
    canonical = weights.kernel_weight(weight)
    return {"canonical": canonical, "packed": canonical.packed()}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("order", ["natural", "shuffled"])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_and_dequantize_against_float64(
    implementation: str, bits: int, sym: bool, order: str, shape: tuple[int, int, int]
) -> None:
    rows, out_features, in_features = shape
    for group_size in (32, 128, -1):
        for fmt in ("gptq", "gptq_v2"):
            spec = QuantSpec(bits, group_size, sym, checkpoint_format=fmt)
            weight, dense = random_weight(spec, out_features, in_features, order)
            bias = torch.randn(out_features)
            x = torch.randn(rows, in_features)
            for name, kernel_weight in layouts(weight).items():
                got = ops.dequantize(kernel_weight, in_features)
                torch.testing.assert_close(got.double(), dense, rtol=2**-24, atol=0)
                y = ops.linear(x, kernel_weight, bias).double()
                truth = x.double() @ dense.T + bias.double()
                # K products in fp32, each rounded: the error grows with the sum of magnitudes.
                bound = (x.double().abs() @ dense.abs().T + bias.abs()) * 2**-23 * (in_features**0.5 + 4) + 1e-30
                assert ((y - truth).abs() <= bound).all(), (name, group_size, fmt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "out_features"), [(5, 48), (1, 245), (3, 245)])  # of one and of many blocks at once
def test_half_precision_activations(
    implementation: str, dtype: torch.dtype, scales_dtype: torch.dtype, rows: int, out_features: int
) -> None:
    weight, dense = random_weight(QuantSpec(4, 32), out_features, 96, dtype=scales_dtype)
    x = torch.randn(rows, 96).to(dtype)
    y = ops.linear(x, layouts(weight)["packed"])
    assert y.dtype == dtype
    truth = x.double() @ dense.T
    unit = ROUNDING[dtype]
    if implementation == "pytorch":  # rounds the weight too, as any dense layer of that dtype has
        bound = (x.double().abs() @ dense.abs().T) * unit * 2 + truth.abs() * unit * 2
    else:  # integers leave out what makes up less than 2^-17 of a part of x
        beyond = 2**-17 if native.status().isa == "avx2" else 2**-22
        bound = truth.abs() * unit * 1.01 + (x.double().abs() @ dense.abs().T) * beyond
    assert ((y.double() - truth).abs() <= bound + 1e-8).all()


def test_one_hot_activations_read_out_the_weight(implementation: str) -> None:
    for bits in BITS:
        weight, dense = random_weight(QuantSpec(bits, 32, sym=False), 24, 64, "shuffled")
        y = ops.linear(torch.eye(64), layouts(weight)["packed"])
        torch.testing.assert_close(y.T.double(), dense, rtol=2**-24, atol=0)


@pytest.mark.skipif(native.library() is None, reason="a property of the native kernel, which is absent")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["natural", "shuffled"])
def test_a_rows_bits_do_not_depend_on_the_batch_or_threads(bits: int, dtype: torch.dtype, order: str) -> None:
    weight, _ = random_weight(QuantSpec(bits, 48, sym=False), 245, 200, order)
    kernel_weight = layouts(weight)["packed"]
    x = torch.randn(65, 200).to(dtype)
    whole = ops.linear(x, kernel_weight)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            for count in (*range(1, 14), 16, 31, 48, 49):
                assert torch.equal(ops.linear(x[:count], kernel_weight), whole[:count]), (n, count)
            assert torch.equal(ops.linear(x[7:8], kernel_weight), whole[7:8])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(native.library() is None, reason="a property of the native kernel, which is absent")
@pytest.mark.parametrize(("dtype", "rows", "columns"), [(torch.bfloat16, 1300, 320), (torch.float32, 48, 2048)])
def test_rows_of_many_tasks(dtype: torch.dtype, rows: int, columns: int) -> None:
    weight, _ = random_weight(QuantSpec(4, 64), 245, columns)
    kernel_weight = layouts(weight)["packed"]
    x = torch.randn(rows, columns).to(dtype)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            whole = ops.linear(x, kernel_weight)
            for i in range(0, rows, rows // 9):
                assert torch.equal(ops.linear(x[i : i + 3], kernel_weight), whole[i : i + 3]), (n, i)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(native.library() is None, reason="a property of the native kernel, which is absent")
@pytest.mark.parametrize("bits", BITS)
def test_layouts_give_the_same_bits(bits: int) -> None:
    # Column blocks of the packed layout: all whole; of the canonical one: the last is ragged.
    weight, _ = random_weight(QuantSpec(bits, 32), 245, 128)
    both = layouts(weight)
    for rows in (1, 3, 5, 9, 49):
        x = torch.randn(rows, 128)
        assert torch.equal(ops.linear(x, both["canonical"]), ops.linear(x, both["packed"])), rows


def test_packing_is_undone(implementation: str) -> None:
    for bits in BITS:
        for order in ("natural", "shuffled"):
            weight, _ = random_weight(QuantSpec(bits, 32), 40, 100, order)
            packed = layouts(weight)["packed"]
            assert (packed.perm is not None) == (order == "shuffled")
            assert torch.equal(packed.canonical_qweight(), weight.pack()["qweight"])


def test_shapes_of_activations(implementation: str) -> None:
    weight, dense = random_weight(QuantSpec(4, 32), 24, 64)
    kernel_weight = layouts(weight)["packed"]
    for shape in ((64,), (0, 64), (2, 3, 64), (2, 0, 64)):
        x = torch.randn(*shape)
        y = ops.linear(x, kernel_weight)
        assert y.shape == (*shape[:-1], 24) and y.is_contiguous()
        torch.testing.assert_close(y.double(), x.double() @ dense.T, rtol=1e-4, atol=1e-5)
    strided = torch.randn(64, 6).T
    before = strided.clone()
    torch.testing.assert_close(
        ops.linear(strided, kernel_weight).double(), before.double() @ dense.T, rtol=1e-4, atol=1e-5
    )
    assert torch.equal(strided, before)
    # One row or one number many times: strides of 0.
    for x, product in ((torch.randn(64), ops.linear), (torch.randn(24), ops.linear_transposed)):
        rest = (64,) if product is ops.linear_transposed else ()
        for many in (x.expand(5, -1), x[:1].expand(5, x.numel())):
            y = product(many, kernel_weight, *rest)
            assert torch.equal(y, product(many.contiguous(), kernel_weight, *rest))


@pytest.mark.skipif(native.library() is None, reason="guards native code, which is absent")
def test_shapes_that_do_not_belong_together_never_reach_native_code() -> None:
    weight, _ = random_weight(QuantSpec(4, 32, sym=False), 24, 64, "shuffled")
    good = layouts(weight)["canonical"]
    x = torch.randn(2, 64)
    refused = (ValueError, RuntimeError)  # an op without Python raises the latter, with the same text
    for field, value, message in (
        ("qweight", good.qweight[:-1], "qweight is torch.int32"),
        ("qweight", good.qweight.long(), "qweight is torch.int64"),
        ("qzeros", good.qzeros[:, :-1], "qzeros is"),
        ("g_idx", good.g_idx[:-1], "g_idx is"),
        ("perm", torch.zeros(64), "perm is torch.float32"),
        ("scales", good.scales.double(), "scales has dtype torch.float64"),
    ):
        arguments = {**vars(good), field: value}
        with pytest.raises(refused, match=message):
            ops.linear(x, KernelWeight(**arguments))
    with pytest.raises(refused, match="scales has 2 groups"):
        ops.linear(x, KernelWeight(**{**vars(good), "g_idx": None, "group_size": 8}))
    one, _ = random_weight(QuantSpec(4, -1), 24, 64)
    named = layouts(one)["packed"]
    endless = KernelWeight(**{**vars(named), "group_size": 2**63 - 1})  # nothing overflows
    assert torch.equal(ops.linear(x, endless), ops.linear(x, named))
    for field, value in (("bits", 5), ("bits", 2**32 + 4), ("zero_offset", 2), ("zero_offset", 2**32 + 1)):
        wrong = KernelWeight(**{**vars(named), field: value})
        with pytest.raises(refused, match=f"{field}={value}.*are no weight"):
            ops.linear(x, wrong)
        with pytest.raises(ValueError, match=f"{field}={value}.*are no weight"):
            ops.linear_transposed(torch.randn(2, 24), wrong, 64)
    twice = KernelWeight(**{**vars(layouts(weight)["packed"]), "perm": torch.zeros(64, dtype=torch.int32)})
    assert ops.dequantize(twice, 64).abs().max() < 1e6  # no memory that nobody wrote
    assert ops.linear_transposed(torch.randn(2, 24), twice, 64).abs().max() < 1e6
    with pytest.raises(refused, match="bias has shape"):
        ops.linear(x, good, torch.zeros(3))
    with pytest.raises(ValueError, match="x has shape"):
        ops.linear_transposed(x, good, 64)
    for index, value in ((5, 99), (63, -1), (0, 2), (1, 2**31 - 1)):
        bad = good.g_idx.clone()
        bad[index] = value
        weight_of_bad = KernelWeight(**{**vars(good), "g_idx": bad})
        for call in (
            lambda w=weight_of_bad: ops.linear(x, w),
            lambda w=weight_of_bad: ops.linear_transposed(torch.randn(2, 24), w, 64),
            lambda w=weight_of_bad: ops.dequantize(w, 64),
        ):
            with pytest.raises(RuntimeError, match="a group index is outside"):
                call()
    for value in (64, -1):
        perm = torch.arange(64, dtype=torch.int32)
        perm[7] = value
        with pytest.raises(RuntimeError, match="an entry of perm is outside"):
            ops.linear(x, KernelWeight(**{**vars(good), "perm": perm}))


@pytest.mark.skipif(native.library() is None, reason="compares the native op with that in Python; it is absent")
def test_the_native_op_is_the_checked_one() -> None:
    weight, _ = random_weight(QuantSpec(3, 32, sym=False), 40, 100, "shuffled")
    kernel_weight = layouts(weight)["packed"]
    bias = torch.randn(40)
    wide = torch.randn(6, 200)
    plain = (torch.randn(5, 100), torch.randn(2, 3, 100), torch.randn(100), torch.randn(0, 100))
    for x in (*plain, wide[:, ::2], wide[:, :100]):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for b in (None, bias.to(dtype), bias[None].expand(2, 40)[1].to(dtype)):
                arguments = (x.to(dtype), b, *kernel_weight.arguments)
                ours, checked = (getattr(torch.ops.hf_gptq, op)(*arguments) for op in ("linear", "linear_checked"))
                assert ours.dtype == checked.dtype and torch.equal(ours, checked)
    shapes = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in kernel_weight.arguments]
    assert torch.ops.hf_gptq.linear(torch.empty(2, 100, device="meta"), None, *shapes).shape == (2, 40)
    # Memory: results are new, and arguments are let go.
    x = torch.randn(4, 100)
    y = torch.ops.hf_gptq.linear(x, bias, *kernel_weight.arguments)
    assert y.data_ptr() != x.data_ptr() and y._use_count() == 1
    with torch.inference_mode():
        torch.ops.hf_gptq.linear(x, bias, *kernel_weight.arguments)
    assert x._use_count() == 1 and kernel_weight.qweight._use_count() == 1 and bias._use_count() == 1


@pytest.mark.parametrize("order", ["natural", "shuffled"])
def test_gradient_of_the_input(implementation: str, order: str) -> None:
    weight, dense = random_weight(QuantSpec(4, 32, sym=False), 24, 64, order)
    x = torch.randn(3, 5, 64, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    ours = ops.linear(x, layouts(weight)["packed"], bias)
    grad = torch.randn_like(ours)
    got = torch.autograd.grad(ours, (x, bias), grad)
    x64 = x.detach().double().requires_grad_()
    b64 = bias.detach().double().requires_grad_()
    expected = torch.autograd.grad(torch.nn.functional.linear(x64, dense, b64), (x64, b64), grad.double())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", ["natural", "shuffled"])
def test_transposed_against_float64(implementation: str, bits: int, order: str) -> None:
    for rows, out_features, in_features in ((1, 33, 100), (7, 40, 64), (3, 1, 5), (2, 530, 40)):
        weight, dense = random_weight(QuantSpec(bits, 32, sym=False), out_features, in_features, order)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            # A slice of something wider: rows are further apart than they are long.
            x = torch.randn(rows, out_features + 3).to(dtype)[:, 1 : out_features + 1]
            truth = x.double() @ dense
            magnitude = x.double().abs() @ dense.abs()
            for kernel_weight in layouts(weight).values():
                y = ops.linear_transposed(x, kernel_weight, in_features)
                assert y.dtype == dtype and y.shape == (rows, in_features)
                rounding = ROUNDING[dtype]
                bound = truth.abs() * rounding + magnitude * (2**-23 * (out_features**0.5 + 4))
                if dtype != torch.float32:  # the dense weight may be rounded too
                    bound += magnitude * rounding * 1.01
                assert ((y.double() - truth).abs() <= bound + 1e-7).all(), (bits, dtype)


@pytest.mark.skipif(native.library() is None, reason="PyTorch's own product may round otherwise")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", ["natural", "shuffled"])
def test_transposed_reads_the_weight_out(bits: int, order: str) -> None:
    weight, _ = random_weight(QuantSpec(bits, 48, sym=False), 245, 300, order)
    for kernel_weight in layouts(weight).values():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            got = ops.linear_transposed(torch.eye(245).to(dtype), kernel_weight, 300)
            assert torch.equal(got, ops.dequantize(kernel_weight, 300, dtype)), dtype


def test_transposed_is_the_gradient_of_the_gradient(implementation: str) -> None:
    weight, dense = random_weight(QuantSpec(4, 32), 24, 64)
    kernel_weight = layouts(weight)["packed"]
    g = torch.randn(3, 24, requires_grad=True)
    v = torch.randn(3, 64)
    (got,) = torch.autograd.grad(ops.linear_transposed(g, kernel_weight, 64), g, v)
    torch.testing.assert_close(got.double(), v.double() @ dense.T, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(native.library() is None, reason="a property of the native kernel, which is absent")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_the_transposed_product_does_not_depend_on_the_batch_or_threads(dtype: torch.dtype) -> None:
    weight, _ = random_weight(QuantSpec(4, 48, sym=False), 600, 70)
    kernel_weight = layouts(weight)["packed"]
    x = torch.randn(2100, 600).to(dtype)  # more than is done at a time
    whole = ops.linear_transposed(x, kernel_weight, 70)
    few = (slice(5, 5 + n) for n in range(1, 14))
    threads = torch.get_num_threads()
    try:
        for rows in (*few, slice(419, 422), slice(2047, 2050), slice(3, 40), slice(0, 500)):
            for n in (1, 2):
                torch.set_num_threads(n)
                assert torch.equal(ops.linear_transposed(x[rows], kernel_weight, 70), whole[rows]), (rows, n)
    finally:
        torch.set_num_threads(threads)


def test_a_part_of_the_outputs(implementation: str) -> None:
    for bits in BITS:
        weight, dense = random_weight(QuantSpec(bits, 32, sym=False), 164, 64, "shuffled")
        for kernel_weight in layouts(weight).values():
            for low, high in ((0, 32), (64, 164), (64, 96), (128, 192)):
                part = ops.dequantize(kernel_weight.outputs(low, high), 64)
                torch.testing.assert_close(part.double(), dense[low:high], rtol=2**-24, atol=0)
    with pytest.raises(ValueError, match="low=32 must be a multiple of 64"):
        kernel_weight.outputs(32, 40)


def test_ops_trace_without_running() -> None:
    weight, _ = random_weight(QuantSpec(4, 32), 24, 64)
    arguments = layouts(weight)["packed"].arguments
    x = torch.randn(3, 64)
    torch.library.opcheck(
        torch.ops.hf_gptq.linear.default, (x, None, *arguments),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.hf_gptq.linear_transposed.default, (torch.randn(3, 24), 64, *arguments),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.hf_gptq.dequantize.default, (64, torch.bfloat16, *arguments),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
