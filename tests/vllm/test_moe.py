"""Mixtures of experts whose experts are quantized, in vLLM: matrix by matrix without an engine, and end to end."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_layers import dense, random_weight

from hf_gptq_plugin import native
from hf_gptq_plugin.format.checkpoint import TENSORS
from hf_gptq_plugin.format.grid import QuantizedWeight
from hf_gptq_plugin.format.spec import CheckpointError, QuantSpec
from hf_gptq_plugin.nn.experts import Expert, Experts
from hf_gptq_plugin.nn.linear import QuantLinear

pytest.importorskip("vllm.version", reason="these tests need vLLM")

# vLLM, and what it imports, warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

EXPERTS, HIDDEN, INNER, TOKENS = 3, 80, 48, 7
SHARDS = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}
SPECS = [
    QuantSpec(bits, 32, sym, desc_act, fmt)
    for bits, sym, desc_act, fmt in product((2, 3, 4, 8), (True, False), (False, True), ("gptq", "gptq_v2"))
]
Weights = dict[tuple[int, str], QuantizedWeight]


def random_experts(spec: QuantSpec) -> Weights:
    """Matrices of all experts; an expert's w1 and w3 have one order of groups, as they read the same inputs."""
    made: Weights = {}
    for expert in range(EXPERTS):
        for seed, (shard, (out_features, in_features)) in enumerate(SHARDS.items()):
            group = made[expert, "w1"].group if shard == "w3" else None
            made[expert, shard] = random_weight(out_features, spec, in_features, group, seed=10 * expert + seed)
    return made


def make(spec: QuantSpec, rank: int = 0, size: int = 1, mine: tuple[int, ...] = (0, 1, 2)) -> Any:
    """A layer with room for the experts `mine` on rank `rank` of `size`."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from vllm_plugin.linear import ZeroFormat
    from vllm_plugin.moe import ExpertsScheme, HfGptqMoEMethod

    names = {(expert, shard): f"experts.{expert}.{shard}" for expert in range(EXPERTS) for shard in SHARDS}
    config: Any = SimpleNamespace(
        activation=MoEActivation.SILU,
        is_act_and_mul=True,
        swiglu_limit=None,
        has_bias=False,
        tp_size=size,
        tp_rank=rank,
    )
    method = HfGptqMoEMethod(
        ExpertsScheme(names, spec, spec, torch.float16), ZeroFormat(spec.checkpoint_format), config, "experts"
    )
    layer: Any = torch.nn.Module()
    layer.quant_method = method
    layer.apply_router_weight_on_input = False
    layer.expert_map = None
    if len(mine) < EXPERTS:
        layer.expert_map = torch.tensor([mine.index(e) if e in mine else -1 for e in range(EXPERTS)])
    layer._map_global_expert_id_to_local_expert_id = lambda e: mine.index(e) if e in mine else -1
    with set_current_vllm_config(VllmConfig()):
        method.create_weights(layer, len(mine), HIDDEN, INNER // size, torch.float32)
    return layer


def load(layer: Any, weights: Weights, leave_out: tuple[tuple[int, str, str], ...] = ()) -> Any:
    """Load every tensor by the name of its expert, as vLLM's loader does."""
    for (expert, shard), weight in weights.items():
        stem = "w2" if shard == "w2" else "w13"
        for leaf, tensor in weight.pack().items():
            if (expert, shard, leaf) not in leave_out:
                parameter = getattr(layer, f"{stem}_{leaf}")
                parameter.weight_loader(parameter, tensor, f"{stem}_{leaf}", shard, expert, return_success=True)
    return layer


