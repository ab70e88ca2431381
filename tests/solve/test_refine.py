"""Refinements against what they are defined by, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_gptq_plugin import native
from hf_gptq_plugin.format.grid import natural_groups
from hf_gptq_plugin.format.spec import BITS, QuantSpec
from hf_gptq_plugin.solve import refine
from hf_gptq_plugin.solve.gptq import SolveSettings, solve
from hf_gptq_plugin.solve.hessian import Hessian, factorize


def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(4 * columns, columns // 3) @ torch.randn(columns // 3, columns) + 0.3 * torch.randn(
        4 * columns, columns
    )
    hessian = x.T @ x / len(x)
    return torch.randn(rows, columns), hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns)


def grid(bits: int, rows: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    scales = (torch.rand(rows, groups) * 0.3 + 0.1) * torch.where(torch.rand(rows, groups) < 0.5, -1.0, 1.0)
    return scales * 8 / 2**bits, torch.randint(1, 2**bits, (rows, groups)).float()


def error(w: torch.Tensor, h: torch.Tensor, q: torch.Tensor, s: torch.Tensor, z: torch.Tensor, g: torch.Tensor):
    delta = w.double() - (q.double() - z[:, g.long()].double()) * s[:, g.long()].double()
    return ((delta @ h.double()) * delta).sum(1)


@pytest.mark.parametrize("implementation", ["native", "pytorch"])
@pytest.mark.parametrize("bits", BITS)
def test_descent_ends_where_no_single_code_can_be_improved(bits: int, implementation: str) -> None:
    if implementation == "native" and native.library() is None:
        pytest.skip("no native library")
    weight, hessian = problem(5, 21)
    scales, zeros = grid(bits, 5, 3)
    group = natural_groups(21, 7)
    start = torch.randint(0, 2**bits, (5, 21), dtype=torch.uint8)
    run = refine.descend if implementation == "native" else refine._descend_reference
    kept = start.clone()
    codes, errors = run(weight, hessian, start, scales, zeros, group, bits, 1000)
    assert torch.equal(start, kept)
    final = error(weight, hessian, codes, scales, zeros, group)
    torch.testing.assert_close(errors, final, rtol=1e-4, atol=1e-6)
    assert (final <= error(weight, hessian, start, scales, zeros, group)).all()
    candidates = range(2**bits) if bits < 8 else range(0, 256, 5)
    for k, code in itertools.product(range(21), candidates):
        changed = codes.clone()
        changed[:, k] = code
        assert (error(weight, hessian, changed, scales, zeros, group) >= final * (1 - 1e-4) - 1e-6).all()


@pytest.mark.skipif(native.library() is None, reason="compares the native library with PyTorch; it is absent")
def test_native_descent_is_as_good_as_pytorch() -> None:
    weight, hessian = problem(70, 300)
    scales, zeros = grid(4, 70, 10)
    group = natural_groups(300, 32)
    codes = torch.randint(0, 16, (70, 300), dtype=torch.uint8)
    for rounds in (0, 1, 3):
        ours, errors = refine.descend(weight, hessian, codes, scales, zeros, group, 4, rounds)
        theirs, expected = refine._descend_reference(weight, hessian, codes, scales, zeros, group, 4, rounds)
        # Near ties may fall either way in fp32; almost none do.
        assert (ours != theirs).float().mean() < 0.01
        assert float(errors.sum()) == pytest.approx(float(expected.sum()), rel=1e-2)


@pytest.mark.parametrize("columns", [24, 20])
def test_refitted_scales_are_the_least_squares_solution(columns: int) -> None:
    weight, hessian = problem(6, columns)
    scales, zeros = grid(4, 6, 3)
    group = natural_groups(columns, 8)
    codes = torch.randint(0, 16, (6, columns), dtype=torch.uint8)
    before = error(weight, hessian, codes, scales, zeros, group)
    fitted = refine.refit_scales(weight, hessian, codes, scales, zeros, 8, torch.float32, before)
    root = torch.linalg.cholesky(hessian.double())
    for n in range(6):
        q = codes[n].double() - zeros[n, group.long()].double()
        parts = torch.stack([torch.where(group == g, q, 0.0) for g in range(3)], 1)  # [K, G]
        best = torch.linalg.lstsq(root.T @ parts, root.T @ weight[n].double()[:, None]).solution[:, 0]
        torch.testing.assert_close(fitted[n].double(), best, rtol=1e-3, atol=1e-4)
    assert (error(weight, hessian, codes, fitted, zeros, group) <= before).all()


def test_refit_keeps_what_is_better_once_rounded() -> None:
    weight, hessian = problem(6, 24)
    scales, zeros = grid(4, 6, 3)
    group = natural_groups(24, 8)
    codes = torch.randint(0, 16, (6, 24), dtype=torch.uint8)
    never = torch.zeros(6, dtype=torch.float64)
    assert torch.equal(refine.refit_scales(weight, hessian, codes, scales, zeros, 8, torch.float16, never), scales)
    # Codes that all lie on their zero say nothing about a scale; the old ones stay usable.
    codes = zeros[:, group.long()].to(torch.uint8)
    errors = error(weight, hessian, codes, scales, zeros, group)
    kept = refine.refit_scales(weight, hessian, codes, scales, zeros, 8, torch.float16, errors)
    assert torch.isfinite(kept).all() and (kept.abs() >= torch.finfo(torch.float16).tiny).all()


def test_propagation_aims_at_the_dense_models_output() -> None:
    exact = torch.randn(400, 16)
    x = exact + 0.2 * torch.randn(400, 16) + 0.1 * exact.roll(1, 1)
    weight = torch.randn(5, 16)
    moments = Hessian(16)
    moments.add(x[:150], exact=exact[:150])
    moments.add(x[150:], exact=exact[150:])
    drift = moments.drift(weight)
    factor = factorize(moments.mean(), "hessian", 1e-6)
    aimed = refine.propagate(weight, drift, factor.upper, factor.order, 1.0)
    best = torch.linalg.lstsq(x.double(), exact.double() @ weight.double().T).solution.T
    torch.testing.assert_close(aimed.double(), best, rtol=1e-3, atol=1e-3)
    half = refine.propagate(weight, drift, factor.upper, factor.order, 0.5)
    torch.testing.assert_close(half, (aimed + weight) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [QuantSpec(3, 16), QuantSpec(2, 20, sym=False), QuantSpec(4, 16, desc_act=True)])
def test_refining_lowers_the_error(spec: QuantSpec) -> None:
    weight, hessian = problem(24, 90)
    _, first = solve(weight, hessian, spec, SolveSettings(descent=0, refit=False))
    errors = [first.relative_error]
    for settings in (
        SolveSettings(descent=1, refit=False),
        SolveSettings(descent=0),
        SolveSettings(alternations=2, descent=2),
    ):
        solved, report = solve(weight, hessian, spec, settings)
        errors.append(report.relative_error)
        delta = weight.double() - solved.dequantize().double()
        damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(90)
        own = ((delta @ damped) * delta).sum() / ((weight.double() @ damped) * weight.double()).sum()
        assert report.relative_error == pytest.approx(float(own), rel=1e-3)
    assert max(errors[1:]) <= errors[0] and errors[3] < errors[0]
