"""The walk understands models by their structure."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, load
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig, native
from hf_gptq_plugin.calibrate import stream, walk
from hf_gptq_plugin.calibrate.chains import find_chains
from hf_gptq_plugin.calibrate.sources import CalibrationError
from hf_gptq_plugin.calibrate.stream import Resumable
from hf_gptq_plugin.solve import linalg

# What stands in one block, in the order in which it runs; layers in one list read the same tensor.
STAGES = {
    "llama": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"],
    ],
    "qwen3": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"],
    ],
    "gemma3_text": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"],
    ],
    "phi3": [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "opt": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"],
    ],
    "gpt_neox": [
        ["attention.query_key_value"], ["attention.dense"], ["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"],
    ],
    "falcon": [
        ["self_attention.query_key_value", "mlp.dense_h_to_4h"], ["self_attention.dense"], ["mlp.dense_4h_to_h"],
    ],
    "bloom": [
        ["self_attention.query_key_value"], ["self_attention.dense"], ["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"],
    ],
}  # fmt: skip


def record(model: nn.Module, windows: list[torch.Tensor]) -> tuple[list[walk.Block], list[torch.Tensor]]:
    (chain,) = find_chains(model, windows[0])
    return walk.record_calls(model, chain, windows)


@pytest.mark.parametrize("kind", list(STAGES))
def test_stages_follow_execution(kind: str, tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(kind)).eval()
    chain, hiddens = record(model, [torch.tensor(windows[0])])
    stages = walk.find_stages(chain[0], hiddens[0], walk.linears(chain[0].module))
    assert [sorted(s) for s in stages] == [sorted(s) for s in STAGES[kind]]


ADDED_TO: dict[str, dict[str, str]] = {
    "llama": {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"},
    "gpt2": {"attn.c_proj": "", "mlp.c_proj": "ln_2"},
    "opt": {"self_attn.out_proj": "", "fc2": "final_layer_norm"},
    "bloom": {"self_attention.dense": "", "mlp.dense_4h_to_h": "post_attention_layernorm"},
    "bert": {"attention.output.dense": "", "output.dense": "intermediate"},
    "gemma3_text": {},  # a norm stands between a layer and the sum
    "gpt_neox": {},  # three are added up
    "cohere": {"self_attn.o_proj": ""},  # likewise, this one first
}


@pytest.mark.parametrize("kind", list(ADDED_TO))
def test_what_layers_outputs_are_added_to(kind: str, tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    model = load(kind, tiny(kind)).eval()
    (block, *_), hiddens = record(model, [torch.tensor(w) for w in windows[:2]])
    layers = walk.linears(block.module)
    stages = walk.find_stages(block, hiddens[0], layers)
    assert block.added_to == ADDED_TO[kind]
    resumable = Resumable(block, layers)
    for (layer,) in (stage for stage in stages if stage[0] in block.added_to):
        part, inputs = block.added_to[layer], []
        target = block.module.get_submodule(part) if part else block.module
        handle = target.register_forward_pre_hook(lambda m, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            expected = [block.run(hidden, window) for window, hidden in enumerate(hiddens)]
        handle.remove()
        for window, seen in enumerate(list(resumable.seen(layer, hiddens, part))):
            assert seen.beside is not None and seen.returned is None
            assert torch.equal(seen.beside, inputs[window])
            if layer == stages[-1][0]:
                out = seen.beside + block.module.get_submodule(layer)(stream.entered(seen))
                norm = block.module.get_submodule("output.LayerNorm") if kind == "bert" else torch.nn.Identity()
                torch.testing.assert_close(norm(out).view_as(expected[window]), expected[window])
        resumable.final.update(name for stage in stages[: stages.index([layer]) + 1] for name in stage)


def test_stubs_are_taken_out_again(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    ids = torch.tensor(windows[:1])
    before = model(input_ids=ids).logits
    chain, _ = record(model, [ids[0]])
    assert all("forward" not in vars(block.module) for block in chain)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("kind", list(STAGES))
def test_a_resumed_pass_is_the_whole_pass_and_runs_every_layer_once(
    kind: str, tiny: Callable[..., Path], windows: list[list[int]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(kind)).eval()
    chain, hiddens = record(model, [torch.tensor(w) for w in windows[:2]])
    block = chain[0]
    layers = walk.linears(block.module)
    inputs: dict[str, list[torch.Tensor]] = {n: [] for n in layers}
    handles = [m.register_forward_pre_hook(lambda m, a, n=n: inputs[n].append(a[0])) for n, m in layers.items()]
    with torch.no_grad():
        expected = [block.run(h, i) for i, h in enumerate(hiddens)]
    for handle in handles:
        handle.remove()
    stages = walk.find_stages(block, hiddens[0], layers)
    computed: list[str] = []
    counted = {}
    for n, layer in layers.items():
        own = layer.forward
        counted[n] = layer.forward = lambda *args, n=n, own=own: (computed.append(n), own(*args))[1]
    resumable = Resumable(block, layers)
    for stage in stages:
        for entered, *read in zip(
            map(stream.entered, resumable.seen(stage[0], hiddens)), *(inputs[layer] for layer in stage), strict=True
        ):
            assert entered is not None and all(torch.equal(entered, expected_input) for expected_input in read)
        resumable.final.update(stage)
    for left, wanted in zip(resumable.outputs(hiddens), expected, strict=True):
        assert torch.equal(left, wanted)
    assert sorted(computed) == sorted([*layers, *layers])  # of two windows
    assert "forward" not in vars(block.module) and all(vars(m)["forward"] is counted[n] for n, m in layers.items())


class CountAttention(TorchDispatchMode):
    """Counts what of attention is computed, whoever asks for it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "scaled_dot_product" in str(func)
        return func(*args, **(kwargs or {}))


