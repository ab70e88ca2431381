"""A quantized weight goes down a gradient and stays a plain quantized weight."""

from __future__ import annotations

import pytest
import torch

from hf_gptq_plugin.format.grid import QuantizedWeight, dequantize, natural_groups, quantize
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.solve.learn import LearnedWeight, TuneSettings

SETTINGS = TuneSettings(block_epochs=1)


def make(sym: bool = True, columns: int = 40, bits: int = 3) -> tuple[torch.Tensor, QuantizedWeight]:
    spec = QuantSpec(bits, 16, sym)
    weight = torch.randn(6, columns)
    groups = -(-columns // 16)
    scales = (torch.rand(groups, 6) * 0.2 + 0.3).half() * torch.where(torch.rand(groups, 6) < 0.3, -1, 1).half()
    zeros = torch.full((groups, 6), 2 ** (bits - 1), dtype=torch.int32)
    if not sym:
        zeros += torch.randint(-2, 2, (groups, 6), dtype=torch.int32)
    group = natural_groups(columns, 16)
    return weight, QuantizedWeight(quantize(weight, scales, zeros, group, bits), scales, zeros, group, spec)


@pytest.mark.parametrize("sym", [True, False])
def test_begins_and_ends_with_the_same_codes(sym: bool) -> None:
    weight, start = make(sym)
    for dense in (None, weight):
        learned = LearnedWeight(start, dense)
        assert torch.equal(learned.weight(torch.float32), start.dequantize())
        finished = learned.finished()
        assert torch.equal(finished.codes, start.codes) and torch.equal(finished.scales, start.scales)
        assert torch.equal(finished.zeros, start.zeros) and finished.spec == start.spec


@pytest.mark.parametrize("rounding", [True, False])
def test_a_step_goes_by_the_gradients_of_scales_and_latents(rounding: bool) -> None:
    """The first step of Adam goes by the gradient's sign, here from autograd through the definition."""
    weight, start = make(sym=False)
    learned = LearnedWeight(start, weight if rounding else None)
    scales = start.scales.float().clone().requires_grad_()
    levels = (start.codes.double() - start.zeros.T.double()[:, start.group.long()]).requires_grad_()
    product = levels * scales.T.double()[:, start.group.long()]
    slope = torch.randn(6, 40)
    product.backward(slope.double())
    before = None if learned.latent is None else learned.latent.clone()
    learned.step(slope, SETTINGS, decay=0.5)
    step = 0.5 * SETTINGS.scale_rate * float(start.scales.float().abs().mean())
    assert scales.grad is not None and levels.grad is not None
    torch.testing.assert_close(learned.scales.T, start.scales.float() - step * scales.grad.sign())
    if before is not None:
        moved = before - 0.5 * SETTINGS.rounding_rate * levels.grad.sign().float()
        torch.testing.assert_close(learned.latent, moved.clamp(-0.49, 7.49))


def test_codes_that_are_not_the_nearest_do_not_flip_back() -> None:
    """A solver chose them to make good what other columns got wrong: steps whichever way leave them for a while."""
    weight, start = make()
    shifted = QuantizedWeight((start.codes + 1).clamp(max=7), start.scales, start.zeros, start.group, start.spec)
    learned = LearnedWeight(shifted, weight)
    for _ in range(10):
        learned.step(torch.randn(6, 40), SETTINGS, 1.0)
    assert torch.equal(learned.finished().codes, shifted.codes)


def test_learns_what_rounding_to_nearest_cannot() -> None:
    """Two inputs that are nearly the same: their weights' errors may cancel."""
    torch.manual_seed(3)
    weight, start = make(columns=32)
    x = torch.randn(200, 16)
    x = torch.cat([x, x + 0.05 * torch.randn(200, 16)], 1)
    wanted = x @ weight.T

    def loss(current: torch.Tensor) -> torch.Tensor:
        return (x @ current.T - wanted).square().mean()

    for dense in (weight, None):
        learned = LearnedWeight(start, dense)
        for i in range(200):
            current = learned.weight(torch.float32).requires_grad_()
            (slope,) = torch.autograd.grad(loss(current), current)
            learned.step(slope, SETTINGS, 1 - i / 200)
        finished = learned.finished()
        assert int(finished.codes.max()) <= 7
        assert torch.isfinite(finished.scales).all() and finished.scales.dtype == torch.float16
        factor = 0.35 if dense is not None else 0.9
        error = loss(dequantize(finished.codes, finished.scales, finished.zeros, finished.group))
        assert float(error) < factor * float(loss(start.dequantize()))


def test_scales_never_change_sign_or_vanish() -> None:
    _, start = make()
    learned = LearnedWeight(start, None)
    signs = learned.scales.sign()
    for _ in range(3000):
        # Towards zero for every scale.
        learned.step(learned.weight(torch.float32).sign(), SETTINGS, 1.0)
    assert torch.equal(learned.scales.sign(), signs)
    assert bool((learned.finished().scales.abs() >= torch.finfo(torch.float16).tiny).all())


@pytest.mark.parametrize("name", ["block_epochs", "model_epochs"])
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-1 must be an integer of at least 0"):
        TuneSettings(**{name: -1})
