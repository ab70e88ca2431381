"""Tuning follows the true gradient of what it says it lowers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.calibrate import products, tune
from hf_gptq_plugin.calibrate.chains import find_chains
from hf_gptq_plugin.calibrate.walk import linears, record_calls
from hf_gptq_plugin.nn.linear import QuantLinear
from hf_gptq_plugin.solve import linalg
from hf_gptq_plugin.solve.hessian import SolveError
from hf_gptq_plugin.solve.learn import LearnedVector, TuneSettings


def load(path: Path, windows: list[list[int]], **fields: Any) -> Any:
    config = GPTQConfig(bits=2, group_size=32, dataset=windows, samples=len(windows), **fields)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Per token."""
    divergence = nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True
    )
    return divergence / student[..., 0].numel()


def test_divergence() -> None:
    student, teacher = torch.randn(1, 5, 11, dtype=torch.float64, requires_grad=True), torch.randn(1, 5, 11)
    expected = kl(student, teacher.double())
    (slope,) = torch.autograd.grad(expected, student)
    value, found = tune.divergence(student.detach(), teacher)
    assert value == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found, slope.float(), rtol=1e-4, atol=1e-7)


def test_output_loss() -> None:
    wanted, hidden = torch.randn(1, 5, 7) * 3, torch.randn(1, 5, 7, requires_grad=True)
    expected = (hidden - wanted).square().sum() / wanted.square().sum()
    (slope,) = torch.autograd.grad(expected, hidden)
    value, found = tune.output_loss(lambda window: wanted if window == 4 else wanted * 0)(hidden.detach(), 4)
    assert value == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_models_loss_is_that_of_fp32(
    dtype: torch.dtype, tiny: Callable[..., Path], windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch is slow in 16 bits the head multiplies with our own product, forward and back."""
    monkeypatch.setattr(tune, "compute_dtype", lambda like: torch.float32)
    monkeypatch.setattr(linalg, "multiplies_bf16", lambda: False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=dtype).eval()
    ids = [torch.tensor(windows[0])]
    with torch.no_grad():
        (chain,) = find_chains(model, ids[0])
        blocks, (entry,) = record_calls(model, chain, ids)
    hidden, target = (entry + torch.randn(entry.shape).to(dtype) * size for size in (0.1, 0.2))
    narrow = []

    def linear(x: Tensor, weight: Tensor, *bias: Tensor, own: Any = nn.functional.linear) -> Tensor:
        narrow.append(x.dtype)
        return own(x, weight, *bias)

    monkeypatch.setattr(nn.functional, "linear", linear)
    with tune.model_loss(model, chain, blocks, ids, [target]) as loss:
        value, slope = loss(hidden, 0)
    assert dtype not in narrow
    norm, head = model.model.norm.weight.float(), model.lm_head.weight.float()

    def logits(x: Tensor) -> Tensor:
        x = x.float()
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps) * norm
        return normed @ head.T

    given = hidden.float().requires_grad_()
    expected = kl(logits(given), logits(target))
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=2e-2)
    assert float((slope.float() - given.grad).norm() / given.grad.norm()) < 2e-2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_gradients_are_those_of_the_whole_model(
    kind: str, tiny: Callable[..., Path], windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block with the passes done twice, against autograd through the model as a whole."""
    monkeypatch.setattr(tune, "compute_dtype", lambda like: torch.float32)
    model = load(tiny(kind), windows)
    dense = AutoModelForCausalLM.from_pretrained(tiny(kind), dtype=torch.float32).eval()
    ids = [torch.tensor(w) for w in windows[:3]]
    with torch.no_grad():
        teachers = [dense(input_ids=i[None]).logits for i in ids]
        (chain,) = find_chains(model, ids[0])
        blocks, entries = record_calls(model, chain, ids)
        (exact,) = find_chains(dense, ids[0])
        leaving: list[Tensor] = []
        handle = list(exact.blocks.values())[-1].register_forward_hook(
            lambda m, a, out: leaving.append(out[0] if isinstance(out, tuple) else out)
        )
        for i in ids:
            dense(input_ids=i[None])
        handle.remove()
    layers = [{n: tune.TunedLayer(layer, None) for n, layer in linears(block.module).items()} for block in blocks]
    weights = [{n: t.learned.weight(torch.float32) for n, t in part.items()} for part in layers]
    with (
        tune.model_loss(model, chain, blocks, ids, leaving) as loss,
        tune._weights_handed_in(layers),
        tune.tuned_vectors(blocks) as vectors,
    ):
        parameters = [{n: v.parameter for n, v in part.items()} for part in vectors]
        value, found = tune._gradients(blocks, weights, parameters, entries, loss, [0, 2], torch.float32)
    assert all(part for part in parameters)
    # The same model with dense layers of the same weights.
    plain = model.hf_quantizer.dequantize(model).float()
    total = sum((kl(plain(input_ids=ids[w][None]).logits, teachers[w]) for w in (0, 2)), torch.zeros(()))
    total.backward()
    assert value == pytest.approx(total.item(), rel=1e-4)
    for block, part, plain_ones in zip(blocks, found, parameters, strict=True):
        assert part.keys() == linears(block.module).keys() | plain_ones.keys()
        for name, gradient in part.items():
            if name in plain_ones:
                wanted = plain.get_parameter(block.full(name)).grad
                torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
                continue
            layer = plain.get_submodule(block.full(name))
            wanted = layer.weight.grad if isinstance(layer, nn.Linear) else layer.weight.grad.T
            torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_learns_the_dense_models_output(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    ids = torch.tensor(windows)
    with torch.no_grad():
        teacher = dense(input_ids=ids).logits
        far, near = (
            float(kl(load(tiny("llama"), windows, model_epochs=epochs)(input_ids=ids).logits, teacher))
            for epochs in (0, 20)
        )
    assert near < 0.9 * far


def test_vectors_learn(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    """Norms move, by no more than the rates allow; what is no block's stays."""
    model = load(tiny("llama"), windows, model_epochs=3)
    dense = dict(AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).named_parameters())
    steps = TuneSettings().steps(len(windows), 3)
    for name, parameter in model.named_parameters():
        if name not in dense:
            continue
        moved = (parameter - dense[name]).abs().max()
        assert parameter.requires_grad == dense[name].requires_grad
        if ".layers." in name and parameter.dim() == 1:
            assert 0 < moved < 2 * steps * TuneSettings().vector_rate * dense[name].abs().mean()
        else:
            assert moved == 0


def test_a_learned_vector_goes_down_its_gradient() -> None:
    """In bf16, whose steps are larger than the rate's: the sum of small ones must not be lost."""
    goal = torch.tensor([0.5, 1.0, 2.0])
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    learned, settings = LearnedVector(parameter), TuneSettings(vector_rate=1e-3)
    for _ in range(2000):
        learned.step(parameter.detach().float() - goal, settings, 1.0)
    torch.testing.assert_close(parameter.detach().float(), goal, rtol=0.01, atol=0)


def test_learns_the_dense_blocks_output(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    path = tiny("llama")
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor(windows)

    def error(model: Any) -> float:
        """Of what leaves the first block, relative."""
        with torch.no_grad():
            one, other = (m(input_ids=ids, output_hidden_states=True).hidden_states[1] for m in (model, dense))
        return float((one - other).square().sum() / other.square().sum())

    # A random block is nearly the identity, and little of its output is the layers'.
    assert error(load(path, windows, block_epochs=30)) < 0.97 * error(load(path, windows))


def test_too_few_windows_make_one_step() -> None:
    settings = TuneSettings(model_epochs=3, batch=4)
    assert [settings.steps(windows, 3) for windows in (1, 3, 4, 7, 8)] == [3, 3, 3, 3, 6]


def entered(model: Any, windows: list[list[int]]) -> tuple[list[Any], list[Tensor]]:
    """A model's blocks, and what enters the first."""
    ids = [torch.tensor(w) for w in windows[:2]]
    with torch.no_grad():
        (chain,) = find_chains(model, ids[0])
        return record_calls(model, chain, ids)


def tuned(blocks: list[Any]) -> list[dict[str, tune.TunedLayer]]:
    return [{n: tune.TunedLayer(layer, None) for n, layer in linears(block.module).items()} for block in blocks]


def test_gradients_in_fp16_do_not_vanish(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    """Slopes of means over many numbers are less than fp16's least."""
    model = load(tiny("llama"), windows, preset="fast")
    slopes: list[Tensor] = []
    found = []
    for dtype in (torch.float32, torch.float16):
        nn.Module.to(model, dtype)  # which Transformers forbids
        blocks, entries = entered(model, windows)
        slopes = slopes or [torch.randn(entry.shape) * 1e-7 for entry in entries]
        layers = tuned(blocks)
        weights = [{n: t.learned.weight(torch.float32) for n, t in part.items()} for part in layers]
        lift = tune._lift(entries[0])
        with tune._weights_handed_in(layers):
            _, gradients = tune._gradients(
                blocks, weights, [{}] * 2, entries, lambda hidden, window, slopes=slopes: (0.0, slopes[window]), [0, 1],
                torch.float32, lift,
            )  # fmt: skip
        found.append([{n: g / lift for n, g in part.items()} for part in gradients])
    for full, half in zip(*found, strict=True):
        for name, expected in full.items():
            assert expected.norm() > 0
            assert float((half[name] - expected).norm() / expected.norm()) < 0.05, name


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_in_fp16_is_tuned(
    kind: str, bf16: bool, tiny: Callable[..., Path], windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the processor multiplies in bf16, which PyTorch lets nobody mix with fp16."""
    monkeypatch.setattr(products, "multiplies_bf16", lambda: bf16)
    config = GPTQConfig(
        bits=3, group_size=32, dataset=windows, preset="fast", block_epochs=1, model_epochs=1, propagation=0.5
    )
    path = tiny(kind)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float16)
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert layers and all(bool(layer.scales.isfinite().all()) for layer in layers)


def test_a_gradient_that_is_not_finite_is_named(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    blocks, entries = entered(load(tiny("llama"), windows, preset="fast"), windows)
    layers = tuned(blocks[:1])
    before = {n: t.learned.scales.clone() for n, t in layers[0].items()}
    loss = lambda hidden, window: (float("nan"), torch.full_like(hidden, float("nan")))  # noqa: E731
    with pytest.raises(SolveError, match=r"model\.layers\.0\..*: the gradient is not finite while it is tuned"):
        tune.tune(blocks[:1], layers, [{}], entries, loss, 1, TuneSettings())
    assert all(torch.equal(t.learned.scales, before[n]) for n, t in layers[0].items())
