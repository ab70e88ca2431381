"""The solver against OBQ written out in float64, and its invariances."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import references
import torch

from hf_gptq_plugin import native
from hf_gptq_plugin.format.grid import natural_groups
from hf_gptq_plugin.format.spec import BITS, QuantSpec
from hf_gptq_plugin.solve import gptq
from hf_gptq_plugin.solve.gptq import SolveSettings, solve
from hf_gptq_plugin.solve.hessian import factorize
from hf_gptq_plugin.solve.scales import choose_scales


def problem(rows: int, columns: int, tokens: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of correlated inputs of very different size."""
    tokens = tokens or 4 * columns
    x = torch.randn(tokens, columns) @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns) / columns**0.5)
    x *= torch.logspace(-1, 1, columns)[torch.randperm(columns)]
    return torch.randn(rows, columns), x.T @ x / tokens


@pytest.mark.parametrize("spec", [
    QuantSpec(4, 16), QuantSpec(3, 16, sym=False), QuantSpec(2, -1), QuantSpec(8, 20),
    QuantSpec(4, 16, desc_act=True), QuantSpec(4, 16, sym=False, checkpoint_format="gptq_v2"),
])  # fmt: skip
@pytest.mark.parametrize("order", ["hessian", "natural"])
def test_codes_are_those_of_obq(spec: QuantSpec, order: str) -> None:
    weight, hessian = problem(6, 48)
    settings = SolveSettings(order=order, descent=0, refit=False)
    solved, report = solve(weight, hessian, spec, settings)
    damped = hessian.double().numpy() + report.damp_percent * hessian.diagonal().mean().item() * np.eye(48)
    by_size = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
    columns = list(range(48)) if order == "natural" and not spec.desc_act else by_size
    expected = references.obq(
        weight.numpy(), damped, columns, solved.scales.T.numpy(), solved.zeros.T.numpy(), solved.group.numpy(),
        spec.maxq,
    )  # fmt: skip
    np.testing.assert_array_equal(solved.codes.numpy(), expected)


def test_error_is_the_quadratic_form() -> None:
    weight, hessian = problem(6, 48)
    solved, report = solve(weight, hessian, QuantSpec(3, 16))
    damped = hessian.double() + report.damp_percent * hessian.diagonal().double().mean() * torch.eye(48)
    delta = weight.double() - solved.dequantize().double()
    error, energy = (float(((w @ damped) * w).sum()) for w in (delta, weight.double()))
    # Scales are stored in fp16, but the solve already used the stored values.
    assert report.loss == pytest.approx(error, rel=1e-4)
    assert report.relative_error == pytest.approx(error / energy, rel=1e-4)


@pytest.mark.parametrize("spec", [QuantSpec(4, 32), QuantSpec(2, 32, sym=False), QuantSpec(3, 100, desc_act=True)])
def test_blocksize_and_threads_do_not_change_codes(spec: QuantSpec) -> None:
    weight, hessian = problem(40, 300)
    expected, _ = solve(weight, hessian, spec, SolveSettings(blocksize=128))
    for blocksize in (1, 7, 300, 4096):
        solved, _ = solve(weight, hessian, spec, SolveSettings(blocksize=blocksize))
        assert torch.equal(solved.codes, expected.codes), blocksize
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper = factorize(hessian, "hessian", 0.01).upper
    scales, zeros = choose_scales(weight, hessian.diagonal(), replace(spec, desc_act=False), "mse")
    group = natural_groups(300, spec.group_size)[order]
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(gptq.solve_columns(weight[:, order], upper, scales, zeros, group, spec.bits, 128))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.skipif(native.library() is None, reason="compares the native library with PyTorch; it is absent")
@pytest.mark.parametrize("bits", BITS)
def test_native_codes_are_those_of_pytorch(bits: int) -> None:
    weight, hessian = problem(33, 200)
    spec = QuantSpec(bits, 32, sym=False)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper = factorize(hessian, "hessian", 0.01).upper
    scales, zeros = choose_scales(weight, hessian.diagonal(), spec, "minmax")
    group = natural_groups(200, 32)[order]
    arguments = (upper, scales, zeros, group, bits)
    codes, errors = gptq.solve_columns(weight[:, order], *arguments, 64)
    expected, expected_errors = gptq._solve_columns_reference(weight[:, order].clone(), *arguments)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(errors, expected_errors, rtol=1e-12, atol=0)


def test_beats_rounding_by_far() -> None:
    # 128 inputs that mostly move along 24 directions leave the solver much to compensate with.
    x = torch.randn(512, 24) @ torch.randn(24, 128) + 0.1 * torch.randn(512, 128)
    weight, hessian = torch.randn(32, 128), x.T @ x / 512
    solved, report = solve(weight, hessian, QuantSpec(3, 32))
    delta = weight - solved.dequantize()
    nearest = torch.tensor(
        references.obq(
            weight.numpy(), np.eye(128), list(range(128)), solved.scales.T.numpy(), solved.zeros.T.numpy(),
            solved.group.numpy(), 7,
        )
    )  # fmt: skip
    rounded = weight - (nearest - 4) * solved.scales.float().T[:, solved.group.long()]
    assert ((delta @ hessian) * delta).sum() < 0.5 * ((rounded @ hessian) * rounded).sum()
    assert 0 < report.relative_error < 1


@pytest.mark.parametrize("order", ["hessian", "natural"])
@pytest.mark.parametrize("dead", [[3, 40], list(range(16, 32))])
def test_dead_columns_are_zero_and_harmless(dead: list[int], order: str) -> None:
    weight, hessian = problem(8, 64)
    hessian[dead] = 0
    hessian[:, dead] = 0
    settings = SolveSettings(order=order)
    solved, report = solve(weight, hessian, QuantSpec(4, 16), settings)
    assert report.dead_columns == len(dead)
    # 0 lies on every grid whose zero is a code.
    assert not solved.dequantize()[:, dead].any()
    if len(dead) == 16:  # a whole group: the others are solved as if it were not there, but for how sums round
        others = [k for k in range(64) if k not in dead]
        smaller, alone = solve(weight[:, others], hessian[others][:, others], QuantSpec(4, 16), settings)
        assert (solved.codes[:, others] != smaller.codes).float().mean() < 0.01
        assert report.loss == pytest.approx(alone.loss, rel=1e-2)


def test_scales_are_stored_as_they_were_used() -> None:
    weight, hessian = problem(8, 64)
    for dtype in (torch.float16, torch.bfloat16):
        solved, _ = solve(weight, hessian, QuantSpec(4, 16), SolveSettings(scales_dtype=dtype))
        assert solved.scales.dtype == dtype
        assert torch.isfinite(solved.scales).all() and (solved.scales != 0).all()


def test_weights_that_are_not_finite_are_refused() -> None:
    weight, hessian = problem(4, 16)
    weight[1, 2] = float("nan")
    with pytest.raises(gptq.SolveError, match="weight is not finite"):
        solve(weight, hessian, QuantSpec(4, 16))


@pytest.mark.parametrize(
    ("field", "value"),
    [("damp_percent", 0.0), ("damp_percent", 1.0), ("order", "gar"), ("scale_search", "best"), ("blocksize", 0)],
)
def test_impossible_settings_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        SolveSettings(**{field: value})  # type: ignore[arg-type]
