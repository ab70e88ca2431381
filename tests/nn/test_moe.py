"""`hf_gptq::moe` against loops in float64 over tokens and their experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import references
import torch

from hf_gptq_plugin import native
from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import BITS, QuantSpec
from hf_gptq_plugin.nn import moe as module
from hf_gptq_plugin.nn.moe import moe, stack
from hf_gptq_plugin.nn.ops import KernelWeight

EXPERTS, HIDDEN, INNER, TOKENS = 3, 40, 24, 11
NOWHERE = 7  # stands for no expert


@pytest.fixture
def kernel() -> None:
    """Bits that depend on a row alone are promised by the native library only."""
    if native.library() is None:
        pytest.skip(f"no native library: {native.status().detail}")


def random_weights(spec: QuantSpec, out_features: int, in_features: int, seed: int) -> list[QuantizedWeight]:
    """One weight per expert."""
    rng = torch.Generator().manual_seed(seed)
    groups = spec.groups(in_features)
    made = []
    for _ in range(EXPERTS):
        group = natural_groups(in_features, spec.group_size)
        if spec.desc_act:
            group = group[torch.randperm(in_features, generator=rng)]
        shape = (groups, out_features)
        zeros = torch.randint(1, spec.maxq + 1, shape, generator=rng, dtype=torch.int32)
        if spec.sym:
            zeros.fill_(2 ** (spec.bits - 1))
        codes = torch.randint(0, spec.maxq + 1, (out_features, in_features), generator=rng).to(torch.uint8)
        scales = torch.rand(shape, generator=rng).add(0.5).div(spec.maxq * 4).half()
        made.append(QuantizedWeight(codes, scales, zeros, group, spec))
    return made


def stacked(weights: list[QuantizedWeight], packed: bool = True) -> KernelWeight:
    made = []
    for weight in weights:
        one = KernelWeight.from_canonical(**weight.pack(), spec=weight.spec, in_features=weight.codes.shape[1])
        made.append(one.packed() if packed else one)
    return stack(made)


def expected(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, up: list[Any], down: list[Any],
    activation: Callable[[torch.Tensor], torch.Tensor], gated: bool,
) -> torch.Tensor:  # fmt: skip
    """Token by token, float64."""

    def dense(weight: QuantizedWeight) -> torch.Tensor:
        parts = (weight.codes, weight.scales, weight.zeros, weight.group)
        return torch.from_numpy(references.dequantize(*(part.numpy() for part in parts)))

    ups, downs = [dense(w) for w in up], [dense(w) for w in down]
    out = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for token in range(len(x)):
        for choice, expert in enumerate(ids[token].tolist()):
            if expert < EXPERTS:
                hidden = ups[expert] @ x[token].double()
                if gated:
                    hidden = activation(hidden[:INNER]) * hidden[INNER:]
                else:
                    hidden = activation(hidden)
                out[token] += weights[token, choice].double() * (downs[expert] @ hidden)
    return out


def routing(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids of two choices per token; expert 1 gets no token, some choices stand for no expert."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[0, 2], [2, 0], [0, NOWHERE], [NOWHERE, NOWHERE]]).repeat(3, 1)[:TOKENS]
    return torch.rand(TOKENS, 2, generator=rng), ids


SPECS = [QuantSpec(bits, 16, sym, desc_act) for bits in BITS for sym in (True, False) for desc_act in (False, True)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_token_gets_the_weighted_sum_of_its_experts(spec: QuantSpec) -> None:
    up, down = random_weights(spec, 2 * INNER, HIDDEN, 0), random_weights(spec, HIDDEN, INNER, 1)
    x = torch.randn(TOKENS, HIDDEN)
    weights, ids = routing()
    out = moe(x, weights, ids, stacked(up), stacked(down))
    truth = expected(x, weights, ids, up, down, torch.nn.functional.silu, gated=True)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    assert not out[3].any()  # no expert at all


@pytest.mark.parametrize("name", sorted(module.ACTIVATIONS))
@pytest.mark.parametrize("gated", [True, False])
def test_activations(name: str, gated: bool) -> None:
    spec = QuantSpec(4, 16)
    up = random_weights(spec, INNER * (1 + gated), HIDDEN, 0)
    down = random_weights(spec, HIDDEN, INNER, 1)
    x = torch.randn(TOKENS, HIDDEN)
    weights, ids = routing()
    formulas: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": lambda h: h / (1 + torch.exp(-h)),
        "gelu": lambda h: h / 2 * (1 + torch.erf(h / 2**0.5)),
        "gelu_tanh": lambda h: h / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3))),
        "relu2": lambda h: h.clamp(min=0) ** 2,
    }
    out = moe(x, weights, ids, stacked(up), stacked(down), name, gated)
    truth = expected(x, weights, ids, up, down, formulas[name], gated)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_ways_of_running_it_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that asks the device how many tokens an expert has, and the one that a CUDA graph can hold."""
    spec = QuantSpec(4, 16, sym=False)
    up, down = (stacked(random_weights(spec, *shape)) for shape in ((2 * INNER, HIDDEN, 0), (HIDDEN, INNER, 1)))
    x = torch.randn(TOKENS, HIDDEN).to(dtype)
    weights, ids = routing()
    out = moe(x, weights, ids, up, down)
    monkeypatch.setattr(module, "_fill_chosen", module._fill_everywhere)
    assert torch.equal(moe(x, weights, ids, up, down), out)
    assert out.dtype == dtype