def first_block(
    tiny: Callable[..., Path], windows: list[list[int]]
) -> tuple[walk.Block, dict[str, Any], list[torch.Tensor], torch.Tensor]:
    """A llama's, its layers, what enters it for one window, and what leaves it."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    chain, hiddens = record(model, [torch.tensor(windows[0])])
    with torch.no_grad():
        expected = chain[0].run(hiddens[0], 0)
    return chain[0], walk.linears(chain[0].module), hiddens, expected


@pytest.mark.parametrize("final", [True, False])
def test_a_resumed_pass_computes_attention_once(
    final: bool, tiny: Callable[..., Path], windows: list[list[int]]
) -> None:
    """Where nothing but final layers stands before it; else what entered it may be another when it is run again."""
    block, layers, hiddens, expected = first_block(tiny, windows)
    resumable = Resumable(block, layers)
    with CountAttention() as counter:
        for stage in STAGES["llama"]:
            next(map(stream.entered, resumable.seen(stage[0], hiddens[:1])))
            if final:
                resumable.final.update(stage)
        (left,) = resumable.outputs(hiddens[:1])
    assert torch.equal(left, expected)
    assert counter.count == (1 if final else len(STAGES["llama"]))
    # Nothing of it is left for the next layers, which may give something else.
    with torch.no_grad():
        layers["self_attn.v_proj"].weight.mul_(2)
        (again,) = resumable.outputs(hiddens[:1])
        assert torch.equal(again, block.run(hiddens[0], 0)) and not torch.equal(again, expected)


@pytest.mark.skipif(
    native.library() is None or not linalg.attends_faster(32), reason="PyTorch's attention is the faster one here"
)
def test_attention_of_our_own(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    """In bf16; to as much as that holds, what PyTorch computes in fp32."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    chain, hiddens = record(model, [torch.tensor(windows[0])])
    with torch.no_grad():
        expected = chain[0].run(hiddens[0], 0)
    model = model.bfloat16()
    chain, hiddens = record(model, [torch.tensor(windows[0])])
    with CountAttention() as counter:
        (left,) = Resumable(chain[0], walk.linears(chain[0].module)).outputs(hiddens[:1])
    assert counter.count == 0
    assert (left.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_resumed_pass_computes_norms_once(
    in_memory: bool, tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path
) -> None:
    """But where what is kept goes to disk, which takes longer than a norm. Activations, which are wider, run again."""
    block, layers, hiddens, expected = first_block(tiny, windows)
    computed: list[str] = []
    own = {name: block.module.get_submodule(name).forward for name in ("input_layernorm", "mlp.act_fn")}

    def counting(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: (computed.append(name), own[name](x))[1]

    for name in own:
        block.module.get_submodule(name).forward = counting(name)
    resumable = Resumable(block, layers, folder=None if in_memory else tmp_path)
    for stage in STAGES["llama"]:
        next(map(stream.entered, resumable.seen(stage[0], hiddens[:1])))
        resumable.final.update(stage)
    (left,) = resumable.outputs(hiddens[:1])
    assert torch.equal(left, expected)
    assert (computed.count("input_layernorm"), computed.count("mlp.act_fn")) == (1 if in_memory else 5, 2)


def test_a_twin_keeps_the_layers_that_are_replaced(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    chain, hiddens = record(model, [torch.tensor(windows[0])])
    with torch.no_grad():
        before = chain[0].run(hiddens[0], 0)
        copy = walk.twin(chain[0])
        weight = model.model.layers[0].mlp.up_proj.weight
        chain[0].module.set_submodule("mlp.up_proj", nn.Linear(96, 160, bias=False))
        assert torch.equal(copy.run(hiddens[0], 0), before)
        assert not torch.equal(chain[0].run(hiddens[0], 0), before)
    assert copy.module.mlp.up_proj.weight is weight


def test_what_stands_behind_a_layer_that_changes_is_computed_again(
    tiny: Callable[..., Path], windows: list[list[int]]
) -> None:
    """A layer that is left dense is final from the start; what it made of a layer before it is not."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    chain, hiddens = record(model, [torch.tensor(w) for w in windows[:2]])
    layers = walk.linears(chain[0].module)
    resumable = Resumable(chain[0], layers, final={"self_attn.o_proj"})
    for stage in STAGES["llama"]:  # all are looked at before any is replaced
        list(map(stream.entered, resumable.seen(stage[0], hiddens)))
    with torch.no_grad():
        layers["self_attn.v_proj"].weight *= 2
    resumable.final.update(layers)
    left = list(resumable.outputs(hiddens))
    with torch.no_grad():
        assert all(torch.equal(left[i], chain[0].run(entered, i)) for i, entered in enumerate(hiddens))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bert"])
@pytest.mark.parametrize("generated", [0, 1.0])
def test_windows_longer_than_the_models_positions(kind: str, generated: float, tiny: Callable[..., Path]) -> None:
    auto = getattr(transformers, getattr(ARCHITECTURES[kind], "auto", "AutoModelForCausalLM"))
    config = GPTQConfig(dataset=[list(range(3, 203))] * 2, group_size=32, samples=2, seqlen=200, generated=generated)
    with pytest.raises(CalibrationError, match=r"has 128 positions, .* 200 tokens; set seqlen to 128 at most"):
        auto.from_pretrained(tiny(kind), quantization_config=config)


class Writes(torch.nn.Module):
    """Writes into what its parts return."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.first(self.norm(hidden)).mul_(2)
        out += hidden
        return self.second(out)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_kept_may_be_written_into(mode: Callable[[], Any]) -> None:
    """It is computed again then; where nothing tells, it was a copy."""
    module = Writes()
    hidden = torch.randn(1, 5, 8)
    with mode():
        outer = walk.Block("", torch.nn.Sequential(module), [((), {})])
        walk.find_stages(outer, hidden, ["0.first", "0.second"])
        assert not outer.added_to  # what is added is not what the layer returned
        expected, entered = module(hidden), module.first(module.norm(hidden)) * 2 + hidden
        block = walk.Block("", module, [((), {})])
        resumable = Resumable(block, ["first", "second"])
        assert torch.equal(next(map(stream.entered, resumable.seen("first", [hidden]))), module.norm(hidden))
        resumable.final.add("first")
        for _ in range(2):  # the first time it is kept, and written into
            assert torch.equal(next(map(stream.entered, resumable.seen("second", [hidden]))), entered)
        resumable.final.add("second")
        assert torch.equal(next(resumable.outputs([hidden])), expected)


def test_what_is_noted_is_not_kept_on_disk(tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    (block, *_), hiddens = record(model, [torch.tensor(windows[0])])
    layers = walk.linears(block.module)
    resumable = Resumable(block, layers, layers, tmp_path)
    plain, files = list(map(stream.entered, resumable.seen("mlp.down_proj", hiddens))), len(list(tmp_path.iterdir()))
    (seen,) = resumable.seen("mlp.down_proj", hiddens, "post_attention_layernorm")
    assert torch.equal(stream.entered(seen), plain[0]) and seen.beside is not None
    assert len(list(tmp_path.iterdir())) == files > 0


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_pass_stops_behind_a_layer_too(
    on_disk: bool, tiny: Callable[..., Path], windows: list[list[int]], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    (block, *_), hiddens = record(model, [torch.tensor(w) for w in windows[:2]])
    layers, returned = walk.linears(block.module), collections.defaultdict[str, list[torch.Tensor]](list)

    def noted(name: str, own: Callable[..., Any], *args: Any) -> torch.Tensor:
        returned[name].append(own(*args))
        return returned[name][-1]

    with torch.no_grad(), ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(walk.forward_replaced(layer, partial(noted, name, layer.forward)))
        expected = [block.run(hidden, window) for window, hidden in enumerate(hiddens)]
        whole = dict(returned)
        returned.clear()
        resumable = Resumable(block, layers, layers, tmp_path if on_disk else None)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            for _ in range(2):  # what was kept is handed out again
                seen = list(resumable.seen(name, hiddens, returned=True))
                assert all(torch.equal(s.returned, out) for s, out in zip(seen, whole[name], strict=True))
                assert all(not s.calls and s.beside is None for s in seen)
        assert all(map(torch.equal, resumable.outputs(hiddens), expected))
    assert {name: len(outs) for name, outs in returned.items()} == dict.fromkeys(layers, 2)  # once for each window


def test_what_is_kept_may_have_names(tmp_path: Path) -> None:
    pair = collections.namedtuple("pair", ["left", "right"])
    for folder in (None, tmp_path):
        kept = stream._stored(pair(torch.ones(2), [torch.zeros(1), "x"]), folder)
        again = stream._fetched(kept)
        assert type(again) is pair and torch.equal(again.left, torch.ones(2)) and again.right[1] == "x"


def test_a_layer_of_another_shape_is_no_product() -> None:
    class Grouped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.view(-1, 2, 8)[:, 0])

    root = nn.Module()
    root.grouped, root.plain = Grouped(8, 4), nn.Linear(8, 4)
    assert list(walk.linears(root)) == ["plain"]


def test_a_layer_that_returns_more_than_the_product_is_none() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 0.5

    class Bounded(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(super().forward(x))

    class Normed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(nn.functional.layer_norm(x, x.shape[-1:]), self.weight)

    class Wide(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x.double(), self.weight.double(), self.bias.double()).to(x.dtype)

    root = nn.ModuleDict({"scaled": Scaled(8, 8), "bounded": Bounded(8, 8, bias=False), "normed": Normed(8, 8)})
    root["wide"] = Wide(8, 8, dtype=torch.bfloat16)
    assert list(walk.linears(root)) == ["wide"]
    assert list(walk.linears(nn.ModuleDict({"wide": Wide(8, 8, device="meta")}))) == ["wide"]  # without values
    mixed = Wide(8, 8, dtype=torch.bfloat16)
    mixed.bias = nn.Parameter(torch.ones(8))
    broken = Wide(8, 8)
    broken.weight.data.fill_(torch.nan)  # the solver's business, which names it
    assert list(walk.linears(nn.ModuleDict({"mixed": mixed, "broken": broken}))) == ["mixed", "broken"]


@pytest.mark.parametrize("names", [["first", "second"], ["first"]])
def test_a_tensor_that_is_written_into_between_two_reads(names: list[str]) -> None:
    """By two layers, or by one that runs twice: Hessians of what was there at the time."""

    class Rewrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            x = self.norm(hidden)
            x.add_(self.first(x)).mul_(3)
            return hidden + (self.second if "second" in names else self.first)(x)

    module, hidden = Rewrites().eval(), torch.randn(1, 50, 8)
    block = walk.Block("", module, [((), {})])
    with torch.no_grad():
        assert walk.find_stages(block, hidden, names) == [[name] for name in names]
        read: dict[str, list[torch.Tensor]] = {}
        handles = [
            module.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: read.setdefault(name, []).append(args[0][0].clone())
            )
            for name in names
        ]
        block.run(hidden, 0)
        for handle in handles:
            handle.remove()
        resumable = Resumable(block, names)
        for name in names:
            (found,) = map(stream.entered, resumable.seen(name, [hidden]))
            assert found is not None and torch.equal(found.flatten(0, -2), torch.cat(read[name]))


def test_nothing_is_kept_for_an_output_embedding(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    """What attention returns is kept where a pass stops behind it, and it stops there at layers only."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    ids = [torch.tensor(w) for w in windows[:2]]
    resumable = Resumable(walk.WholeModel.reading(model, ids), ["lm_head"])
    seen = list(resumable.seen("lm_head", [torch.empty(0)] * 2))
    assert all(stream.entered(s) is not None for s in seen) and not any(resumable._kept)


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="dynamic", factor=4.0),
        dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8, original_max_position_embeddings=16),
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_embeddings_follow_the_text_at_hand_alone(rope: dict[str, Any], tiny: Callable[..., Path]) -> None:
    folder = tiny("llama", head_dim=16, max_position_embeddings=16, rope_parameters={"rope_theta": 1e4, **rope})
    model = AutoModelForCausalLM.from_pretrained(folder)
    x = torch.zeros(1)

    def computed(rotary: Any, length: int) -> torch.Tensor:
        return torch.stack(rotary(x, torch.arange(length)[None]))

    rotary, lengths = model.model.rotary_emb, (8, 40, 24, 16, 8)
    expected = [computed(copy.deepcopy(rotary), length) for length in lengths]
    assert not torch.equal(expected[1][:, :, :8], expected[0])
    before = {name: buffer.clone() for name, buffer in rotary.named_buffers()}
    with walk.rotary_by_length(model):
        found = [computed(rotary, length) for length in lengths]
    assert all(map(torch.equal, found, expected))
    assert all(torch.equal(buffer, before[name]) for name, buffer in rotary.named_buffers())
    assert "forward" not in vars(rotary)
