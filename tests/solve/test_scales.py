"""Choice of scales against an exhaustive loop."""

from __future__ import annotations

import math

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
@pytest.mark.parametrize("size", [1, 1e-4])  # of small weights no candidate is a normal fp16 number
def test_native_search_is_as_good_as_pytorch(bits: int, sym: bool, dtype: torch.dtype, size: float) -> None:
    weight, importance = torch.randn(37, 24) * size, torch.rand(24)
    spec = QuantSpec(bits, 24, sym)
    shrink = module._SHRINK_SYM if sym else module._SHRINK_ASYM
    scales, zeros = choose_scales(weight, importance, spec, "mse", dtype)
    expected, expected_zeros = search_group(weight, importance, spec, shrink, True, dtype)
    assert torch.equal(scales, scales.to(dtype).float())
    for n in range(37):
        found = error_of(weight[n], importance, float(scales[n, 0]), float(zeros[n, 0]), spec.maxq)
        best = error_of(weight[n], importance, float(expected[n]), float(expected_zeros[n]), spec.maxq)
        assert found <= best * (1 + 1e-4) + 1e-12 * size**2
        if size < 1:
            assert best <= found * (1 + 1e-4) + 1e-12 * size**2


@pytest.mark.parametrize("method", ["mse", "minmax", "percentile", "entropy"])
@pytest.mark.parametrize("v2", [False, True])
def test_groups_whose_scales_would_be_subnormal_keep_both_signs(method: str, v2: bool) -> None:
    """Steps are the least that fp16 has, and zeros lie where the weights are: no error is larger than half a step."""
    weight = torch.rand(16, 64) * 0.01 - 0.005
    spec = QuantSpec(8, 64, sym=False, checkpoint_format="gptq_v2" if v2 else "gptq")
    scales, zeros = choose_scales(weight, torch.ones(64), spec, method)
    step = torch.finfo(torch.float16).tiny
    assert (scales == step).all()
    error = ((weight / step).round() + zeros).clamp(0, 255) - zeros - weight / step
    # Percentiles lie between the outermost weights and their neighbours.
    outside = weight.sort().values.diff().amax() / step if method == "percentile" else 0
    assert error.abs().max() <= 0.5 + outside


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="scale_search='best'"):
        choose_scales(torch.ones(1, 2), torch.ones(2), QuantSpec(4, -1), "best")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [32, 128])
def test_percentile_is_minmax_on_the_clipped_range(bits: int, width: int) -> None:
    weight = torch.randn(4, width) ** 3
    for sym in (True, False):
        scales, zeros = choose_scales(weight, torch.rand(width), QuantSpec(bits, width, sym), "percentile")
        for n in range(4):
            ordered = sorted(abs(w) if sym else w for w in weight[n].tolist())

            def quantile(share: float, ordered: list[float] = ordered) -> float:
                place = share * (width - 1)
                below = int(place)
                above = min(below + 1, width - 1)
                return ordered[below] + (place - below) * (ordered[above] - ordered[below])

            high = max(quantile(0.995), 0.0)
            low = -high if sym else min(quantile(0.005), 0.0)
            scale = (high - low) / (2**bits - 1)
            assert float(scales[n, 0]) == pytest.approx(scale, rel=1e-3)
            zero = 2 ** (bits - 1) if sym else min(max(round(-low / float(scales[n, 0])), 1), 2**bits - 1)
            assert float(zeros[n, 0]) == zero
            assert scale < (max(map(abs, ordered)) * 2 if sym else ordered[-1] - ordered[0]) / (2**bits - 1)


def test_percentile_of_a_group_of_zeros_but_one_is_its_range() -> None:
    weight = torch.zeros(1, 300)
    weight[0, 7] = 3.0
    for sym in (True, False):
        spec = QuantSpec(4, -1, sym, checkpoint_format="gptq_v2")
        expected = choose_scales(weight, torch.ones(300), spec, "minmax")
        got = choose_scales(weight, torch.ones(300), spec, "percentile")
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
def test_entropy_finds_the_least_divergence(bits: int, sym: bool) -> None:
    weight, spec = torch.randn(6, 72) ** 3, QuantSpec(bits, 40, sym)
    scales, zeros = choose_scales(weight, torch.rand(72), spec, "entropy")
    assert torch.equal(scales, scales.half().float())
    chosen = set()
    for n in range(6):
        for g, part in enumerate((weight[n, :40], weight[n, 40:])):
            values = part.double().numpy()
            low, high = min(values.min(), 0.0), max(values.max(), 0.0)
            best = float("inf")
            for t in (module._SHRINK_SYM if sym else module._SHRINK_ASYM).tolist():
                width = 2 * max(-low, high) if sym else high - low
                for sign in (1, -1) if sym else (1,):
                    scale = float(torch.tensor(sign * width * t / spec.maxq).half())
                    zero = 2 ** (bits - 1) if sym else min(max(round(-low * t / scale), 1), spec.maxq)
                    best = min(best, references.magnitude_divergence(values, scale, zero, bits))
            found = references.magnitude_divergence(values, float(scales[n, g]), float(zeros[n, g]), bits)
            # fp32 against float64: near ties may fall either way.
            assert found <= best * (1 + 1e-3)
            full = (2 * max(-low, high) if sym else high - low) / spec.maxq
            chosen.add(round(abs(float(scales[n, g])) / full, 1))
    assert bits == 8 or len(chosen) > 1  # ranges are clipped by what the groups hold


def test_divergence_of_known_weights() -> None:
    weight, steps = torch.tensor([[0.0, 0.5, -3.0]]), torch.tensor([[0.0, 0.0, -2.0]])
    got = module._divergence(weight, steps, torch.tensor([-1.0]))
    expected = 0.25 + (0.5 * math.log(0.5 / 0.25) - 0.5 + 0.25) + (3 * math.log(3 / 2) - 3 + 2)
    assert float(got[0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
@pytest.mark.parametrize("sym", [True, False])
def test_other_searches_have_usable_scales(method: str, sym: bool) -> None:
    weight = torch.cat([torch.zeros(1, 8), torch.full((1, 8), 1e-9), torch.randn(1, 8) * 1e-6, torch.ones(1, 8)])
    scales, zeros = choose_scales(weight, torch.ones(8), QuantSpec(4, -1, sym), method)
    assert scales[0, 0] == 1.0
    assert (scales.abs() >= torch.finfo(torch.float16).tiny).all()
    codes = (torch.round(weight[3] / scales[3, 0]) + zeros[3, 0]).clamp(0, 15)
    assert ((codes - zeros[3, 0]) * scales[3, 0]).tolist() == pytest.approx([1.0] * 8, rel=0.07)