def finish(layer: Any) -> Any:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def routing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, weights of two choices each, and ids."""
    ids = torch.tensor([[0, 1], [2, 0], [1, 2]]).repeat(3, 1)[:TOKENS]
    return torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, 2), ids


def run(layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return layer.quant_method.apply(layer, x, weights, ids, None, None)


def in_transformers(weights: Weights) -> Experts:
    def silu_and_multiply(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def layer(expert: int, shard: str) -> QuantLinear:
        return QuantLinear.from_quantized(weights[expert, shard])

    return Experts(
        [
            Expert({s: layer(e, s) for s in ("w1", "w3")}, ("w2", layer(e, "w2")), silu_and_multiply)
            for e in range(EXPERTS)
        ]
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_experts_give_the_bits_that_they_give_in_transformers(spec: QuantSpec) -> None:
    if native.library() is None:
        pytest.skip(f"no native library, whose bits do not depend on what is fused: {native.status().detail}")
    weights = random_experts(spec)
    layer = finish(load(make(spec), weights))
    x, topk_weights, ids = routing()
    out = run(layer, x, topk_weights, ids)
    assert torch.equal(out, in_transformers(weights)(x, ids, topk_weights))
    # Both could be wrong alike: the same sum in float64, over dense weights that slow loops decoded.
    truth = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    w = {place: dense([weight]) for place, weight in weights.items()}
    for token, choice in product(range(TOKENS), range(2)):
        e, v = int(ids[token, choice]), x[token].double()
        hidden = torch.nn.functional.silu(w[e, "w1"] @ v) * (w[e, "w3"] @ v)
        truth[token] += topk_weights[token, choice].double() * (w[e, "w2"] @ hidden)
    assert (out.double() - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize(("bits", "desc_act"), [(3, False), (3, True), (4, False), (8, True)])
def test_ranks_add_up(bits: int, desc_act: bool, group_size: int) -> None:
    """Tensor parallel: the second rank's part of w2 begins at input 24, inside a group and, at 3 bits, a word."""
    spec = QuantSpec(bits, group_size, False, desc_act)
    weights = random_experts(spec)
    x, topk_weights, ids = routing()
    whole = run(finish(load(make(spec), weights)), x, topk_weights, ids)
    parts = [run(finish(load(make(spec, rank, 2), weights)), x, topk_weights, ids) for rank in range(2)]
    assert (parts[0] + parts[1] - whole).abs().max() <= 1e-6 * whole.abs().max()


def test_experts_of_other_ranks() -> None:
    """Expert parallel: whole experts, and none of another rank's tensors."""
    spec = QuantSpec(4, 32)
    weights = random_experts(spec)
    x, topk_weights, ids = routing()
    whole = run(finish(load(make(spec), weights)), x, topk_weights, ids)
    parts = [run(finish(load(make(spec, mine=mine), weights)), x, topk_weights, ids) for mine in ((2,), (0, 1))]
    assert (parts[0] + parts[1] - whole).abs().max() <= 1e-6 * whole.abs().max()


def test_router_weights_on_the_input() -> None:
    spec = QuantSpec(4, 32)
    layer = finish(load(make(spec), random_experts(spec)))
    x, topk_weights, ids = routing()
    one, weight = ids[:, :1], topk_weights[:, :1]
    expected = run(layer, x * weight, torch.ones_like(weight), one)
    layer.apply_router_weight_on_input = True
    assert torch.equal(run(layer, x, weight, one), expected)


def test_experts_without_g_idx() -> None:
    spec = QuantSpec(4, 32, sym=False)
    weights = random_experts(spec)
    absent = tuple((expert, shard, "g_idx") for expert, shard in weights)
    inputs = routing()
    expected = run(finish(load(make(spec), weights)), *inputs)
    assert torch.equal(run(finish(load(make(spec), weights, absent)), *inputs), expected)


@pytest.mark.parametrize("leaf", TENSORS)
@pytest.mark.parametrize("shard", SHARDS)
def test_missing_tensor_of_an_expert_is_named(shard: str, leaf: str) -> None:
    spec = QuantSpec(4, 32, desc_act=True)
    layer = load(make(spec), random_experts(spec), leave_out=((1, shard, leaf),))
    with pytest.raises(CheckpointError, match=rf"the checkpoint has no experts\.1\.{shard}\.{leaf}, so experts cannot"):
        finish(layer)


