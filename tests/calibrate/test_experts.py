"""Fused experts are taken apart by what Transformers says of them, and each is calibrated on its tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, WeightConverter

from hf_gptq_plugin.calibrate import experts as moe
from hf_gptq_plugin.calibrate.walk import WalkError
from hf_gptq_plugin.nn.experts import Expert, Experts

IDS = torch.arange(3, 35)[None]
GATED = (("gate_proj", "up_proj"), "down_proj")
NAMES = {"mixtral": (("w1", "w3"), "w2"), "qwen3_moe": GATED, "qwen2_moe": GATED, "deepseek_v3": GATED}


def load(path: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **kwargs}).eval()


@pytest.mark.parametrize("kind", list(NAMES))
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_taken_apart_compute_the_same(kind: str, implementation: str, tiny: Callable[..., Path]) -> None:
    model = load(tiny(kind), experts_implementation=implementation)
    before = copy.deepcopy(model.state_dict())
    logits = model(input_ids=IDS).logits
    found = moe.layouts(model)
    first = 1 if kind == "deepseek_v3" else 0
    assert list(found) == [f"model.layers.{i}.mlp.experts" for i in range(first, model.config.num_hidden_layers)]
    assert {(layout.ups, layout.down, layout.count) for layout in found.values() if layout} == {(*NAMES[kind], 4)}
    layouts = [layout for layout in found.values() if layout]
    moe.unfuse_experts(model, layouts)
    torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=1e-5, atol=1e-6)
    state = model.state_dict()
    for layout in layouts:
        for e in range(4):
            ups = torch.cat([state[f"{layout.name}.{e}.{leaf}.weight"] for leaf in layout.ups])
            assert torch.equal(ups, before[f"{layout.name}.gate_up_proj"][e])
            assert torch.equal(state[f"{layout.name}.{e}.{layout.down}.weight"], before[f"{layout.name}.down_proj"][e])
        assert {f"{n}.weight" for n in layout.layers()} == {k for k in state if k.startswith(f"{layout.name}.")}


def test_one_block_at_a_time_and_without_weights(tiny: Callable[..., Path]) -> None:
    dense = load(tiny("mixtral"))
    layouts = [layout for layout in moe.layouts(dense).values() if layout]
    moe.unfuse_experts(dense.model.layers[1], layouts, "model.layers.1")
    assert isinstance(dense.model.layers[1].mlp.experts, Experts)
    assert not isinstance(dense.model.layers[0].mlp.experts, Experts)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(dense.config)
    moe.unfuse_experts(empty, layouts)
    layer = empty.model.layers[0].mlp.experts.get_submodule("3.w2")
    assert layer.weight.is_meta and layer.weight.shape == (64, 96)


def test_layers_that_stay_dense_let_go_of_the_others_memory(tiny: Callable[..., Path]) -> None:
    model = load(tiny("mixtral"))
    moe.unfuse_experts(model, [layout for layout in moe.layouts(model).values() if layout])
    weight = model.model.layers[0].mlp.experts.get_submodule("1.w3").weight
    values = weight.detach().clone()
    assert weight.untyped_storage().nbytes() == 4 * 2 * values.nbytes  # no copy was made
    moe.own_memory(model.model.layers[0])
    assert weight.untyped_storage().nbytes() == values.nbytes
    assert torch.equal(weight, values)


@pytest.mark.parametrize(
    ("operations", "understood"),
    [
        ([MergeModulelist(dim=0), Concatenate(dim=1)], True),
        ([MergeModulelist(dim=0)], False),  # two sources
        ([MergeModulelist(dim=1), Concatenate(dim=1)], False),
        ([MergeModulelist(dim=0), Concatenate(dim=0)], False),
        ([MergeModulelist(dim=0), Concatenate(dim=1), Transpose(1, 2)], False),
        ([Transpose(1, 2)], False),
        ([Chunk(dim=0)], False),
    ],
)
def test_only_plain_stacking_is_understood(operations: list[Any], understood: bool) -> None:
    sources = ["experts.*.a.weight", "experts.*.b.weight"]
    converter = WeightConverter(sources, "experts.gate_up_proj", operations)
    assert moe.merges_experts(converter) == understood


def test_an_architecture_without_names_for_single_experts(tiny: Callable[..., Path]) -> None:
    found = moe.layouts(load(tiny("gpt_oss")))
    assert found == {f"model.layers.{i}.mlp.experts": None for i in range(2)}
    with pytest.raises(WalkError, match=r'model\.layers\.0\.mlp\.experts holds fused .*dynamic=\{"-:\.\*'):
        moe.refuse_unknown(found, lambda name: True)
    moe.refuse_unknown(found, lambda name: False)


def test_what_chooses_experts_is_found(tiny: Callable[..., Path]) -> None:
    blocks = {kind: load(tiny(kind)).model.layers for kind in ("mixtral", "qwen2_moe", "llama")}
    assert moe.routers(blocks["qwen2_moe"][0]) == {"mlp.shared_expert_gate"}
    assert moe.routers(blocks["mixtral"][0]) == moe.routers(blocks["llama"][0]) == set()


def make(width: int = 6, inner: int = 5) -> Experts:
    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False, dtype=torch.float64)

    return Experts([
        Expert({"a": linear(width, inner), "b": linear(width, inner)}, ("c", linear(inner, width)), combine)
        for _ in range(3)
    ])  # fmt: skip


def combine(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.sigmoid(first) * second


def mean_outer(left: Tensor, right: Tensor, weights: Tensor | None = None) -> Tensor:
    counts = torch.ones(len(left)) if weights is None else weights
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64)
    for a, b, count in zip(left, right, counts.double(), strict=True):
        total += count * torch.outer(a, b)
    return total / counts.double().sum()


def close(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(("sample", "taken"), [(10, range(10)), (4, range(0, 10, 2))])
def test_hessians_are_those_of_the_tokens_sent_to_an_expert(
    sample: int, taken: range, counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "ROWS", 4)
    monkeypatch.setattr(moe, "SAMPLE", sample)
    quantized, dense = make(), make()
    index = [torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]]), torch.tensor([[1, 0]] * 3 + [[1, 2]] * 2)]
    x = [torch.randn(5, 6, dtype=torch.float64) for _ in index]
    exact = [t + 0.1 * torch.randn_like(t) for t in x]
    calls = [(a, i, torch.rand(5, 2) + 0.1) for a, i in zip(x, index, strict=True)]
    weights = [torch.rand(10)] if counted else None  # of one window, in which the module runs twice
    # The dense model's router chooses otherwise; its choice must play no part.
    other = [(a, (i + 1) % 3, torch.ones(5, 2)) for a, i in zip(exact, index, strict=True)]
    wanted = {f"{e}.{leaf}" for e in range(3) for leaf in "abc"} - {"1.b"}
    seen = []
    for names, hessian, note in moe.expert_hessians(quantized, calls, (dense, other), wanted, 8, weights):
        e, last = int(names[0][0]), names[0].endswith("c")
        seen += names

        def rows(which: Any, e: int = e, last: bool = last) -> tuple[Tensor, Tensor]:
            mine, true = torch.cat(x)[which], torch.cat(exact)[which]
            return (list(quantized)[e].hidden(mine), list(dense)[e].hidden(true)) if last else (mine, true)

        mine, true = rows((torch.cat(index) == e).any(1))
        sent = torch.cat(index) == e
        share = (torch.cat([call[2] for call in calls]) * sent).sum(1) ** 2
        counts = weights[0][sent.any(1)] * share[sent.any(1)] if weights is not None else None
        mean, cross = mean_outer(mine, mine, counts), mean_outer(mine, true - mine, counts)
        assert hessian.tokens == len(mine) == {0: 8, 1: 10, 2: 2}[e]
        if e == 2:  # as many tokens as the layer has inputs are borrowed
            every, exactly = rows(list(taken))
            width = 5 if last else 6
            counts = weights[0][list(taken)] if weights is not None else None
            mean = (2 * mean + width * mean_outer(every, every, counts)) / (2 + width)
            cross = (2 * cross + width * mean_outer(every, exactly - every, counts)) / (2 + width)
            assert note == f"the router sent 2 tokens here; leans on {len(taken)} of all that entered the layer"
        else:
            assert note == ""
        close(hessian.mean(), mean)
        close(hessian.mean_cross(), cross)
        if names == ["0.a", "0.b"]:  # what replaces a layer by then makes the inputs of the next
            next(iter(quantized)).a = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    assert seen == ["0.a", "0.b", "0.c", "1.a", "1.c", "2.a", "2.b", "2.c"]


def test_twice_the_inputs_is_enough() -> None:
    experts = make()
    calls = [(torch.randn(11, 6, dtype=torch.float64), torch.zeros(11, 1, dtype=torch.int64), torch.ones(11, 1))]
    hessians = moe.expert_hessians(experts, calls, None, {"0.a", "0.c"})
    assert [bool(note) for _, _, note in hessians] == [True, False]  # 11 tokens; 6 and 5 inputs


def test_an_expert_that_no_token_was_sent_to_leans_on_all() -> None:
    experts = make()
    x = torch.randn(4, 6, dtype=torch.float64)
    calls = [(x, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))]
    (up, first, note), (down, second, _) = moe.expert_hessians(experts, calls, None, {"2.a", "2.c"}, least=1)
    assert (up, down, first.tokens, second.tokens) == (["2.a"], ["2.c"], 0, 0)
    assert "sent 0 tokens" in note and first.mean_cross() is None
    close(first.mean(), mean_outer(x, x))
    hidden = list(experts)[2].hidden(x)
    close(second.mean(), mean_outer(hidden, hidden))
