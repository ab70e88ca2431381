"""Errors of outputs felt together: against one weight at a time on the whole Kronecker product, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from references import obq
from torch import Tensor

from hf_gptq_plugin import native
from hf_gptq_plugin.format.grid import natural_groups
from hf_gptq_plugin.format.spec import BITS, QuantSpec
from hf_gptq_plugin.solve import gptq, joint, refine
from hf_gptq_plugin.solve.gptq import SolveSettings, solve_factored
from hf_gptq_plugin.solve.hessian import SolveError, factorize
from hf_gptq_plugin.solve.joint import Metric

IMPLEMENTATIONS = ["native", "pytorch"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pytorch":
        monkeypatch.setattr(joint.native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no native library")
    return str(request.param)


def symmetric(size: int) -> Tensor:
    x = torch.randn(3 * size, max(1, size // 2)) @ torch.randn(max(1, size // 2), size) + torch.randn(3 * size, size)
    made = x.T @ x / len(x)
    return made / made.diagonal().mean() + 0.05 * torch.eye(size)


def grid(bits: int, rows: int, groups: int) -> tuple[Tensor, Tensor]:
    scales = (torch.rand(rows, groups) * 0.3 + 0.1) * torch.where(torch.rand(rows, groups) < 0.5, -1.0, 1.0)
    return scales * 8 / 2**bits, torch.randint(1, 2**bits, (rows, groups)).float()


def parts(rows: int, most: int, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A metric's, of at most so many rows."""
    monkeypatch.setattr(joint, "_ROWS", most)
    size = joint.part_rows(rows)
    return [symmetric(min(size, rows - a)) for a in range(0, rows, size)]


def error(w: Tensor, h: Tensor, m: list[Tensor], q: Tensor, s: Tensor, z: Tensor, g: Tensor) -> float:
    delta = w.double() - (q.double() - z[:, g.long()].double()) * s[:, g.long()].double()
    return float(((torch.block_diag(*m).double() @ delta @ h.double()) * delta).sum())


