"""Half-quadratic refinement against a loop over single weights."""

from __future__ import annotations

import pytest
import references
import torch

from hf_gptq_plugin.format.spec import BITS, QuantSpec
from hf_gptq_plugin.solve import hqq
from hf_gptq_plugin.solve.hqq import half_quadratic
from hf_gptq_plugin.solve.scales import choose_scales

SPECS = [
    QuantSpec(bits, 20, sym, checkpoint_format="gptq_v2" if bits == 3 else "gptq")
    for bits, sym in ((4, True), (4, False), (3, False), (2, True), (2, False), (8, False))
]


def grids(weight: torch.Tensor, spec: QuantSpec) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The grid that is refined, and the refined one."""
    start = choose_scales(weight, torch.ones(weight.shape[1]), spec, "mse")
    return [start, half_quadratic(weight, *start, spec, torch.float16)]


def heavy_tailed(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns) * torch.rand(rows, columns).clamp(min=0.05).pow(-0.7) * 0.02


def errors(weight: torch.Tensor, grid: tuple[torch.Tensor, torch.Tensor], spec: QuantSpec, p: float) -> list[float]:
    """Σ |w - ŵ|^p of every group."""
    width = spec.width(weight.shape[1])
    return [
        references.lp_error(
            weight[n, g * width : (g + 1) * width].numpy(), float(grid[0][n, g]), float(grid[1][n, g]), spec.bits, p
        )
        for n in range(len(weight))
        for g in range(grid[0].shape[1])
    ]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_agrees_with_a_loop(spec: QuantSpec) -> None:
    weight = heavy_tailed(6, 48)  # the last group is shorter
    start, refined = grids(weight, spec)
    for n in range(6):
        for g in range(3):
            part = weight[n, g * 20 : (g + 1) * 20].numpy()
            scale, zero = references.half_quadratic(
                part, float(start[0][n, g]), float(start[1][n, g]), spec.bits, spec.sym, spec.zero_offset, 0.7, 10.0,
                1.01, 20, hqq._STEPS.tolist(),
            )  # fmt: skip
            found = references.lp_error(part, float(refined[0][n, g]), float(refined[1][n, g]), spec.bits, 0.7)
            expected = references.lp_error(part, scale, zero, spec.bits, 0.7)
            # fp32 against float64: a code that falls the other way sends the rounds another way.
            assert found == pytest.approx(expected, rel=0.02 if spec.bits == 8 else 5e-3)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_lowers_its_objective_and_raises_no_square(spec: QuantSpec) -> None:
    weight = heavy_tailed(32, 48)
    start, refined = grids(weight, spec)
    sums = []
    for p in (0.7, 2.0):
        before, after = errors(weight, start, spec, p), errors(weight, refined, spec, p)
        assert all(b <= a * (1 + 1e-5) for a, b in zip(before, after, strict=True))
        sums.append(sum(after) / sum(before))
    assert sums[0] < 0.995


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
def test_grids_can_be_stored(bits: int, fmt: str) -> None:
    weight = torch.cat([heavy_tailed(8, 16), torch.zeros(1, 16), torch.full((1, 16), 1e-7), torch.rand(1, 16) + 3])
    for sym in (True, False):
        spec = QuantSpec(bits, 8, sym, checkpoint_format=fmt)
        scales, zeros = grids(weight, spec)[1]
        assert torch.equal(scales, scales.half().float())
        assert (scales.abs() >= torch.finfo(torch.float16).tiny).all()
        assert torch.equal(zeros, zeros.round())
        lowest, highest = (2 ** (bits - 1),) * 2 if sym else spec.zero_range
        assert zeros.min() >= lowest and zeros.max() <= highest
        assert (scales[8] == 1).all()  # a group of zeros keeps what it came with


def test_shrinking_is_the_generalized_soft_threshold() -> None:
    errors = torch.tensor([0.0, 0.1, -0.1, 0.3, -0.5, 4.0])
    expected = [0.0, 0.0, 0.0, 0.3 - 0.3**-0.3 / 10, -(0.5 - 0.5**-0.3 / 10), 4.0 - 4.0**-0.3 / 10]
    assert hqq.shrink(errors, 10.0).tolist() == pytest.approx(expected, abs=1e-6)
