"""Dense linear algebra against float64, on every instruction set; and that threads and other rows change no bit."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_gptq_plugin import native
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.solve import linalg
from hf_gptq_plugin.solve.gptq import SolveSettings, solve
from hf_gptq_plugin.solve.hessian import Hessian

UNIT = 2.0**-24  # half the distance from 1 to the next number
ISAS = ("avx512bf16", "avx512f", "avx2", "portable")
# Every side alone, ragged in tiles (12 x 32) and packs (96); then beyond a chunk (256), a depth (1024), a block (1536).
SHAPES = [
    (1, 1, 1),
    (1, 577, 7),
    (7, 1, 129),
    (129, 577, 300),
    (577, 130, 12),
    (1600, 33, 20),
    (5, 1700, 40),
    (9, 8, 1300),
]

needs_library = pytest.mark.skipif(native.library() is None, reason="tests the native library; it is absent")


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], object]:
    """What `native._load` gives for an instruction set: of a copy of the library, since each chooses once."""
    loaded: dict[str, object] = {}

    def load(isa: str) -> object:
        if isa not in loaded:
            copy = tmp_path_factory.mktemp(isa) / "libhf_gptq.so"
            shutil.copy(Path(native.status().path), copy)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("HF_GPTQ_LIBRARY", str(copy))
                patch.setenv("HF_GPTQ_ISA", isa)
                loaded[isa] = native._load.__wrapped__()
        return loaded[isa]

    return load


@pytest.fixture(params=[pytest.param(isa, marks=needs_library) for isa in ISAS] + ["pytorch"])
def implementation(request: pytest.FixtureRequest, load: Callable, monkeypatch: pytest.MonkeyPatch) -> str:
    use(request.param, load, monkeypatch)
    return request.param


def use(name: str, load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (None, native.Status("absent", "", "")) if name == "pytorch" else load(name)
    if name != "pytorch" and pair[1].isa != name:
        pytest.skip(f"this processor has no {name}")
    monkeypatch.setattr(native, "_load", lambda: pair)


def with_threads(threads: int, run: Callable[[], object]) -> object:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        return run()
    finally:
        torch.set_num_threads(before)


def assert_within_rounding(out: Tensor, a: Tensor, b: Tensor, start: float | Tensor = 0.0) -> None:
    """Every order of summation keeps to `K + 2` roundings of at most the sum of the magnitudes."""
    size = a.double().abs() @ b.double().abs() + torch.as_tensor(start).double().abs()
    error = (out.double() - (a.double() @ b.double() + start)).abs()
    assert (error <= (a.shape[1] + 2) * UNIT * size * 1.01).all()


def integers(*shape: int) -> Tensor:
    return torch.randint(-8, 9, shape).float()


@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_matmul_is_exact_where_fp32_is(implementation: str, rows: int, columns: int, depth: int) -> None:
    a, b = integers(rows, depth), integers(depth, columns)
    expected = a.double() @ b.double()
    assert torch.equal(linalg.matmul(a, b).double(), expected)
    assert torch.equal(linalg.matmul(a.T.contiguous().T, b).double(), expected)
    assert torch.equal(linalg.matmul(a, b.T.contiguous().T).double(), expected)
    # Neither rows nor columns adjacent.
    wide_a, wide_b = torch.full((2 * rows, 3 * depth), torch.nan), torch.full((depth, 2 * columns), torch.nan)
    wide_a[::2, ::3], wide_b[:, ::2] = a, b
    assert torch.equal(linalg.matmul(wide_a[::2, ::3], wide_b[:, ::2]).double(), expected)


def test_matmul_rounds_as_it_must(implementation: str) -> None:
    for rows, columns, depth in SHAPES:
        a, b = torch.randn(rows, depth), torch.randn(depth, columns)
        assert_within_rounding(linalg.matmul(a, b), a, b)


def test_matmul_of_nothing(implementation: str) -> None:
    assert torch.equal(linalg.matmul(torch.ones(2, 0), torch.ones(0, 3)), torch.zeros(2, 3))
    assert linalg.matmul(torch.ones(0, 4), torch.ones(4, 3)).shape == (0, 3)


@needs_library
def test_a_row_does_not_depend_on_the_others() -> None:
    a, b = torch.randn(205, 600), torch.randn(600, 70)
    whole = linalg.matmul(a, b)
    for first, last in [(0, 1), (17, 18), (100, 113), (3, 200)]:
        assert torch.equal(linalg.matmul(a[first:last], b), whole[first:last])
        assert torch.equal(linalg.dense_linear(a[first:last], b.T), whole[first:last])


@needs_library
def test_instruction_sets_with_fma_give_the_same_bits(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(50, 600), torch.randn(600, 70)
    matrix = well_conditioned(300)
    results = []
    for isa in ("avx512bf16", "avx512f", "avx2"):
        use(isa, load, monkeypatch)
        results.append((linalg.matmul(a, b), linalg.inverse_factor(matrix)))
    for found in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found, results[0], strict=True))


@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (5, 129), (300, 70), (1300, 13), (30, 1700)])
def test_gram(implementation: str, tokens: int, columns: int) -> None:
    x, y = torch.randn(tokens, columns), torch.randn(tokens, columns // 2 + 1)
    before = torch.randn(columns, columns)
    start = before + before.T
    total = start.clone()
    linalg.add_gram(total, x)
    assert_within_rounding(total, x.T, x, start)
    if implementation != "pytorch":
        assert torch.equal(total, total.T)
        plain = start.clone()
        linalg.add_gram(plain, x, x)
        assert torch.equal(total.tril(), plain.tril())
    cross = torch.ones(columns, y.shape[1])
    linalg.add_gram(cross, x, y)
    assert_within_rounding(cross, x.T, y, 1.0)


@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (5, 129), (300, 70), (1301, 13), (30, 1700)])
@pytest.mark.parametrize("instructions", [False, True])
def test_gram_of_bf16(
    implementation: str, instructions: bool, tokens: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of the same numbers in fp32: their products are exact, so that sums alone round."""
    monkeypatch.setattr(linalg, "multiplies_bf16", lambda: instructions)
    x = (torch.randn(tokens, columns) * 2.0 ** torch.randint(-20, 20, (columns,))).bfloat16()
    y = torch.randn(tokens, columns // 2 + 1).bfloat16()
    total, cross = torch.zeros(columns, columns), torch.ones(columns, y.shape[1])
    linalg.add_gram(total, x)
    linalg.add_gram(cross, x, y)
    assert_within_rounding(total, x.T.float(), x.float())
    assert_within_rounding(cross, x.T.float(), y.float(), 1.0)
    if implementation != "pytorch":
        assert torch.equal(total, total.T)
    strided = torch.zeros(columns, columns)
    linalg.add_gram(strided, x.T.contiguous().T)
    assert torch.equal(strided, total)


@needs_library
def test_instruction_sets_give_the_same_bits_for_bf16(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "multiplies_bf16", lambda: True)
    x, y = torch.randn(700, 130).bfloat16(), torch.randn(700, 70).bfloat16()
    results = []
    for isa in ("avx512bf16", "avx512f", "avx2"):
        use(isa, load, monkeypatch)
        total, cross = torch.zeros(130, 130), torch.zeros(130, 70)
        linalg.add_gram(total, x)
        linalg.add_gram(cross, x, y)
        results.append((total, cross))
    for found in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(found, results[0], strict=True))


