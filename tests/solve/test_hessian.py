"""Hessian and factor against float64."""

from __future__ import annotations

import pytest
import torch

from hf_gptq_plugin.solve import hessian as solve_hessian
from hf_gptq_plugin.solve.hessian import Hessian, SolveError, factorize, reordered


def test_mean_over_tokens() -> None:
    x = torch.randn(3, 5, 8)
    hessian = Hessian(8)
    hessian.add(x[:1])
    hessian.add(x[1:])
    rows = x.flatten(0, 1).double()
    assert hessian.tokens == len(rows)
    torch.testing.assert_close(hessian.mean().double(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "size"), [(1, 1 << 30), (16, 1 << 30), (2048, 600), (2048, 1 << 30)])
def test_what_is_multiplied_at_once_changes_nothing(tokens: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve_hessian, "_BYTES", size)
    x, exact, wanted, calls = torch.randn(60, 4), torch.randn(60, 4), torch.randn(60, 3), []
    add_gram = solve_hessian.add_gram

    def counted(total: torch.Tensor, *sides: torch.Tensor) -> None:
        calls.append(len(sides[0]))
        add_gram(total, *sides)

    monkeypatch.setattr(solve_hessian, "add_gram", counted)
    crossed, aimed, near = Hessian(4, at_once=tokens), Hessian(4, at_once=tokens), dict(rtol=1e-5, atol=1e-5)
    for rows in torch.arange(60).split(7):
        crossed.add(x[rows], exact[rows])
    assert crossed.tokens == 60
    torch.testing.assert_close(crossed.mean().double(), x.double().T @ x.double() / 60, **near)
    torch.testing.assert_close(crossed.mean_cross().double(), x.double().T @ (exact - x).double() / 60, **near)
    # 7 rows at a time, of 16 bytes in two tensors.
    assert max(calls) == min(-(-tokens // 7) * 7, -(-size // 224) * 7, 60)
    for rows in torch.arange(60).split(7):
        aimed.add(x[rows], None, None, wanted[rows])
    drift = aimed.drift(torch.zeros(3, 4))
    torch.testing.assert_close(drift.double(), wanted.double().T @ x.double() / 60, **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_count_differently(dtype: torch.dtype) -> None:
    x, exact, weights = torch.randn(9, 4).to(dtype), torch.randn(9, 4).to(dtype), torch.rand(9) * 4
    hessian = Hessian(4)
    for rows in (slice(0, 3), slice(3, 9)):
        hessian.add(x[rows], exact[rows], weights[rows])
    truth, cross = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    for token, other, weight in zip(x.double(), exact.double(), weights.double(), strict=True):
        truth += weight * torch.outer(token, token) / 9
        cross += weight * torch.outer(token, other - token) / 9
    close = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=0.03, atol=0.05)
    torch.testing.assert_close(hessian.mean().double(), truth, **close)
    torch.testing.assert_close(hessian.mean_cross().double(), cross, **close)


def test_what_a_layer_needs_of_its_inputs_errors() -> None:
    x, exact, weight = torch.randn(50, 6), torch.randn(50, 6), torch.randn(300, 6)
    x[:, 2] = 0  # never active: its weights are going to be 0
    hessian = Hessian(6)
    hessian.add(x, exact)
    live = weight.double().clone()
    live[:, 2] = 0
    wanted = live @ (exact - x).double().T @ x.double() / 50
    torch.testing.assert_close(hessian.drift(weight).double(), wanted, rtol=1e-5, atol=1e-5)
    hessian.factor("natural", 0.01)  # which gives the diagonal to inputs that were never active
    torch.testing.assert_close(hessian.drift(weight).double(), wanted, rtol=1e-5, atol=1e-5)
    hessian.forget_cross()
    assert hessian.drift(weight) is None


def test_what_a_layer_is_to_return() -> None:
    x, wanted, weights, weight = torch.randn(50, 6), torch.randn(50, 300), torch.rand(50) * 2, torch.randn(300, 6)
    x[:, 2] = 0
    missing = (wanted - x @ weight.T).double() * weights.double()[:, None]
    hessian, damped = Hessian(6), Hessian(6)
    for rows in (slice(0, 20), slice(20, 50)):
        for gathered in (hessian, damped):
            gathered.add(x[rows], None, weights[rows], wanted[rows])
    drift = hessian.drift(weight)
    torch.testing.assert_close(drift.double(), missing.T @ x.double() / 50, rtol=1e-4, atol=1e-5)
    assert hessian.drift(weight) is None
    damped.factor("natural", 0.01)
    with pytest.raises(RuntimeError, match="before its factor"):
        damped.drift(weight)


def test_bf16_inputs_are_summed_in_fp32() -> None:
    x = torch.randn(4096, 4).bfloat16()
    hessian = Hessian(4)
    hessian.add(x)
    truth = x.double().T @ x.double() / 4096
    torch.testing.assert_close(hessian.mean().double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mine", [0, 3])
def test_leaning_on_others(mine: int) -> None:
    x, exact, other, exactly = torch.randn(mine, 4), torch.randn(mine, 4), torch.randn(6, 4), torch.randn(6, 4)
    hessian, prior = Hessian(4), Hessian(4)
    if mine:
        hessian.add(x, exact)
    prior.add(other, exactly)
    hessian.lean_on(prior, 2)
    assert hessian.tokens == mine
    mean = (x.T @ x + 2 * prior.mean()) / (mine + 2)
    cross = (x.T @ (exact - x) + 2 * prior.mean_cross()) / (mine + 2)
    torch.testing.assert_close(hessian.mean(), mean)
    torch.testing.assert_close(hessian.mean_cross(), cross)


def test_nothing_seen_and_nothing_finite() -> None:
    hessian = Hessian(2)
    with pytest.raises(SolveError, match="no calibration token reached"):
        hessian.mean()
    hessian.add(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(SolveError, match="inputs are not finite"):
        hessian.mean()
    hessian = Hessian(2)
    hessian.add(torch.ones(1, 2), None, None, torch.tensor([[1.0, float("nan"), 2.0]]))
    with pytest.raises(SolveError, match="outputs in the dense model are not finite"):
        hessian.mean()


def test_what_is_multiplied_may_be_written_into() -> None:
    x = torch.ones(3, 2)
    hessian = Hessian(2, at_once=1)
    hessian.add(x)
    x.zero_()
    assert torch.equal(hessian.mean(), torch.ones(2, 2))


def test_means_are_taken_once() -> None:
    hessian = Hessian(3)
    hessian.add(torch.randn(5, 3))
    first = hessian.mean().clone()
    assert torch.equal(hessian.mean(), first)
    with pytest.raises(RuntimeError, match="nothing can be added"):
        hessian.add(torch.randn(5, 3))


@pytest.mark.parametrize("name", ["hessian", "natural"])
def test_factor_of_the_inverse(name: str) -> None:
    x = torch.randn(200, 24) * torch.linspace(0.5, 2, 24)[torch.randperm(24)]
    hessian = x.T @ x / 200
    order = hessian.diagonal().argsort(descending=True) if name == "hessian" else torch.arange(24)
    damped = hessian.double() + 0.05 * hessian.diagonal().double().mean() * torch.eye(24)
    inverse = torch.linalg.inv(damped[order][:, order])
    diagonal = hessian.diagonal().clone()
    factor = factorize(hessian, name, 0.05)
    upper = factor.upper.double()
    assert factor.damp_percent == 0.05
    assert torch.equal(factor.order, order) and torch.equal(factor.diagonal, diagonal)
    torch.testing.assert_close(factor.damped.double(), damped, rtol=1e-6, atol=1e-7)
    assert torch.equal(factor.upper, factor.upper.triu())
    torch.testing.assert_close(upper.T @ upper, inverse, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(upper, torch.linalg.cholesky(inverse, upper=True), rtol=1e-4, atol=1e-5)


def test_layers_of_the_same_inputs_share_a_factor() -> None:
    x = torch.randn(40, 8)
    hessian, other = Hessian(8), Hessian(8)
    hessian.add(x)
    other.add(x)
    first = hessian.factor("hessian", 0.01)
    assert hessian.factor("hessian", 0.01) is first
    upper = hessian.factor("natural", 0.05).upper  # from the matrix as it was before it was damped
    assert torch.equal(upper, other.factor("natural", 0.05).upper)


def test_reordered() -> None:
    matrix, order = torch.randn(600, 600), torch.randperm(600)
    assert torch.equal(reordered(matrix, order), matrix[order][:, order])


def test_damping_raises_itself_and_says_so() -> None:
    x = torch.randn(3, 16)
    hessian = x.T @ x - 0.05 * torch.eye(16)  # indefinite
    factor = factorize(hessian, "natural", 0.001)
    assert factor.damp_percent > 0.001
    assert torch.isfinite(factor.upper).all()


def test_no_damping_helps() -> None:
    with pytest.raises(SolveError, match="not positive definite even with damping"):
        factorize(-torch.eye(4) + 2 * torch.ones(4, 4).fill_diagonal_(0), "natural", 0.01)


def test_all_columns_dead() -> None:
    factor = factorize(torch.zeros(4, 4), "natural", 0.01)
    assert torch.isfinite(factor.upper).all()
