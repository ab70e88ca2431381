"""Rounding to nearest against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import references
import torch

from hf_gptq_plugin.format.spec import BITS, QuantSpec
from hf_gptq_plugin.solve.gptq import SolveSettings
from hf_gptq_plugin.solve.hessian import SolveError
from hf_gptq_plugin.solve.rtn import round_to_nearest
from hf_gptq_plugin.solve.scales import METHODS, choose_scales


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_every_code_is_the_nearest(bits: int, sym: bool, method: str) -> None:
    weight, spec = torch.randn(5, 44), QuantSpec(bits, 16, sym)
    got, report = round_to_nearest(weight.double(), spec, SolveSettings(scale_search=method))
    scales, zeros = choose_scales(weight, torch.ones(44), spec, method)
    assert torch.equal(got.scales.float(), scales.T) and torch.equal(got.zeros.float(), zeros.T)
    assert got.group.tolist() == [k // 16 for k in range(44)]
    squares = 0.0
    for n in range(5):
        for k in range(44):
            s, z = float(scales[n, k // 16]), float(zeros[n, k // 16])
            values = (np.arange(2**bits) - z) * s
            nearest = np.abs(values - float(weight[n, k])).min()
            error = abs(values[int(got.codes[n, k])] - float(weight[n, k]))
            assert error <= nearest + 1e-6
            squares += error**2
    assert report.relative_error == pytest.approx(squares / float((weight.double() ** 2).sum()), rel=1e-4)
    assert (report.damp_percent, report.dead_columns) == (0.0, 0)


@pytest.mark.parametrize("sym", [True, False])
def test_refined_is_better_in_its_own_objective(sym: bool) -> None:
    weight = torch.randn(16, 64) ** 3
    spec = QuantSpec(3, 32, sym)
    sums = []
    for refine in (False, True):
        got, _ = round_to_nearest(weight, spec, SolveSettings(), refine)
        back = references.dequantize(got.codes.numpy(), got.scales.numpy(), got.zeros.numpy(), got.group.numpy())
        sums.append((np.abs(weight.double().numpy() - back) ** 0.7).sum())
        packed = got.pack()
        assert torch.equal(got.unpack(**packed, spec=spec).codes, got.codes)
    assert sums[1] < 0.999 * sums[0]


def test_what_cannot_be_rounded() -> None:
    weight = torch.ones(2, 8)
    weight[0, 3] = float("inf")
    with pytest.raises(SolveError, match="the weight is not finite"):
        round_to_nearest(weight, QuantSpec(4, 8), SolveSettings())
    with pytest.raises(ValueError, match="desc_act=True needs a solve order"):
        round_to_nearest(torch.ones(2, 8), QuantSpec(4, 8, desc_act=True), SolveSettings())
