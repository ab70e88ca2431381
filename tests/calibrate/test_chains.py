"""Which blocks a model runs on text, and that walking them is the model's own forward pass."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from torch import nn
from transformers import AutoConfig

from hf_gptq_plugin.calibrate import walk
from hf_gptq_plugin.calibrate.chains import find_chains
from hf_gptq_plugin.calibrate.stream import Resumable, entered
from hf_gptq_plugin.calibrate.walk import WalkError, linears, record_calls, text_inputs

Tiny = Callable[..., Path]
IDS = torch.arange(3, 35)
# Lengths differ: nothing that belongs to one window is used for another.
WINDOWS = [IDS, IDS.flip(0)[:20]]
# What is not a plain chain, and how that is put.
PIECES = {
    "albert": r"AlbertForMaskedLM is walked as one piece, since albert\.encoder\.albert_layer_groups\.0 runs more than",
    "xlm": r"since the blocks of transformer\.attentions alternate with others",
    "pegasus_x": r"since model\.encoder\.layers\.1 is called with what other blocks have computed",
}


def load(kind: str, tiny: Tiny) -> Any:
    return getattr(transformers, ARCHITECTURES[kind].auto).from_pretrained(tiny(kind)).eval()


def outputs(model: nn.Module, module: nn.Module) -> list[torch.Tensor]:
    """What a block returns in the model's own forward pass, per window."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        for ids in WINDOWS:
            model(**text_inputs(model, ids))
    handle.remove()
    return seen


@pytest.mark.parametrize("kind", [k for k in ARCHITECTURES if k not in PIECES])
def test_walking_the_blocks_is_the_models_own_forward_pass(kind: str, tiny: Tiny) -> None:
    model = load(kind, tiny)
    chains = find_chains(model, IDS)
    assert [chain.name for chain in chains] == list(ARCHITECTURES[kind].quantized)
    finished = []
    for chain in chains:
        blocks, hiddens = record_calls(model, chain, WINDOWS, finished)
        assert [block.name for block in blocks] == list(chain.blocks)
        assert [block.module for block in blocks] == [model.get_submodule(name) for name in chain.blocks]
        with torch.no_grad():
            for block in blocks:
                hiddens = [block.run(hidden, i) for i, hidden in enumerate(hiddens)]
        for walked, own in zip(hiddens, outputs(model, blocks[-1].module), strict=True):
            assert torch.equal(walked, own)
        finished.append((chain, hiddens))


@pytest.mark.parametrize("kind", list(PIECES))
def test_what_is_no_plain_chain_is_one_piece(kind: str, tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    model = load(kind, tiny)
    (chain,) = find_chains(model, IDS)
    assert chain.name == " and ".join(ARCHITECTURES[kind].quantized) and not chain.stubs
    assert sum(len(linears(block)) for block in chain.blocks.values()) == sum(ARCHITECTURES[kind].quantized.values())
    assert re.search(PIECES[kind], caplog.text)
    (block,), _ = record_calls(model, chain, WINDOWS)
    layers = [name for name in linears(model) if name.startswith(tuple(chain.blocks))]
    resumable = Resumable(block, layers)
    walk.find_stages(block, torch.empty(0), {name: model.get_submodule(name) for name in layers})
    for name in layers:
        met: list[torch.Tensor] = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a, met=met: met.append(a[0]))
        with torch.no_grad():
            model(**text_inputs(model, IDS))
        handle.remove()
        inputs = next(map(entered, resumable.seen(name, [torch.empty(0)])))
        assert inputs is not None and torch.equal(inputs.flatten(0, -2), torch.cat([x.flatten(0, -2) for x in met]))


class Stack(nn.Module):
    """Two blocks, and what the model or a block does to the hidden states."""

    def __init__(self, between: Callable[..., Any], inside: Callable[..., Any] = torch.clone) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.layers = nn.ModuleList(Layer(inside) for _ in range(2))
        self.between = between

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.layers[0](self.embed(input_ids))
        return self.layers[1](self.between(hidden))