def test_g_idx_of_some_matrices_only_is_refused() -> None:
    spec = QuantSpec(4, 32)
    layer = load(make(spec), random_experts(spec), leave_out=((1, "w3", "g_idx"),))
    with pytest.raises(CheckpointError, match=r"no experts\.1\.w3\.g_idx"):
        finish(layer)


def test_gate_and_up_of_different_order_are_refused() -> None:
    spec = QuantSpec(4, 32, desc_act=True)
    weights = random_experts(spec)
    weights[1, "w3"] = random_weight(INNER, spec, HIDDEN, seed=99)
    with pytest.raises(CheckpointError, match=r"experts\.1\.w3\.g_idx differs from experts\.1\.w1\.g_idx"):
        load(make(spec), weights)


def test_tensor_of_another_shape_is_refused() -> None:
    spec = QuantSpec(4, 32)
    weights = random_experts(spec)
    weights[2, "w2"] = random_weight(HIDDEN, QuantSpec(8, 32), INNER)
    with pytest.raises(CheckpointError, match=r"experts\.2\.w2\.qweight has shape \(12, 80\).*bits=8 would fit"):
        load(make(spec), weights)


def test_values_that_cannot_be_are_refused() -> None:
    spec = QuantSpec(4, 32)
    weights = random_experts(spec)
    weights[1, "w2"].scales[1, 3] = float("inf")
    with pytest.raises(CheckpointError, match=r"experts\.1\.w2\.scales\[1, 3\] is inf"):
        finish(load(make(spec), weights))
    weights = random_experts(spec)
    weights[2, "w2"].group[5] = 2
    with pytest.raises(CheckpointError, match=r"experts\.2\.w2\.g_idx holds group 2; with 2 groups"):
        finish(load(make(spec), weights))


def test_what_quantized_experts_do_not_support_is_named() -> None:
    from vllm_plugin.linear import ZeroFormat
    from vllm_plugin.moe import ExpertsScheme, HfGptqMoEMethod

    scheme = ExpertsScheme({}, QuantSpec(), QuantSpec(), torch.float16)
    known: dict[str, Any] = dict(
        activation=SimpleNamespace(value="silu"), is_act_and_mul=True, swiglu_limit=None, has_bias=False
    )
    for change, message in (
        (dict(activation=SimpleNamespace(value="swigluoai")), "the activation 'swigluoai'"),
        (dict(has_bias=True), "experts with biases"),
        (dict(swiglu_limit=7.0), "a limit on its activations"),
    ):
        config: Any = SimpleNamespace(**{**known, **change})
        with pytest.raises(CheckpointError, match=f"layer has {message}"):
            HfGptqMoEMethod(scheme, ZeroFormat("gptq"), config, "layer")


def test_mislabelled_zeros_are_read_as_they_are() -> None:
    label, stored = (QuantSpec(4, 32, checkpoint_format=fmt) for fmt in ("gptq", "gptq_v2"))
    weights = random_experts(stored)
    inputs = routing()
    out = run(finish(load(make(label), weights)), *inputs)
    assert torch.equal(out, run(finish(load(make(stored), weights)), *inputs))


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize("targets", [None, ["q_proj", "experts"]])
def test_adapters_on_experts_are_refused(targets: list[str] | None) -> None:
    from vllm_plugin.moe import _refuse_adapters

    with pytest.raises(
        ValueError, match=r"experts, on which vLLM cannot put LoRA adapters.*--lora-target-modules q_proj"
    ):
        _refuse_adapters("experts", SimpleNamespace(target_modules=targets))


@pytest.mark.parametrize("config", [None, SimpleNamespace(target_modules=list(ATTENTION))])
def test_adapters_on_attention_are_not(config: Any) -> None:
    from vllm_plugin.moe import _refuse_adapters

    _refuse_adapters("experts", config)


def test_mixtral_and_an_adapter_match_transformers(
    quantized: Callable[..., Path], adapter: Callable[..., Path], parity: Callable[..., Any]
) -> None:
    checkpoint = quantized("mixtral", bits=4, group_size=32)
    parity(checkpoint, adapter(checkpoint, seed=1, targets=ATTENTION), lora_target_modules=list(ATTENTION))