@pytest.mark.usefixtures("kernel")
def test_a_token_does_not_depend_on_the_others() -> None:
    spec = QuantSpec(4, 16)
    up, down = (stacked(random_weights(spec, *shape)) for shape in ((2 * INNER, HIDDEN, 0), (HIDDEN, INNER, 1)))
    x = torch.randn(TOKENS, HIDDEN)
    weights, ids = routing()
    together = moe(x, weights, ids, up, down)
    for token in range(TOKENS):
        one = slice(token, token + 1)
        assert torch.equal(moe(x[one], weights[one], ids[one], up, down), together[one])


def test_experts_of_this_rank_only() -> None:
    spec = QuantSpec(4, 16)
    up, down = random_weights(spec, 2 * INNER, HIDDEN, 0), random_weights(spec, HIDDEN, INNER, 1)
    x = torch.randn(TOKENS, HIDDEN)
    weights, ids = routing()
    whole = moe(x, weights, ids, stacked(up), stacked(down))
    parts = []
    for mine in ([2], [0, 1]):
        expert_map = torch.full((EXPERTS,), -1)
        expert_map[mine] = torch.arange(len(mine))
        local = (stacked([w[e] for e in mine]) for w in (up, down))
        parts.append(moe(x, weights, ids, *local, expert_map=expert_map))
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-6, atol=1e-6)


def test_the_op_describes_itself_to_the_compiler() -> None:
    spec = QuantSpec(3, 16, sym=False, desc_act=True)
    up, down = (stacked(random_weights(spec, *shape)) for shape in ((2 * INNER, HIDDEN, 0), (HIDDEN, INNER, 1)))
    weights, ids = routing()
    arguments = (torch.randn(TOKENS, HIDDEN), weights, ids, None, "silu", True, *up.arguments, *down.arguments)
    torch.library.opcheck(torch.ops.hf_gptq.moe.default, arguments, test_utils=("test_schema", "test_faketensor"))
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x, w, i: moe(x, w, i, up, down), backend=backend, fullgraph=True, dynamic=True)
    for tokens in (29, 31, 37):  # no size that another dimension has, or the compiler takes both for one
        x, w, i = torch.randn(tokens, HIDDEN), torch.rand(tokens, 2), torch.randint(0, EXPERTS + 1, (tokens, 2))
        assert torch.equal(compiled(x, w, i), moe(x, w, i, up, down))
    assert len(graphs) == 1


def test_weights_that_are_not_alike_are_refused() -> None:
    first, second, _ = random_weights(QuantSpec(4, 16), HIDDEN, INNER, 0)
    with pytest.raises(ValueError, match="experts' weights are not alike"):
        stacked([first, replace(second, spec=QuantSpec(4, 16, checkpoint_format="gptq_v2"))])
    asymmetric = replace(second, zeros=second.zeros - 1)
    with pytest.raises(ValueError, match=r"not alike \(qzeros\)"):
        stacked([first, asymmetric])


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    """63 features take as many words as 64."""
    spec = QuantSpec(4, -1)
    up, down = (stacked(random_weights(spec, *shape, 0)) for shape in ((2 * 64, 64), (64, 64)))
    narrow = stacked(random_weights(spec, 2 * 63, 64, 0))
    x, weights, ids = torch.randn(3, 64), torch.rand(3, 2), torch.randint(0, EXPERTS, (3, 2))
    with pytest.raises(ValueError, match="x has 63 features; the next weights have in_features=64"):
        moe(x[:, :63], weights, ids, up, down)
    with pytest.raises(ValueError, match="what up returns has 63 features; the next weights have in_features=64"):
        moe(x, weights, ids, narrow, down)
    for wrong in ((weights[:2], ids[:2]), (weights, ids[:, :1]), (weights[0], ids[0])):
        with pytest.raises(ValueError, match=r"must both be \[T, choices\]"):
            moe(x, *wrong, up, down)
    with pytest.raises(ValueError, match="scales is on meta, x on cpu"):
        moe(x, weights, ids, replace(up, scales=up.scales.to("meta")), down)


def test_unknown_activation_is_refused() -> None:
    spec = QuantSpec(4, 16)
    up, down = (stacked(random_weights(spec, *shape)) for shape in ((2 * INNER, HIDDEN, 0), (HIDDEN, INNER, 1)))
    with pytest.raises(ValueError, match="activation='tanh' is not supported; use one of silu, gelu"):
        moe(torch.randn(TOKENS, HIDDEN), *routing(), up, down, "tanh")