def test_parts_are_of_one_size_and_cover_all_rows() -> None:
    for rows in (1, 576, 768, 769, 1536, 4096, 11008):
        size = joint.part_rows(rows)
        assert 1 <= size <= 768 and -(-rows // size) == -(-rows // 768)


@pytest.mark.parametrize("bits", BITS)
def test_columns_are_solved_as_one_weight_at_a_time(
    bits: int, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OBQ on all weights at once, with the Kronecker product for a Hessian, column by column and in them row by row."""
    rows, columns = 11, 14
    metric = parts(rows, 6, monkeypatch)
    assert [len(part) for part in metric] == [6, 5]
    hessian, weight = symmetric(columns), torch.randn(rows, columns)
    scales, zeros = grid(bits, rows, 3)
    group = natural_groups(columns, 6)
    factor = factorize(hessian.clone(), "hessian", 0.01)
    order, in_order = factor.order, group[factor.order]
    monkeypatch.setattr(joint, "_COLUMNS", 5)
    codes = joint.solve_columns(weight[:, order], factor.upper, Metric(metric), scales, zeros, in_order, bits)

    damped = factor.damped[order][:, order].double().numpy()
    whole = np.kron(damped, torch.block_diag(*metric).double().numpy())
    flat = weight[:, order].T.reshape(1, -1).numpy()
    places = [(k, n) for k in range(columns) for n in range(rows)]
    s = np.array([[float(scales[n, in_order[k]]) for k, n in places]])
    z = np.array([[float(zeros[n, in_order[k]]) for k, n in places]])
    expected = obq(flat, whole, list(range(len(places))), s, z, np.arange(len(places)), 2**bits - 1)
    assert (codes.T.reshape(-1).numpy() != expected[0]).mean() <= 0.01  # a tie may fall either way in fp32


def test_without_a_common_feeling_it_is_gptq(implementation: str) -> None:
    weight, hessian = torch.randn(9, 40), symmetric(40)
    scales, zeros = grid(4, 9, 5)
    factor = factorize(hessian, "hessian", 0.01)
    group = natural_groups(40, 8)[factor.order]
    ours = joint.solve_columns(weight[:, factor.order], factor.upper, Metric([torch.eye(9)]), scales, zeros, group, 4)
    theirs, _ = gptq.solve_columns(weight[:, factor.order], factor.upper, scales, zeros, group.to(torch.int32), 4, 128)
    assert (ours != theirs).float().mean() <= 0.01


@pytest.mark.parametrize("bits", BITS)
def test_descent_ends_where_no_single_code_can_be_improved(
    bits: int, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "_COLUMNS", 8)
    metric = parts(7, 4, monkeypatch)
    weight, hessian = torch.randn(7, 21), symmetric(21)
    scales, zeros = grid(bits, 7, 3)
    group = natural_groups(21, 7)
    codes = start = torch.randint(0, 2**bits, (7, 21), dtype=torch.uint8)
    kept, before = start.clone(), error(weight, hessian, metric, start, scales, zeros, group)
    for _ in range(300):
        last = codes
        codes, by_row = joint.descend(weight, hessian, Metric(metric), codes, scales, zeros, group, bits)
        delta = (weight - (codes.float() - zeros[:, group]) * scales[:, group]).double()
        expected = ((delta @ hessian.double()) * delta).sum(1)
        torch.testing.assert_close(by_row, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
        after = error(weight, hessian, metric, codes, scales, zeros, group)
        assert after <= before * (1 + 1e-5)
        before = after
        if torch.equal(last, codes):
            break
    assert torch.equal(start, kept) and not torch.equal(start, codes)
    for n, k, code in itertools.product(range(7), range(21), range(2**bits) if bits < 8 else range(0, 256, 5)):
        changed = codes.clone()
        changed[n, k] = code
        assert error(weight, hessian, metric, changed, scales, zeros, group) >= after * (1 - 1e-4) - 1e-6


@pytest.mark.skipif(native.library() is None, reason="compares the native library with PyTorch; it is absent")
def test_native_is_as_good_as_pytorch_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = parts(70, 40, monkeypatch)
    weight, hessian = torch.randn(70, 300), symmetric(300)
    scales, zeros = grid(4, 70, 10)
    group = natural_groups(300, 32)
    factor = factorize(hessian.clone(), "natural", 0.01)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        known = Metric(metric)
        codes = joint.solve_columns(weight, factor.upper, known, scales, zeros, group, 4)
        fitted = joint.refit_scales(weight, factor.damped, known, codes, scales, zeros, 32, torch.float16)
        return codes, fitted, joint.descend(weight, factor.damped, known, codes, fitted, zeros, group, 4)[0]

    def errors(codes: Tensor, fitted: Tensor, better: Tensor) -> list[float]:
        pairs = ((codes, scales), (codes, fitted), (better, fitted))
        return [error(weight, factor.damped, metric, c, s, zeros, group) for c, s in pairs]

    ours, before = run(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert all(torch.equal(a, b) for a, b in zip(ours, run(), strict=True))
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(joint.native, "library", lambda: None)
    assert errors(*ours) == pytest.approx(errors(*run()), rel=2e-2)


def test_refitted_scales_lower_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = parts(6, 4, monkeypatch)
    weight, hessian = torch.randn(6, 20), symmetric(20)
    group = natural_groups(20, 8)
    scales, zeros = grid(4, 6, 3)
    codes = torch.randint(0, 16, (6, 20), dtype=torch.uint8)
    for dtype in (torch.float32, torch.float16):
        scales = scales.to(dtype).float()
        before = error(weight, hessian, metric, codes, scales, zeros, group)
        fitted = joint.refit_scales(weight, hessian, Metric(metric), codes, scales, zeros, 8, dtype)
        assert torch.equal(fitted.to(dtype).float(), fitted)
        assert error(weight, hessian, metric, codes, fitted, zeros, group) < before
    for _ in range(100):
        fitted = joint.refit_scales(weight, hessian, Metric(metric), codes, fitted, zeros, 8, torch.float32)
    # What is best stays where a coarser one would have to take its place.
    kept = joint.refit_scales(weight, hessian, Metric(metric), codes, fitted, zeros, 8, torch.bfloat16)
    assert torch.equal(kept, fitted)
    # In the end, the least squares solution over all scales at once.
    q = codes.double() - zeros[:, group.long()].double()
    columns = []
    for n, g in itertools.product(range(6), range(3)):
        column = torch.zeros(6, 20, dtype=torch.float64)
        column[n] = torch.where(group == g, q[n], 0.0)
        columns.append(column.flatten())
    whole = torch.kron(torch.block_diag(*metric).double(), hessian.double())
    root = torch.linalg.cholesky(whole).T
    best = torch.linalg.lstsq(root @ torch.stack(columns, 1), root @ weight.double().flatten()[:, None]).solution
    torch.testing.assert_close(fitted.double().flatten(), best[:, 0], rtol=1e-2, atol=1e-3)


def test_refit_keeps_rows_whose_scales_cannot_be_stored() -> None:
    """Nothing that float16 has would do for the first row; the others move on."""
    metric, hessian, group = [symmetric(6)], symmetric(24), natural_groups(24, 8)
    scales, zeros = grid(4, 6, 3)
    scales[0] = 2**-14
    scales = scales.half().float()
    codes, weight = torch.randint(0, 16, (6, 24), dtype=torch.uint8), torch.randn(6, 24)
    weight[0] = 1e-9 * torch.randn(24)
    metric[0][0, 1:] = metric[0][1:, 0] = 0
    before = error(weight, hessian, metric, codes, scales, zeros, group)
    fitted = joint.refit_scales(weight, hessian, Metric(metric), codes, scales, zeros, 8, torch.float16)
    assert torch.equal(fitted[0], scales[0]) and not torch.equal(fitted[1:], scales[1:])
    assert error(weight, hessian, metric, codes, fitted, zeros, group) < before


def test_refit_keeps_scales_that_codes_say_nothing_about() -> None:
    scales, zeros = grid(4, 6, 3)
    group = natural_groups(24, 8)
    codes = zeros[:, group.long()].to(torch.uint8)
    kept = joint.refit_scales(
        torch.randn(6, 24), symmetric(24), Metric([symmetric(6)]), codes, scales, zeros, 8, torch.float32
    )
    assert torch.equal(kept, scales)


@pytest.mark.parametrize("desc_act", [False, True])
def test_a_whole_solve_beats_gptq_by_the_common_error(desc_act: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = parts(48, 32, monkeypatch)
    weight, hessian = torch.randn(48, 96), symmetric(96)
    spec, settings = QuantSpec(3, 32, True, desc_act), SolveSettings(alternations=2, descent=2)
    factor = factorize(hessian.clone(), settings.order_for(spec), 0.01)

    def common(quantized: object) -> float:
        delta = weight - quantized.dequantize(torch.float32)  # type: ignore[attr-defined]
        return Metric(metric).error(delta, factor.damped)

    plain, report = solve_factored(weight, factor, spec, settings)
    ours, felt = solve_factored(weight, factor, spec, settings, outputs=metric)
    assert common(ours) < 0.9 * common(plain)
    assert torch.equal(plain.group, ours.group)
    # What is reported is the error of outputs by themselves, which is what gave way.
    delta = weight - ours.dequantize(torch.float32)
    assert felt.loss == pytest.approx(float(refine.row_errors(delta, factor.damped).sum()), rel=1e-3)
    assert felt.loss > report.loss


def test_rows_that_are_felt_most_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = parts(11, 6, monkeypatch)
    ordered, rows = joint.by_falling_diagonal(metric)
    assert sorted(rows[:6].tolist()) == list(range(6)) and sorted(rows[6:].tolist()) == list(range(6, 11))
    whole = torch.block_diag(*metric)
    torch.testing.assert_close(torch.block_diag(*ordered.parts), whole[rows][:, rows])
    for span in ordered.spans:
        assert (ordered.diagonal[span].diff() <= 0).all()


def test_a_metric_that_is_none_is_refused() -> None:
    with pytest.raises(SolveError, match="Hessian of the layer's outputs is not positive definite"):
        Metric([torch.ones(3, 3)])
