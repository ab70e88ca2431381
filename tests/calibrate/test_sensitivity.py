"""What tokens count: the model's own gradients, whatever the architecture, the threads and the memory."""

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
from hf_gptq_plugin.calibrate import sensitivity
from hf_gptq_plugin.calibrate.chains import find_chains
from hf_gptq_plugin.calibrate.experts import layouts, unfuse_experts
from hf_gptq_plugin.calibrate.sensitivity import token_weights
from hf_gptq_plugin.calibrate.walk import linears
from hf_gptq_plugin.nn.experts import Experts
from hf_gptq_plugin.solve.hessian import Hessian


def ids_of(windows: list[list[int]]) -> list[Tensor]:
    return [torch.tensor(w) for w in windows]


def asked(model: Any) -> tuple[list[nn.Module], set[str]]:
    """A model's blocks, and all of their layers."""
    chains = find_chains(model, torch.arange(3, 11))
    blocks = {name: block for chain in chains for name, block in chain.blocks.items()}
    return list(blocks.values()), {f"{name}.{local}" for name, block in blocks.items() for local in linears(block)}


def reference(model: Any, windows: list[list[int]], names: set[str], slope: Callable[[Tensor], Tensor]) -> Any:
    """Add a zero to what each layer returns and ask autograd for the loss's gradient by it, in plain PyTorch."""
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
                found[name].append(runs[0].grad.square().mean(-1).sqrt().flatten())
    model.zero_grad()
    whole = {n: parts for n, parts in found.items() if list(map(len, parts)) == list(map(len, windows))}
    means = {n: torch.cat(parts).double().mean() for n, parts in whole.items()}
    return {n: [part / means[n] for part in parts] for n, parts in whole.items() if means[n] > 0}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "gpt_neox", "t5", "bert", "albert"])
def test_weights_are_the_size_of_gradients(
    kind: str, tiny: Callable[..., Path], windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "compute_dtype", lambda device: torch.float32)
    monkeypatch.setattr(sensitivity, "_slope", lambda end, predicts, draw: end.sin())
    model = load(kind, tiny(kind)).float().eval()
    blocks, names = asked(model)
    texts = [window[: 9 + i] for i, window in enumerate(windows[:3])]
    expected = reference(model, texts, names, torch.sin)
    assert expected or ARCHITECTURES[kind].repeated
    found = token_weights(model, blocks, ids_of(texts), names, 0)
    assert set(found) == set(expected)
    for name, parts in expected.items():
        for part, own in zip(parts, found[name], strict=True):
            torch.testing.assert_close(own, part.float(), rtol=2e-3, atol=1e-5)
    # Where memory is short, blocks are computed twice.
    monkeypatch.setattr(sensitivity, "_KEPT_BYTES", 0)
    again = token_weights(model, blocks, ids_of(texts), names, 0)
    assert all(torch.equal(a, b) for n in found for a, b in zip(found[n], again[n], strict=True))
    # And nothing is left of it.
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())


def test_threads_change_nothing_and_seeds_do(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    model = load("llama", tiny("llama")).eval()
    blocks, names = asked(model)
    before = torch.get_num_threads()
    made = []
    for threads, seed in ((1, 0), (2, 0), (2, 1)):
        torch.set_num_threads(threads)
        try:
            made.append(token_weights(model, blocks, ids_of(windows[:5]), names, seed))
        finally:
            torch.set_num_threads(before)
    equal = [all(torch.equal(torch.cat(made[0][n]), torch.cat(m[n])) for n in names) for m in made[1:]]
    assert equal == [True, False]


@pytest.mark.parametrize("predicts", [True, False])
def test_the_loss_is_what_the_model_predicts(predicts: bool) -> None:
    """Over many draws the slope has the mean and the covariance that make its square the Fisher information."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20000, 1)
    slopes = sensitivity._slope(logits, predicts, torch.Generator().manual_seed(0)).double()
    p = logits[0].double().softmax(-1)
    covariance = torch.diag(p) - p[:, None] * p if predicts else torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(slopes.mean(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=0.03)
    torch.testing.assert_close(slopes.T @ slopes / len(slopes), covariance, rtol=0, atol=0.03)


def test_experts_count_by_their_module(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("mixtral"), dtype=torch.float32).eval()
    unfuse_experts(model, [layout for layout in layouts(model).values() if layout])
    mixtures = {name for name, module in model.named_modules() if isinstance(module, Experts)}
    single = {f"{name}.0.{next(iter(model.get_submodule(name))).down}" for name in mixtures}
    weights = token_weights(model, list(model.model.layers), ids_of(windows[:3]), mixtures | single, 0)
    # A single expert does not see every token.
    assert set(weights) == mixtures and len(mixtures) == 2
    assert all(list(map(len, parts)) == list(map(len, windows[:3])) for parts in weights.values())


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
        assert token_weights(model, blocks, ids_of(windows[:2]), names, 0) == {}
    assert "no backward pass" in caplog.text and "all tokens count alike" in caplog.text


def test_layers_are_solved_with_them(
    tiny: Callable[..., Path], windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of layers that read the same, the mean of their weights; none where all tokens are to count alike."""
    model = load("llama", tiny("llama")).eval()
    blocks, names = asked(model)
    known = token_weights(model, blocks, ids_of(windows[:2]), names, 3)
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