class Layer(nn.Module):
    def __init__(self, inside: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.inside = inside

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(self.inside(hidden))


@pytest.mark.parametrize(("between", "inside", "problem"), [
    (lambda h: h, torch.clone, None),
    (lambda h: h.view_as(h), torch.clone, None),
    (lambda h: 2 * h, torch.clone, "the model changes the hidden states on their way to layers.1"),
    (lambda h: h.mul_(2), torch.clone, "the model changes the hidden states on their way to layers.1"),
    (lambda h: h, lambda h: h.mul_(2), "layers.0 writes into the hidden states that it takes"),
])  # fmt: skip
def test_what_happens_between_blocks_is_not_lost(
    between: Any, inside: Any, problem: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    (chain,) = find_chains(Stack(between, inside).eval(), IDS)
    assert (problem is None) == bool(chain.stubs) == (not caplog.text)
    assert (problem or "") in caplog.text


def test_blocks_that_text_does_not_reach_are_left_out(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    (chain,) = find_chains(load("mllama", tiny), IDS)
    assert list(chain.blocks) == ["model.language_model.layers.0", "model.language_model.layers.2"]
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "model.language_model.layers.1 take no part in the forward pass on text and stay as they are."
    ]


def test_one_list_by_name(tiny: Tiny) -> None:
    bart, llava = load("bart", tiny), load("llava", tiny)
    (chain,) = find_chains(bart, IDS, "model.decoder.layers")
    assert list(chain.blocks) == ["model.decoder.layers.0", "model.decoder.layers.1"]
    with pytest.raises(WalkError, match=r"'model\.blocks' is not a list of modules; this model has model\.encoder\.la"):
        find_chains(bart, IDS, "model.blocks")
    tower = next(n for n, m in llava.named_modules() if isinstance(m, nn.ModuleList) and "vision" in n)
    with pytest.raises(WalkError, match=rf"{tower} takes no part in the forward pass of LlavaForCond"):
        find_chains(llava, IDS, tower)


def test_models_without_blocks() -> None:
    with pytest.raises(WalkError, match="Linear has no list of blocks"):
        find_chains(nn.Linear(2, 2), IDS)


def test_models_that_do_not_read_text() -> None:
    config = AutoConfig.for_model(
        "whisper", d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, vocab_size=256,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, max_source_positions=32, max_target_positions=64,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with pytest.raises(WalkError, match="WhisperForConditionalGeneration does not run on token ids alone"):
        find_chains(model, IDS)


def test_what_an_encoder_decoder_model_reads(tiny: Tiny) -> None:
    inputs = text_inputs(load("bart", tiny), torch.tensor([5, 6, 7]))
    assert inputs["input_ids"].tolist() == [[5, 6, 7]] and inputs["use_cache"] is False
    assert inputs["decoder_input_ids"].tolist() == [[2, 5, 6]]
    assert set(text_inputs(load("llama", tiny), IDS)) == {"input_ids", "use_cache"}
    assert set(text_inputs(load("bert", tiny), IDS)) == {"input_ids"}


def test_a_finished_chain_hands_on_what_left_it(tiny: Tiny) -> None:
    model = load("t5", tiny)
    encoder, decoder = find_chains(model, IDS)
    left = [torch.randn(1, len(ids), 64) for ids in WINDOWS]
    blocks, _ = record_calls(model, decoder, WINDOWS, [(encoder, left)])
    for hidden, (args, _) in zip(left, blocks[1].calls, strict=True):
        assert any(torch.equal(a, model.encoder.final_layer_norm(hidden)) for a in args if torch.is_tensor(a))


def test_what_subclasses_of_linear_return_decides() -> None:
    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), x

    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    layers = {"router": Router(4, 2), "own": Own(4, 2, bias=False), "plain": nn.Linear(4, 2)}
    assert list(linears(nn.ModuleDict(layers))) == ["own", "plain"]


def test_layers_that_read_alike_once_but_not_always_are_apart() -> None:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, hidden: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            keys, values = self.k(hidden) + self.k(other), self.v(hidden) + self.v(other)
            return self.q(hidden) * keys + values

    hidden, other = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    block = walk.Block("block", Merged(), [((other,), {})])
    assert walk.find_stages(block, hidden, linears(block.module)) == [["k", "v"], ["q"]]
    assert block.repeated == {"k", "v"}
    inputs = next(map(entered, Resumable(block, "qkv").seen("v", [hidden])))
    assert inputs is not None and torch.equal(inputs, torch.cat([hidden, other], 1)[0])


def test_recording_computes_neither_blocks_nor_logits(tiny: Tiny) -> None:
    model = load("bart", tiny)
    encoder, decoder = find_chains(model, IDS)
    ran: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, a, out, name=name: ran.append(name))
    record_calls(model, encoder, WINDOWS)
    record_calls(model, decoder, WINDOWS, [(encoder, [torch.zeros(1, len(ids), 64) for ids in WINDOWS])])
    assert ran == []
