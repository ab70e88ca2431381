"""What a layer is solved for, against hooks on whole passes and float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import load
from torch import Tensor

from hf_gptq_plugin.calibrate import walk
from hf_gptq_plugin.calibrate.blocks import dense_weight, layer_hessian
from hf_gptq_plugin.calibrate.chains import find_chains
from hf_gptq_plugin.calibrate.products import dense_twin
from hf_gptq_plugin.calibrate.stream import Stream, entered


@pytest.mark.parametrize(("layer", "part"), [("self_attn.o_proj", ""), ("mlp.down_proj", "post_attention_layernorm")])
def test_a_sum_is_to_be_what_the_dense_model_has_there(
    layer: str, part: str, tiny: Callable[..., Path], windows: list[list[int]]
) -> None:
    model = load("llama", tiny("llama")).eval()
    ids = [torch.tensor(window) for window in windows[:3]]
    (chain,) = find_chains(model, ids[0])
    (block, *_), dense = walk.record_calls(model, chain, ids)
    ours = [hidden + 0.1 * torch.randn_like(hidden) for hidden in dense]

    def captured(hiddens: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What enters the layer, and the sum that its output is part of: with the layer's own output."""
        inputs, added = [], []
        module = block.module.get_submodule(layer)
        before = block.module.get_submodule(part) if part else block.module
        handles = [
            module.register_forward_pre_hook(lambda m, args: inputs.append(args[0])),
            before.register_forward_pre_hook(lambda m, args: added.append(args[0])),
        ]
        with torch.no_grad():
            for window, hidden in enumerate(hiddens):
                block.run(hidden, window)
        for handle in handles:
            handle.remove()
        return torch.cat(inputs, 1)[0].double(), torch.cat(added, 1)[0].double()

    (x, r), (exact_x, exact_r) = captured(ours), captured(dense)
    weight = block.module.get_submodule(layer).weight.detach()
    lost = (exact_x - x) @ weight.double().T + exact_r - r

    layers = walk.linears(block.module)
    walk.find_stages(block, ours[0], layers)
    stream, exact = Stream(ours), Stream(dense)
    stream.enter(block, layers, ())
    exact.enter(dense_twin(block), layers, layers)
    hessian = layer_hessian(stream, exact, layer, alone=True)
    drift = hessian.drift(weight)
    torch.testing.assert_close(drift.double(), lost.T @ x / len(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hessian.mean().double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    # Beside others that read the same tensor, only what enters counts.
    exact.enter(dense_twin(block), layers, layers)
    drift = layer_hessian(stream, exact, layer).drift(weight)
    torch.testing.assert_close(drift.double(), weight.double() @ (exact_x - x).T @ x / len(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_a_large_bias_does_not_round_what_a_layer_returns(
    kind: str, tiny: Callable[..., Path], windows: list[list[int]]
) -> None:
    """In 16 bits what the dense layer returned says little about its product."""
    model = load(kind, tiny(kind)).bfloat16().eval()
    ids = [torch.tensor(window) for window in windows[:3]]
    (chain,) = find_chains(model, ids[0])
    (block, *_), dense = walk.record_calls(model, chain, ids)
    layers = walk.linears(block.module)
    walk.find_stages(block, dense[0], layers)
    (layer,) = (name for name, part in block.added_to.items() if part == "")
    module: Any = block.module.get_submodule(layer)
    with torch.no_grad():
        module.bias.fill_(300.0)
    stream, exact = Stream([hidden + torch.randn_like(hidden) for hidden in dense]), Stream(dense)
    stream.enter(block, layers, ())
    exact.enter(dense_twin(block), layers, layers)
    inputs = [torch.cat([entered(seen)[0] for seen in s.seen(layer)]).double() for s in (stream, exact)]
    weight = dense_weight(module).double()
    lost = torch.cat([d - h for d, h in zip(dense, stream.hiddens, strict=True)], 1)[0].double()
    wanted = (inputs[1] - inputs[0]) @ weight.T + lost
    exact.enter(dense_twin(block), layers, layers)
    drift = layer_hessian(stream, exact, layer, alone=True).drift(dense_weight(module))
    expected = wanted.T @ inputs[0] / len(wanted)
    assert (drift.double() - expected).norm() < 0.01 * expected.norm()
