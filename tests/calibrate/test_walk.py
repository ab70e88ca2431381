"""The walk understands models by their structure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_gptq_plugin.calibrate import walk

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


@pytest.mark.parametrize("kind", list(STAGES))
def test_walking_the_blocks_is_the_models_own_forward_pass(
    kind: str, tiny: Callable[..., Path], windows: list[list[int]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(kind)).eval()
    name, blocks = walk.find_blocks(model)
    assert model.get_submodule(name) is blocks and len(blocks) == model.config.get_text_config().num_hidden_layers
    ids = [torch.tensor(w) for w in windows[:3]]
    chain, hiddens = walk.record_calls(model, name, blocks, ids)
    with torch.no_grad():
        for block in chain:
            hiddens = [block.run(hidden, i) for i, hidden in enumerate(hiddens)]
        last: list[torch.Tensor] = []
        handle = blocks[-1].register_forward_hook(
            lambda m, a, out: last.append(out[0] if isinstance(out, tuple) else out)
        )
        for w in ids:
            model(input_ids=w[None], use_cache=False)
        handle.remove()
    for walked, own in zip(hiddens, last, strict=True):
        assert torch.equal(walked, own)


@pytest.mark.parametrize("kind", list(STAGES))
def test_stages_follow_execution(kind: str, tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(kind)).eval()
    name, blocks = walk.find_blocks(model)
    chain, hiddens = walk.record_calls(model, name, blocks, [torch.tensor(windows[0])])
    stages = walk.find_stages(chain[0], hiddens[0], walk.linears(chain[0].module))
    assert [sorted(s) for s in stages] == [sorted(s) for s in STAGES[kind]]


def test_stubs_are_taken_out_again(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    ids = torch.tensor(windows[:1])
    before = model(input_ids=ids).logits
    name, blocks = walk.find_blocks(model)
    walk.record_calls(model, name, blocks, [ids[0]])
    assert all("forward" not in vars(block) for block in blocks)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_feed_shows_every_window_what_enters_the_layer(tiny: Callable[..., Path], windows: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    name, blocks = walk.find_blocks(model)
    chain, hiddens = walk.record_calls(model, name, blocks, [torch.tensor(w) for w in windows[:2]])
    seen: list[torch.Tensor] = []
    walk.feed(chain[0], blocks[0].self_attn.q_proj, hiddens, seen.append)
    with torch.no_grad():
        expected = [blocks[0].input_layernorm(h) for h in hiddens]
    assert len(seen) == 2 and all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_models_without_blocks() -> None:
    with pytest.raises(walk.WalkError, match="Linear has no list of blocks"):
        walk.find_blocks(nn.Linear(2, 2))


def test_unknown_block_name(tiny: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with pytest.raises(walk.WalkError, match=r"'model\.blocks' is not a list of modules; this model has model\.layers"):
        walk.find_blocks(model, "model.blocks")
