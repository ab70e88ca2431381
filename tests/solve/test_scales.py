"""Choice of scales against an exhaustive loop."""

from __future__ import annotations

import pytest
import references
import torch

from hf_gptq_plugin import native
from hf_gptq_plugin.format.spec import BITS, QuantSpec
from hf_gptq_plugin.solve import scales as module
from hf_gptq_plugin.solve.scales import choose_scales, search_group


def error_of(weight: torch.Tensor, importance: torch.Tensor, scale: float, zero: float, maxq: int) -> float:
    w = weight.double()
    codes = (torch.round(w / scale) + zero).clamp(0, maxq)
    return float((importance.double() * (w - (codes - zero) * scale) ** 2).sum())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [8, 20, -1])
def test_symmetric_search_finds_the_best_candidate(bits: int, group_size: int) -> None:
    weight, importance = torch.randn(5, 48), torch.rand(48)
    spec = QuantSpec(bits, group_size)
    scales, zeros = choose_scales(weight, importance, spec, "mse")
    assert (zeros == 2 ** (bits - 1)).all()
    assert torch.equal(scales, scales.half().float())
    width = spec.width(48)
    for n in range(5):
        for g in range(spec.groups(48)):
            part = slice(g * width, (g + 1) * width)
            best = references.best_scale_sym(
                weight[n, part].double().numpy(), importance[part].double().numpy(), bits, module._SHRINK_SYM.tolist()
            )
            found = error_of(weight[n, part], importance[part], float(scales[n, g]), 2 ** (bits - 1), spec.maxq)
            # fp32 against float64: near ties may fall either way.
            assert found <= best * (1 + 1e-4)


def test_a_group_without_negatives_takes_the_wider_side() -> None:
    weight = torch.linspace(0.1, 1.0, 16)[None]
    scales, _ = choose_scales(weight, torch.ones(16), QuantSpec(4, 16), "mse")
    assert scales[0, 0] < 0  # codes 0..7 now reach up to 8 steps


@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
def test_asymmetric_minmax(fmt: str) -> None:
    weight = torch.tensor([[-1.0, 0.0, 2.0], [1.0, 2.0, 3.0], [-3.0, -2.0, -1.0], [0.0, 0.0, 0.0]])
    scales, zeros = choose_scales(weight, torch.ones(3), QuantSpec(4, -1, False, checkpoint_format=fmt), "minmax")
    torch.testing.assert_close(scales[:, 0], torch.tensor([0.2, 0.2, 0.2, 1.0]), rtol=1e-3, atol=0)
    lowest = 1.0 if fmt == "gptq" else 0.0
    assert zeros[:, 0].tolist() == [5.0, lowest, 15.0, lowest]


def test_symmetric_minmax_covers_the_range() -> None:
    scales, zeros = choose_scales(torch.tensor([[-3.0, 1.5]]), torch.ones(2), QuantSpec(4, -1), "minmax")
    assert scales[0, 0] == pytest.approx(6 / 15, rel=1e-3)
    assert zeros[0, 0] == 8


@pytest.mark.parametrize("sym", [True, False])
def test_tiny_and_empty_groups_have_usable_scales(sym: bool) -> None:
    weight = torch.cat([torch.zeros(1, 8), torch.full((1, 8), 1e-9), torch.randn(1, 8) * 1e-6])
    scales, _ = choose_scales(weight, torch.ones(8), QuantSpec(4, -1, sym), "mse")
    assert scales[0, 0] == 1.0
    assert (scales.abs() >= torch.finfo(torch.float16).tiny).all()


@pytest.mark.skipif(native.library() is None, reason="compares the native library with PyTorch; it is absent")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_native_search_is_as_good_as_pytorch(bits: int, sym: bool, dtype: torch.dtype) -> None:
    weight, importance = torch.randn(37, 24), torch.rand(24)
    spec = QuantSpec(bits, 24, sym)
    shrink = module._SHRINK_SYM if sym else module._SHRINK_ASYM
    scales, zeros = choose_scales(weight, importance, spec, "mse", dtype)
    expected, expected_zeros = search_group(weight, importance, spec, shrink, True, dtype)
    assert torch.equal(scales, scales.to(dtype).float())
    for n in range(37):
        found = error_of(weight[n], importance, float(scales[n, 0]), float(zeros[n, 0]), spec.maxq)
        best = error_of(weight[n], importance, float(expected[n]), float(expected_zeros[n]), spec.maxq)
        assert found <= best * (1 + 1e-4) + 1e-12


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="scale_search='best'"):
        choose_scales(torch.ones(1, 2), torch.ones(2), QuantSpec(4, -1), "best")
