"""What learns, against dense autograd and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.nn.linear import QuantLinear
from hf_gptq_plugin.train import layers as module
from hf_gptq_plugin.train.layers import LearnedCodes, LearnedGrid, LowRankCodes, PooledLora


def quantized(n: int = 24, k: int = 80, **fields: Any) -> QuantLinear:
    """A layer with random codes; K ends in a ragged group."""
    spec = QuantSpec(**{"bits": 4, "group_size": 32, "sym": False, **fields})
    groups = spec.groups(k)
    zeros = torch.randint(2, 2**spec.bits - 2, (groups, n), dtype=torch.int32)
    if spec.sym:
        zeros.fill_(2 ** (spec.bits - 1))
    group = natural_groups(k, spec.group_size)
    if spec.desc_act:
        group = group[torch.randperm(k)]
    codes = torch.randint(0, 2**spec.bits, (n, k), dtype=torch.uint8)
    scales = (torch.rand(groups, n) * 0.1 + 0.05).half() * torch.tensor([1, -1]).repeat(n // 2)
    return QuantLinear.from_quantized(QuantizedWeight(codes, scales.half(), zeros, group, spec), torch.randn(n))


def dense(layer: QuantLinear, scales: Tensor, zeros: Tensor, codes: Tensor | None = None) -> Tensor:
    """The weight by its definition, a function of its parts, float64 `[N, K]`."""
    base = layer.quantized_weight()
    group = base.group.long()
    q = base.codes.double() if codes is None else codes
    return (q - zeros.T[:, group]) * scales.T[:, group]


def close(given: Tensor | None, wanted: Tensor) -> None:
    assert given is not None
    error = float((given.double() - wanted.double()).norm() / wanted.double().norm())
    assert error < 1e-5, error


@pytest.mark.parametrize("fields", [{}, {"desc_act": True}, {"sym": True}, {"bits": 3, "group_size": -1}, {"bits": 8}])
@pytest.mark.parametrize("rows", [64, 512])
def test_gradients_of_the_grid(fields: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", rows)  # chunks of the full gradient, a ragged last one
    layer = quantized(150, **fields)
    learned = LearnedGrid(layer, zeros=True)
    x = torch.randn(3, 5, 80, requires_grad=True)
    weigh = torch.randn(3, 5, 150)
    out = learned(x)
    by_x, by_alpha, by_shift = torch.autograd.grad((out * weigh).sum(), [x, learned.alpha, learned.shift])

    base = layer.quantized_weight()
    alpha = torch.ones_like(learned.alpha, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros_like(alpha, requires_grad=True)
    xd = x.detach().double().requires_grad_()
    weight = dense(layer, base.scales.double() * alpha, base.zeros.double() + shift)
    reference = xd @ weight.T + layer.bias.double()
    close(out.detach(), reference.detach())
    for given, wanted in zip(
        (by_x, by_alpha, by_shift),
        torch.autograd.grad((reference * weigh.double()).sum(), [xd, alpha, shift]),
        strict=True,
    ):
        close(given, wanted)


def test_finite_differences_of_scales() -> None:
    layer = quantized()
    learned = LearnedGrid(layer)
    x = torch.randn(4, 80)
    (learned(x) ** 2).sum().backward()
    base = layer.quantized_weight()
    for g, n in ((0, 0), (2, 23), (1, 7)):
        values = []
        for step in (1e-4, -1e-4):
            alpha = torch.ones_like(base.scales, dtype=torch.float64)
            alpha[g, n] += step
            weight = dense(layer, base.scales.double() * alpha, base.zeros.double())
            values.append(float(((x.double() @ weight.T + layer.bias.double()) ** 2).sum()))
        assert learned.alpha.grad is not None
        assert float(learned.alpha.grad[g, n]) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-4)


def test_the_grid_computes_with_what_it_exports() -> None:
    layer = quantized()
    learned = LearnedGrid(layer, zeros=True)
    with torch.no_grad():
        learned.alpha += torch.randn_like(learned.alpha) * 0.1
        learned.alpha[0, 0] = -3.0  # would turn the scale's sign
        learned.shift += torch.randn_like(learned.alpha) * 20  # beyond the field at both ends
    made = learned.quantized()
    assert int(made.zeros.min()) == 1 and int(made.zeros.max()) == 15
    assert float(made.scales[0, 0]) == pytest.approx(float(layer.scales[0, 0]) * 2**-6, rel=1e-3)
    again = QuantLinear.from_quantized(made, layer.bias)
    x = torch.randn(9, 80)
    torch.testing.assert_close(learned(x), again(x), rtol=0, atol=1e-5)
    assert torch.equal(made.codes, layer.quantized_weight().codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_learned_scale_stays_a_normal_number(dtype: torch.dtype) -> None:
    """Of its sign; what a checkpoint has that is smaller, or zero, stays what it is."""
    tiny = torch.finfo(dtype).tiny
    stored = torch.tensor([[3 * tiny, -2 * tiny, tiny / 4, 0.0, 0.5]]).to(dtype)
    codes = torch.randint(16, (5, 32), dtype=torch.uint8)
    weight = QuantizedWeight(
        codes, stored, torch.full((1, 5), 8, dtype=torch.int32), torch.zeros(32, dtype=torch.int32), QuantSpec(4, -1)
    )
    learned = LearnedGrid(QuantLinear.from_quantized(weight, None))
    assert torch.equal(learned.scales(), stored)
    with torch.no_grad():
        learned.alpha.fill_(2**-5)
    expected = torch.tensor([[tiny, -tiny, tiny / 4, 0.0, 0.5 / 32]]).to(dtype)
    assert torch.equal(learned.scales(), expected)


def test_a_zero_at_the_end_of_its_field_gets_no_gradient() -> None:
    learned = LearnedGrid(quantized(), zeros=True)
    assert learned.shift is not None
    with torch.no_grad():
        learned.shift[0, :] = 40
    learned(torch.randn(4, 80)).sum().backward()
    assert learned.shift.grad is not None
    assert not learned.shift.grad[0].any() and learned.shift.grad[1].all()


@pytest.mark.parametrize("desc_act", [False, True])
def test_gradients_of_codes(desc_act: bool) -> None:
    layer = quantized(desc_act=desc_act)
    learned = LearnedCodes(layer)
    x, weigh = torch.randn(6, 80), torch.randn(6, 24)
    with torch.no_grad():
        learned.latent[0, 0], learned.latent[1, 1] = -3.0, 18.0  # clipped: no gradient
    out = learned(x)
    close(out.detach(), layer(x).detach())
    (out * weigh).sum().backward()
    base = layer.quantized_weight()
    codes = base.codes.double().requires_grad_()
    weight = dense(layer, base.scales.double(), base.zeros.double(), codes)
    ((x.double() @ weight.T) * weigh.double()).sum().backward()
    assert codes.grad is not None
    codes.grad[0, 0] = codes.grad[1, 1] = 0
    close(learned.latent.grad, codes.grad)


def test_rounding_of_latents_by_hand() -> None:
    learned = LearnedCodes(quantized(n=2, k=4, group_size=4), every=2, cap=0.25, decay=0.5)
    learned.codes.copy_(torch.tensor([[5, 5, 5, 5], [5, 5, 5, 5]]))
    with torch.no_grad():
        learned.latent.copy_(torch.tensor([[5.4, 5.6, 7.0, 4.4], [5.0, 6.2, 16.0, 5.0]]))
    assert learned.advance() == 0  # not yet time
    assert learned.codes.unique().tolist() == [5]
    # Five would change; a quarter of eight may: those that moved furthest, 16 (held to 15) and 7.
    assert learned.advance() == 2
    assert learned.codes.tolist() == [[5, 5, 7, 5], [5, 5, 15, 5]]
    wanted = torch.tensor([[5.2, 5.3, 7.0, 4.7], [5.0, 5.6, 15.245, 5.0]])
    torch.testing.assert_close(learned.latent.detach(), wanted)


def test_latents_begin_evenly_within_their_codes() -> None:
    learned = LearnedCodes(quantized(n=64, k=256))
    offset = (learned.latent - learned.codes.float()).detach()
    assert 0.48 < float(offset.max()) < 0.5 and -0.5 < float(offset.min()) < -0.48
    counts = torch.histc(offset, 8, -0.5, 0.5)
    assert float((counts / offset.numel() - 1 / 8).abs().max()) < 0.01
    assert torch.equal(LearnedCodes(learned.layer).latent, learned.latent)
    assert torch.equal(learned.latent.round(), learned.codes.float())


def test_codes_under_a_low_rank_update() -> None:
    layer = quantized()
    learned = LowRankCodes(layer, rank=3, gamma=1.5)
    x = torch.randn(6, 80)
    close(learned(x).detach(), layer(x).detach())
    with torch.no_grad():
        learned.B.copy_(torch.randn_like(learned.B))
    base = layer.quantized_weight()
    scales = base.scales.T.double()[:, base.group.long()]
    A = learned.A.detach().double().requires_grad_()
    B = learned.B.detach().double().requires_grad_()
    latent = base.codes.double() + module._placed(learned.places).double() + 1.5 * (B @ A) / scales
    certain = ((latent - latent.floor()).detach() - 0.5).abs() > 1e-4  # float32 may round the others either way
    codes = learned.quantized().codes.double()
    inside = ((latent > -0.5) & (latent < 15.5)).double().detach()
    straight = codes + (latent - latent.detach()) * inside
    weight = dense(layer, base.scales.double(), base.zeros.double(), straight)
    (x.double() @ weight.T).square().sum().backward()
    (learned(x) - layer.bias).square().sum().backward()
    assert int((~certain).sum()) < 5
    assert torch.equal(codes[certain], latent.round().clamp(0, 15)[certain])
    close(learned.A.grad, A.grad)
    close(learned.B.grad, B.grad)


@pytest.mark.parametrize("desc_act", [False, True])
def test_a_pooled_adapter_is_an_ordinary_one(desc_act: bool) -> None:
    layer = quantized(desc_act=desc_act)
    learned = PooledLora(layer, rank=5, gamma=0.5)
    x = torch.randn(2, 6, 80)
    assert torch.equal(learned(x), layer(x))
    with torch.no_grad():
        learned.B.copy_(torch.randn_like(learned.B))
    pair = learned.adapter()
    assert pair["lora_A"].shape == (5, 80) and pair["lora_B"].shape == (24, 5)
    wanted = layer(x).double() + 0.5 * x.double() @ pair["lora_A"].double().T @ pair["lora_B"].double().T
    close(learned(x).detach(), wanted.detach())


@pytest.mark.parametrize("rank", [0, 25, 4.0, True])
def test_ranks_that_cannot_be(rank: Any) -> None:
    for kind in (LowRankCodes, PooledLora):
        with pytest.raises(
            ValueError, match=r"must be an integer from 1 to 24, the smaller side of a layer \[24, 80\]"
        ):
            kind(quantized(), rank=rank)


def test_options_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="every=0 must be an integer"):
        LearnedCodes(quantized(), every=0)
    with pytest.raises(ValueError, match=r"cap=1\.5 must be between 0 and 1"):
        LearnedCodes(quantized(), cap=1.5)


@pytest.mark.parametrize("kind", [LowRankCodes, LearnedCodes])
def test_a_group_of_scale_zero_is_zero_and_keeps_its_codes(kind: Any) -> None:
    base = quantized().quantized_weight()
    base.scales[1, 3] = 0
    layer = QuantLinear.from_quantized(base, None)
    torch.manual_seed(0)
    learned, x = kind(layer), torch.randn(6, 80)
    close(learned(x).detach(), x.double() @ dense(layer, base.scales.double(), base.zeros.double()).T)
    optimizer = torch.optim.SGD([p for p in learned.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        learned(x).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in learned.parameters() if p.requires_grad)
        optimizer.step()
    if kind is LearnedCodes:
        learned.advance()
    made = learned.quantized()
    assert torch.equal(made.codes[3, 32:64], base.codes[3, 32:64]) and not torch.equal(made.codes, base.codes)
    assert made.dequantize().isfinite().all() and not made.dequantize()[3, 32:64].any()


def test_the_place_between_two_roundings_is_in_the_state() -> None:
    learned = LearnedCodes(quantized(), every=4)
    for _ in range(3):
        learned.advance()
    with torch.no_grad():
        learned.latent += 2
    again = LearnedCodes(learned.layer, every=4)
    again.load_state_dict(learned.state_dict())
    assert again.steps == 3 and again.advance() == learned.advance() > 0
    # States of earlier versions have no such entry.
    old = learned.state_dict()
    del old["_extra_state"]
    again = LearnedCodes(learned.layer, every=4)
    again.load_state_dict(old)
    assert again.steps == 0 and torch.equal(again.latent, learned.latent)


@pytest.mark.parametrize("gamma", [float("nan"), float("inf")])
def test_factors_that_cannot_be(gamma: float) -> None:
    for kind in (LowRankCodes, PooledLora):
        with pytest.raises(ValueError, match=f"gamma={gamma} must be finite"):
            kind(quantized(), gamma=gamma)