@pytest.mark.parametrize("size", [1, 7, 12, 13, 129, 192, 193, 577])
def test_factor_is_exact_where_fp32_is(implementation: str, size: int) -> None:
    """`R = (I + S) D` with at most a single 1 in each row of S, above the diagonal: the inverse is made of 0 and ±1 but
    for D, powers of two, and no step of the computation rounds."""
    later = torch.arange(size) + 1 + (torch.rand(size) * (size - 1 - torch.arange(size))).long()
    unit = torch.eye(size, dtype=torch.float64)
    unit[torch.arange(size - 1), later[:-1]] = 1
    scale = 2.0 ** torch.randint(-3, 4, (size,)).double()
    root = unit * scale
    expected = torch.linalg.inv(unit).round() / scale[:, None]
    upper = linalg.inverse_factor((root @ root.T).float())
    assert upper is not None and torch.equal(upper.double(), expected)


def well_conditioned(size: int) -> Tensor:
    x = torch.randn(4 * size, size) * torch.logspace(-0.5, 0.5, size)
    return x.T @ x / len(x)


@pytest.mark.parametrize("size", [50, 200, 400])
def test_factor_is_as_accurate_as_lapacks(implementation: str, size: int) -> None:
    matrix = well_conditioned(size)
    truth = linalg._inverse_factor_reference(matrix.double())
    lapack = linalg._inverse_factor_reference(matrix)
    upper = linalg.inverse_factor(matrix)
    assert truth is not None and lapack is not None and upper is not None
    assert torch.equal(upper, upper.triu())
    assert (upper.double() - truth).norm() <= 2 * (lapack.double() - truth).norm()


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan")])
def test_what_is_not_positive_definite(implementation: str, value: float) -> None:
    for where in (0, 5, 150, 290, 299):
        matrix = torch.eye(300) + 0.001
        matrix[where, where] = value
        assert linalg.inverse_factor(matrix) is None, where


