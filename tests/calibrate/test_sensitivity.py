"""What the loss feels: the model's own gradients, whatever the architecture, the threads and the memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, inputs, load
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.calibrate import blocks as calibrated_blocks
from hf_gptq_plugin.calibrate import sensitivity
from hf_gptq_plugin.calibrate.chains import find_chains
from hf_gptq_plugin.calibrate.experts import layouts, unfuse_experts
from hf_gptq_plugin.calibrate.products import computing, own_products
from hf_gptq_plugin.calibrate.sensitivity import Sensitivity
from hf_gptq_plugin.calibrate.walk import linears
from hf_gptq_plugin.nn.experts import Experts
from hf_gptq_plugin.solve import gptq, joint
from hf_gptq_plugin.solve.hessian import Hessian


def ids_of(windows: list[list[int]]) -> list[Tensor]:
    return [torch.tensor(w) for w in windows]


def asked(model: Any) -> tuple[list[nn.Module], set[str]]:
    """A model's blocks, and all of their layers."""
    chains = find_chains(model, torch.arange(3, 11))
    blocks = {name: block for chain in chains for name, block in chain.blocks.items()}
    return list(blocks.values()), {f"{name}.{local}" for name, block in blocks.items() for local in linears(block)}


def gradients(
    model: Any, windows: list[list[int]], names: set[str], slope: Callable[[Tensor], Tensor]
) -> dict[str, list[Tensor]]:
    """Add a zero to what each layer returns and ask autograd for the loss's gradient by it, in plain PyTorch:
    `[tokens, N]` per window, of layers that run once in each."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for window in windows:
        zeros: dict[str, list[Tensor]] = {name: [] for name in names}

        def shift(name: str, zeros: dict[str, list[Tensor]] = zeros) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
                zeros[name].append(torch.zeros_like(out).requires_grad_())
                return out + zeros[name][-1]

            return hook

        handles = [model.get_submodule(name).register_forward_hook(shift(name)) for name in names]
        logits = model(**inputs(model, window)).logits
        (logits * slope(logits.detach())).sum().backward()
        for handle in handles:
            handle.remove()
        for name, runs in zeros.items():
            if len(runs) == 1 and runs[0].grad is not None:
                found[name].append(runs[0].grad.flatten(0, -2))
    model.zero_grad()
    lengths = list(map(len, windows))
    return {n: parts for n, parts in found.items() if list(map(len, parts)) == lengths and any(map(torch.any, parts))}


def roots(parts: list[Tensor]) -> list[Tensor]:
    """Root mean squares of gradients `[tokens]`, over their mean."""
    found = [part.double().square().mean(-1).sqrt() for part in parts]
    return [root / torch.cat(found).mean() for root in found]


def products(parts: list[Tensor]) -> Tensor:
    """`Σ g gᵀ / |g|` over a mean of 1 on the diagonal, and the identity, `[N, N]`, of about equal weight."""
    total = torch.zeros(parts[0].shape[1], parts[0].shape[1], dtype=torch.float64)
    for g in torch.cat(parts).double():
        if g.any():
            total += torch.outer(g, g) / g.norm()
    prior = 1 + len(total) / sum(map(len, parts))
    return (total / total.diagonal().mean() + prior * torch.eye(len(total))) / (1 + prior)


def same(a: Sensitivity, b: Sensitivity) -> bool:
    """Whether two have the same bits."""
    pairs = [(a.tokens, b.tokens), (a.outputs, b.outputs)]
    return all(
        set(own) == set(other) and all(torch.equal(x, y) for n in own for x, y in zip(own[n], other[n], strict=True))
        for own, other in pairs
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "gpt_neox", "t5", "bert", "albert"])
def test_what_is_felt_is_the_gradients_size_and_direction(
    kind: str, tiny: Callable[..., Path], windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "_slope", lambda end, predicts, draw: end.sin())
    model = load(kind, tiny(kind)).float().eval()
    blocks, names = asked(model)
    texts = [window[: 9 + i] for i, window in enumerate(windows[:3])]
    expected = gradients(model, texts, names, torch.sin)
    assert expected or ARCHITECTURES[kind].repeated
    monkeypatch.setattr(joint, "_ROWS", 24)
    found = sensitivity.sensitivity(model, blocks, ids_of(texts), names, names, 0)
    assert set(found.tokens) == set(found.outputs) == set(expected)
    for name, parts in expected.items():
        for part, own in zip(roots(parts), found.tokens[name], strict=True):
            torch.testing.assert_close(own, part.float(), rtol=2e-3, atol=1e-5)
        whole = products(parts).float()
        start = 0
        for own in found.outputs[name]:
            wanted = whole[start : start + len(own), start : start + len(own)]
            torch.testing.assert_close(own, wanted, rtol=5e-3, atol=1e-4)
            start += len(own)
        assert start == len(whole)
    # Where memory is short, blocks are computed twice.
    monkeypatch.setattr(sensitivity, "_KEPT_BYTES", 0)
    assert same(found, sensitivity.sensitivity(model, blocks, ids_of(texts), names, names, 0))
    # Where only outputs are asked for, few windows say enough.
    monkeypatch.setattr(sensitivity, "_OUTPUT_WINDOWS_ALONE", 2)
    few = sensitivity.sensitivity(model, blocks, ids_of(texts), set(), names, 0)
    assert not few.tokens
    for name, parts in expected.items():
        size = len(few.outputs[name][0])
        wanted = products(parts[:2])[:size, :size]
        torch.testing.assert_close(few.outputs[name][0], wanted.float(), rtol=5e-3, atol=1e-4)
    # And nothing is left of it.
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "xlm"])  # XLM hands its blocks a cache
def test_blocks_that_are_computed_twice_compute_the_same_in_16_bits(
    kind: str, tiny: Callable[..., Path], windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(kind, tiny(kind)).bfloat16().eval()
    blocks, names = asked(model)
    once = sensitivity.sensitivity(model, blocks, ids_of(windows), names, names, 0)
    monkeypatch.setattr(sensitivity, "_KEPT_BYTES", 0)
    assert once.tokens and once.outputs
    assert same(once, sensitivity.sensitivity(model, blocks, ids_of(windows), names, names, 0))


@pytest.mark.parametrize("keywords", [False, True])
def test_attention_in_fp32_is_rounded_once(keywords: bool) -> None:
    attention = torch.nn.functional.scaled_dot_product_attention
    names = ("query", "key", "value", "attn_mask")
    inputs = [torch.randn(1, 2, 7, 8).bfloat16().requires_grad_() for _ in names[:3]]
    mask = torch.randn(7, 7).bfloat16()

    def computed(arguments: list[torch.Tensor]) -> torch.Tensor:
        return attention(**dict(zip(names, arguments, strict=True))) if keywords else attention(*arguments)

    with computing(torch.float32, torch.device("cpu")):
        out = computed([*inputs, mask])
    wide = [x.detach().float().requires_grad_() for x in inputs]
    expected = computed([*wide, mask.float()])
    assert torch.equal(out, expected.bfloat16())
    slope = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, slope)
    wanted = torch.autograd.grad(expected, wide, slope.float())
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_may_write_into_what_a_layer_returned(dtype: torch.dtype) -> None:
    """As some clamp or scale it in place."""
    layer = nn.Linear(32, 16, bias=False, dtype=dtype)
    x = torch.randn(2, 40, 32, dtype=dtype, requires_grad=True)
    with own_products(nn.Sequential(layer)):
        out = layer(x)
        out *= 2
        out.sum().backward()
    torch.testing.assert_close(out, 2 * (x.float() @ layer.weight.float().T).to(dtype), rtol=2e-2, atol=1e-2)
    expected = 2 * layer.weight.float().sum(0).expand(2, 40, 32).to(dtype)
    torch.testing.assert_close(x.grad, expected, rtol=2e-2, atol=2e-2)


def test_threads_change_nothing_and_seeds_do(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    model = load("llama", tiny("llama")).eval()
    blocks, names = asked(model)
    before = torch.get_num_threads()
    made = []
    for threads, seed in ((1, 0), (2, 0), (2, 1)):
        torch.set_num_threads(threads)
        try:
            made.append(sensitivity.sensitivity(model, blocks, ids_of(windows[:5]), names, names, seed))
        finally:
            torch.set_num_threads(before)
    assert [same(made[0], other) for other in made[1:]] == [True, False]


@pytest.mark.parametrize("predicts", [True, False])
def test_the_loss_is_what_the_model_predicts(predicts: bool) -> None:
    """Over many draws the slope has the mean and the covariance that make its square the Fisher information."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20000, 1)
    slopes = sensitivity._slope(logits, predicts, torch.Generator().manual_seed(0)).double()
    p = logits[0].double().softmax(-1)
    covariance = torch.diag(p) - p[:, None] * p if predicts else torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(slopes.mean(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=0.03)
    torch.testing.assert_close(slopes.T @ slopes / len(slopes), covariance, rtol=0, atol=0.03)


def test_memory_bounds_how_many_outputs_are_felt_together(
    tiny: Callable[..., Path], windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller parts are the diagonal blocks of larger ones, whatever the number of windows at a time."""
    model = load("llama", tiny("llama")).eval()
    blocks, names = asked(model)
    whole = sensitivity.sensitivity(model, blocks, ids_of(windows[:3]), set(), names, 3).outputs
    rows = sum(model.get_submodule(name).out_features for name in names)
    monkeypatch.setattr(sensitivity, "_OUTPUT_BYTES", 4 * 24 * rows)
    monkeypatch.setattr(sensitivity, "_FLIGHT_BYTES", 1)
    parts = sensitivity.sensitivity(model, blocks, ids_of(windows[:3]), set(), names, 3).outputs
    assert sum(part.nbytes for name in names for part in parts[name]) <= 4 * 24 * rows
    for name in names:
        (full,), start = whole[name], 0
        for part in parts[name]:
            assert len(part) <= 24
            block = slice(start, start + len(part))
            torch.testing.assert_close(part, full[block, block], rtol=1e-5, atol=1e-7)
            start += len(part)
        assert start == len(full)


def test_experts_count_by_their_module(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("mixtral"), dtype=torch.float32).eval()
    unfuse_experts(model, [layout for layout in layouts(model).values() if layout])
    mixtures = {name for name, module in model.named_modules() if isinstance(module, Experts)}
    single = {f"{name}.0.{next(iter(model.get_submodule(name))).down}" for name in mixtures}
    names, blocks = mixtures | single, list(model.model.layers)
    felt = sensitivity.sensitivity(model, blocks, ids_of(windows[:3]), names, single, 0)
    # A single expert does not see every token; its outputs are felt for those that it sees.
    assert set(felt.tokens) == mixtures and len(mixtures) == 2 and set(felt.outputs) == single
    assert all(list(map(len, parts)) == list(map(len, windows[:3])) for parts in felt.tokens.values())


def test_what_has_no_derivative_counts_alike(
    tiny: Callable[..., Path], windows: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    model = load("llama", tiny("llama")).eval()

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

    model.model.norm.register_forward_hook(lambda module, args, out: Opaque.apply(out))
    blocks, names = asked(model)
    with caplog.at_level(logging.WARNING):
        assert sensitivity.sensitivity(model, blocks, ids_of(windows[:2]), names, names, 0) == Sensitivity()
    assert "no backward pass" in caplog.text and "everything counts alike" in caplog.text


def test_layers_are_solved_with_them(
    tiny: Callable[..., Path], windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of layers that read the same, the mean of their weights; none where all tokens are to count alike."""
    model = load("llama", tiny("llama")).eval()
    blocks, names = asked(model)
    known = sensitivity.sensitivity(model, blocks, ids_of(windows[:2]), names, set(), 3).tokens
    seen: list[Tensor | None] = []
    add = Hessian.add

    def spied(self: Hessian, x: Tensor, exact: Tensor | None, weights: Tensor | None) -> None:
        seen.append(weights)
        add(self, x, exact, weights)

    monkeypatch.setattr(Hessian, "add", spied)
    for kind in ("uniform", "loss"):
        config = GPTQConfig(group_size=32, dataset=windows[:2], samples=2, seed=3, preset="fast", token_weights=kind)
        made = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config, dtype=torch.float32)
        assert made.config.quantization_config.meta["solver"]["token_weights"] == kind
    stages = [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    expected = [
        sum(known[f"model.layers.{i}.{name}"][w] for name in stage) / len(stage)
        for i in range(2)
        for stage in stages
        for w in range(2)
    ]
    assert seen[: len(expected)] == [None] * len(expected)
    for own, wanted in zip(seen[len(expected) :], expected, strict=True):
        torch.testing.assert_close(own, wanted)


def test_layers_are_solved_with_their_outputs_hessian(
    tiny: Callable[..., Path], windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("llama", tiny("llama")).eval()
    blocks, names = asked(model)
    known = sensitivity.sensitivity(model, blocks, ids_of(windows[:2]), set(), names, 3).outputs
    seen: list[list[Tensor] | None] = []
    solve = gptq.solve_factored

    def spied(*arguments: Any) -> Any:
        seen.append(arguments[4])
        return solve(*arguments)

    monkeypatch.setattr(calibrated_blocks, "solve_factored", spied)
    for kind in ("identity", "loss"):
        config = GPTQConfig(group_size=32, dataset=windows[:2], samples=2, seed=3, preset="fast", output_hessian=kind)
        made = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=config, dtype=torch.float32)
        assert made.config.quantization_config.meta["solver"]["output_hessian"] == kind
    assert seen[:14] == [None] * 14 and len(seen) == 28
    locals_ = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    for name, outputs in zip((f"model.layers.{i}.{n}" for i in range(2) for n in locals_), seen[14:], strict=True):
        assert outputs is not None
        for own, wanted in zip(outputs, known[name], strict=True):
            torch.testing.assert_close(own, wanted)