@needs_library
def test_the_library_says_not_positive_definite() -> None:
    with pytest.raises(native.NativeError, match="not positive definite"):
        native.check(linalg._NOT_POSITIVE_DEFINITE)


@pytest.mark.parametrize("size", [1, 2, 9, 33])
def test_small_systems(implementation: str, size: int) -> None:
    x = torch.randn(70, size, size, dtype=torch.float64)
    matrices, right = x @ x.mT + torch.eye(size), torch.randn(70, size, dtype=torch.float64)
    above = torch.where(torch.ones(size, size).triu().bool(), matrices, torch.nan)
    kept = above.clone(), right.clone()
    solution = linalg.solve_symmetric(above, right)
    torch.testing.assert_close(solution, torch.linalg.solve(matrices, right), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((above, right), kept, rtol=0, atol=0, equal_nan=True)


def test_singular_systems_do_not_stop_the_others(implementation: str) -> None:
    matrices = torch.stack([torch.zeros(3, 3), 2 * torch.eye(3)]).double()
    solution = linalg.solve_symmetric(matrices, torch.ones(2, 3, dtype=torch.float64))
    assert not torch.isfinite(solution[0]).all()
    assert solution[1].tolist() == [0.5] * 3


def test_dense_linear(implementation: str) -> None:
    weight = torch.randn(50, 130)
    for shape in [(130,), (3, 130), (2, 5, 130), (0, 130)]:
        x = torch.randn(shape)
        y = linalg.dense_linear(x, weight)
        assert y.shape == (*shape[:-1], 50)
        assert_within_rounding(y.reshape(-1, 50), x.reshape(-1, 130), weight.T)
    x = torch.randn(3, 130, requires_grad=True)
    linalg.dense_linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("instructions", [False, True])
def test_dense_linear_in_16_bits(
    implementation: str, dtype: torch.dtype, instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact products and fp32 sums, rounded once: half a step of the type, and what fp32 sums are off by."""
    monkeypatch.setattr(linalg, "multiplies_bf16", lambda: instructions)
    x, weight = torch.randn(2, 9, 130).to(dtype), torch.randn(50, 130).to(dtype)
    y = linalg.dense_linear(x, weight)
    exact = x.double() @ weight.double().T
    assert y.dtype == dtype
    step = torch.finfo(dtype).eps * exact.abs()
    sums = 130 * 2.0**-24 * (x.double().abs() @ weight.double().abs().T)
    assert ((y.double() - exact).abs() <= step / 2 * 1.01 + sums).all()


def test_total_is_rounded_once() -> None:
    assert linalg.total(torch.tensor([[1e16, 1.0], [-1e16, 1.0]], dtype=torch.float64)) == 2.0


def test_what_cannot_be_computed_is_refused() -> None:
    a = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"cannot multiply torch.float32 \(2, 3\) by torch.float32 \(2, 3\)"):
        linalg.matmul(a, a)
    with pytest.raises(ValueError, match=r"torch\.float64"):
        linalg.matmul(a, a.T.double())
    with pytest.raises(ValueError, match=r"total is torch.float32 \(2, 2\); it must be float32 \(3, 3\)"):
        linalg.add_gram(torch.zeros(2, 2), a)
    with pytest.raises(ValueError, match=r"matrix is torch.float32 \(2, 3\)"):
        linalg.inverse_factor(a)


@needs_library
def test_threads_change_no_bit() -> None:
    a, b, x = torch.randn(700, 300), torch.randn(300, 500), torch.randn(400, 577)
    matrix, square = well_conditioned(577), torch.zeros(577, 577)
    systems = matrix[:40, :40].double().expand(100, 40, 40) + torch.rand(100, 1, 1)

    def run() -> list[Tensor]:
        gram, cross = square.clone(), square.clone()
        linalg.add_gram(gram, x)
        linalg.add_gram(gram, x.bfloat16())
        linalg.add_gram(cross, x, x.flip(0))
        upper = linalg.inverse_factor(matrix)
        assert upper is not None
        right = torch.ones(100, 40, dtype=torch.float64)
        return [linalg.matmul(a, b), gram, cross, upper, linalg.solve_symmetric(systems, right)]

    one, two = with_threads(1, run), with_threads(2, run)
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


@needs_library
@pytest.mark.parametrize("spec", [QuantSpec(3, 32), QuantSpec(4, 60, sym=False), QuantSpec(2, 64, desc_act=True)])
def test_threads_change_no_bit_of_a_solve(spec: QuantSpec) -> None:
    """With all there is: error propagation, column loop, coordinate descent, scales refitted."""
    exact = torch.randn(900, 80) @ torch.randn(80, 320) + 0.3 * torch.randn(900, 320)
    x = exact + 0.1 * torch.randn(900, 320)
    weight = torch.randn(192, 320)

    def run() -> tuple[object, ...]:
        moments = Hessian(320)
        moments.add(x, exact)
        settings = SolveSettings(alternations=2, descent=2)
        solved, report = solve(weight, moments.mean(), spec, settings, moments.mean_cross())
        return solved.codes, solved.scales, solved.zeros, report.relative_error

    one, two = with_threads(1, run), with_threads(2, run)
    assert all(torch.equal(p, q) for p, q in zip(one[:3], two[:3], strict=True))
    assert one[3] == two[3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_all_finite(value: float) -> None:
    values = torch.randn(40, 30)
    assert linalg.all_finite(values)
    values[17, 3] = value
    assert not linalg.all_finite(values)


def heads_of(count: int, tokens: int, width: int) -> Tensor:
    """bf16 `[1, count, tokens, width]`, heads side by side in a token, as models lay them out."""
    return torch.randn(1, tokens, count, width).to(torch.bfloat16).transpose(1, 2)


def exact_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """In float64; and the same of the values' magnitudes."""
    repeats = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double().repeat_interleave(repeats, 1), value.double()
    value = value.repeat_interleave(repeats, 1)
    scores = query @ key.mT * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    weights = scores.softmax(-1)
    return weights @ value, weights @ value.abs()


# Queries, keys, width of a head, heads, heads of keys: alone; ragged in rows (12, 6, 3) and panels (32, 16); one more
# than the queries taken at a time (48, 24, 12); far beyond.
ATTENTION = [
    (1, 1, 2, 1, 1), (3, 5, 6, 2, 1), (12, 32, 64, 1, 1), (49, 49, 64, 9, 3), (25, 70, 40, 4, 2), (300, 131, 128, 2, 2),
    (13, 400, 80, 3, 1),
]  # fmt: skip


@needs_library
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", ATTENTION)
def test_attention_rounds_as_it_must(
    load: Callable, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], causal: bool
) -> None:
    """Once to bf16, by 2⁻⁸ at most; sums of scores, and of the weighted values, in fp32."""
    queries, keys, width, heads, shared = shape
    query, key, value = heads_of(heads, queries, width), heads_of(shared, keys, width), heads_of(shared, keys, width)
    for scale in (width**-0.5, 3.0):
        truth, size = exact_attention(query, key, value, scale, causal)
        for isa in ISAS:
            with monkeypatch.context() as patch:
                if load(isa)[1].isa != isa:
                    continue
                use(isa, load, patch)
                found = linalg.attention(query, key, value, None if scale == width**-0.5 else scale, causal)
            assert found is not None and found.dtype == torch.bfloat16 and found.shape == query.shape
            error = (found.double() - truth).abs()
            assert (error <= 2**-8 * truth.abs() + (keys + scale * width * 64) * UNIT * size).all(), isa


@needs_library
def test_attention_takes_any_strides_and_leaves_the_rest_to_pytorch() -> None:
    query, key, value = (heads_of(2, 37, 16) for _ in range(3))
    expected = linalg.attention(query, key, value)
    assert expected is not None
    wide = torch.full((1, 2, 37, 33), torch.nan, dtype=torch.bfloat16)
    wide[..., 1:17] = query
    odd = wide[..., 1:17]  # rows of an odd length that begin between two pairs
    assert torch.equal(linalg.attention(odd, key.contiguous(), value.mT.contiguous().mT), expected)
    for refused in (
        (query.float(), key.float(), value.float()), (query[..., :15], key[..., :15], value[..., :15]),
        (query[0], key[0], value[0]), (query, key, value[..., :8]), (query[:, :1], key, value),
        (query.clone().requires_grad_(), key, value), (query, key, value, -1.0), (query, key, value, math.nan),
    ):  # fmt: skip
        assert linalg.attention(*refused) is None


@needs_library
def test_a_query_sees_nothing_of_others() -> None:
    """Nor of later keys. A query that is not finite reaches nothing else, a key its head from there on, in NaN."""
    query, key, value = heads_of(4, 130, 64), heads_of(2, 130, 64), heads_of(2, 130, 64)
    whole = linalg.attention(query, key, value, causal=True)
    assert torch.equal(with_threads(2, lambda: linalg.attention(query, key, value, causal=True)), whole)
    for last in (1, 48, 49, 97):
        part = linalg.attention(query[:, :, :last], key[:, :, :last], value[:, :, :last], causal=True)
        assert torch.equal(part, whole[:, :, :last])
    for bad in (torch.nan, torch.inf):
        broken = query.clone()
        broken[0, 1, 60, 5] = bad
        found = linalg.attention(broken, key, value, causal=True)
        assert found[0, 1, 60].isnan().all()
        keep = torch.ones(4, 130, dtype=torch.bool)
        keep[1, 60] = False
        assert torch.equal(found[0, keep], whole[0, keep])
        broken = key.clone()
        broken[0, 1, 60, 5] = bad  # which heads 2 and 3 share
        found = linalg.attention(query, broken, value, causal=True)
        assert torch.equal(found[0, :2], whole[0, :2]) and torch.equal(found[0, 2:, :60], whole[0, 2:, :60])
        assert bad == torch.inf or found[0, 2:, 60:].isnan().all()
    # Scores whose differences are all that fp32 does not round off leave the largest alone.
    largest = linalg.attention(query, key, value, scale=1e9, causal=True)
    exact, size = exact_attention(query, key, value, 1e9, True)
    assert ((largest.double() - exact).abs() <= 2**-8 * size).double().mean() > 0.999 and largest.isfinite().all()
