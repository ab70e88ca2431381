"""Mixtures of experts: quantized expert by expert, saved under the names every reader knows, loaded back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_gptq_plugin import CheckpointError, GPTQConfig, QuantLinear
from hf_gptq_plugin.calibrate.walk import WalkError
from hf_gptq_plugin.nn.experts import Experts

Tiny = Callable[..., Path]
IDS = torch.arange(3, 35)[None]
# The experts' folder on disk, the names in it, and the layers that are quantized in all blocks together.
KINDS = {
    "mixtral": ("block_sparse_moe", ("w1", "w2", "w3"), 2 * (4 + 12)),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), 2 * (4 + 12)),
    "qwen2_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), 2 * (4 + 12 + 3)),
    "deepseek_v3": ("mlp", ("gate_proj", "up_proj", "down_proj"), 3 * 5 + 3 + 2 * (12 + 3)),
    "hy_v3": ("mlp", ("gate_proj", "up_proj", "down_proj"), 2 * 4 + 3 + 12 + 3),
}


def quantize(path: Path, windows: list[list[int]], **fields: Any) -> Any:
    config = GPTQConfig(**{"bits": 4, "group_size": 32, "dataset": windows, "samples": 8, "seqlen": 32, **fields})
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float32)


def load(path: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **kwargs})


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, windows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-bit Mixtral on disk."""
    out = tmp_path_factory.mktemp("gptq") / "model"
    quantize(tiny("mixtral"), windows).save_pretrained(out)
    return out


@pytest.mark.parametrize("kind", list(KINDS))
def test_quantize_save_reload(kind: str, tiny: Tiny, windows: list[list[int]], tmp_path: Path) -> None:
    folder, leaves, count = KINDS[kind]
    dense = load(tiny(kind)).eval()
    model = quantize(tiny(kind), windows, bits=8, min_expert_tokens=1)
    layers = {name for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    reports = model.hf_quantizer.reports
    assert {r.name for r in reports} == layers and len(reports) == len(layers) == count
    assert not any(r.note for r in reports)
    out, exact = logits(model), logits(dense)
    assert 0 < (out - exact).norm() / exact.norm() < 0.05
    model.save_pretrained(tmp_path / "out")
    state = tensors(tmp_path / "out")
    last = model.config.num_hidden_layers - 1
    prefix = f"model.layers.{last}.{folder}.experts."
    expected = {
        f"{prefix}{e}.{n}.{t}" for e in range(4) for n in leaves for t in ("qweight", "qzeros", "scales", "g_idx")
    }
    assert {k for k in state if k.startswith(prefix)} == expected
    again = load(tmp_path / "out")
    assert torch.equal(logits(again), out)
    again.save_pretrained(tmp_path / "again")
    resaved = tensors(tmp_path / "again")
    assert set(resaved) == set(state) and all(torch.equal(resaved[k], state[k]) for k in state)


def test_routers_and_gates_stay_dense(tiny: Tiny, windows: list[list[int]]) -> None:
    model = quantize(tiny("qwen2_moe"), windows)
    assert type(model.model.layers[0].mlp.shared_expert_gate) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.shared_expert.gate_proj, QuantLinear)
    named = quantize(tiny("qwen2_moe"), windows, modules_in_block_to_quantize=["mlp.shared_expert_gate"])
    assert isinstance(named.model.layers[0].mlp.shared_expert_gate, QuantLinear)
    assert not isinstance(named.model.layers[0].mlp.experts, Experts)


@pytest.fixture(scope="module")
def lopsided(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral that sends every token to one of its first three experts: the last one's score is their mean."""
    out = tmp_path_factory.mktemp("lopsided") / "dense"
    shutil.copytree(tiny("mixtral", num_experts_per_tok=1), out)
    state = tensors(out)
    for i in range(2):
        gate = state[f"model.layers.{i}.block_sparse_moe.gate.weight"]
        gate[3] = gate[:3].mean(0)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("fields", [{}, {"propagation": 0.0, "true_sequential": False}])
def test_an_expert_that_never_fires(
    fields: dict[str, Any], lopsided: Path, windows: list[list[int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = quantize(lopsided, windows, bits=8, min_expert_tokens=2, generated=0, **fields)
    for i in range(2):
        reports = [r for r in model.hf_quantizer.reports if r.name.startswith(f"model.layers.{i}.mlp.experts.")]
        starved = [r for r in reports if ".experts.3." in r.name]
        note = "the router sent 0 tokens here; leans on 256 of all that entered the layer"
        assert [(r.tokens, r.note) for r in starved] == [(0, note)] * 3
        rest = {r.name.split(".")[5]: r.tokens for r in reports if r not in starved}
        assert sum(rest.values()) == 256 and not any(r.note for r in reports if r not in starved)
    (warning,) = [r.getMessage() for r in caplog.records if "few calibration tokens" in r.getMessage()]
    assert warning.startswith("2 experts were sent")
    assert "(model.layers.0.mlp.experts.3, model.layers.1.mlp.experts.3)" in warning
    dense = tensors(lopsided)["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    layer = model.get_submodule("model.layers.1.mlp.experts.3.w2")
    assert 0 < (layer.weight - dense).norm() / dense.norm() < 0.02
    out = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), out)


def test_a_rule_for_one_expert(tiny: Tiny, windows: list[list[int]], tmp_path: Path) -> None:
    dynamic = {r"-:.*experts\.2\.": {}, r"+:.*experts\.1\.w1$": {"bits": 8}}
    model = quantize(tiny("mixtral"), windows, dynamic=dynamic)
    experts = model.model.layers[1].mlp.experts
    assert type(experts.get_submodule("2.w1")) is nn.Linear
    assert experts.get_submodule("1.w1").spec.bits == 8 and experts.get_submodule("1.w3").spec.bits == 4
    out = logits(model)
    model.save_pretrained(tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    assert torch.equal(tensors(tmp_path)[name], tensors(tiny("mixtral"))[name])
    again = load(tmp_path)
    assert torch.equal(logits(again), out)
    assert again.model.layers[1].mlp.experts.get_submodule("1.w1").spec.bits == 8


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_left_out_by_a_rule_stay_fused(kind: str, tiny: Tiny, windows: list[list[int]], tmp_path: Path) -> None:
    model = quantize(tiny(kind), windows, dynamic={"-:.*\\.experts": {}})
    assert {r.name.split(".")[3] for r in model.hf_quantizer.reports} == {"self_attn"}
    assert model.model.layers[0].mlp.experts.gate_up_proj.dim() == 3
    out = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), out)


def test_a_layout_that_is_not_understood(tiny: Tiny, windows: list[list[int]]) -> None:
    with pytest.raises(WalkError, match=r"model\.layers\.0\.mlp\.experts holds fused experts.*leave them dense with"):
        quantize(tiny("gpt_oss"), windows)


def test_some_experts_only(tiny: Tiny, windows: list[list[int]]) -> None:
    model = quantize(
        tiny("mixtral"), windows, modules_in_block_to_quantize=[["mlp.experts.0.w1"], ["mlp.experts.3.w2"]]
    )
    layers = {name for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert layers == {f"model.layers.{i}.mlp.experts.{n}" for i in range(2) for n in ("0.w1", "3.w2")}


@pytest.mark.parametrize("value", [0, 2.5, True])
def test_impossible_numbers_of_tokens(value: Any) -> None:
    with pytest.raises(ValueError, match=f"min_expert_tokens={value!r} must be an integer of at least 1, or None"):
        GPTQConfig(min_expert_tokens=value)


def test_bf16_experts_and_generation(tiny: Tiny, windows: list[list[int]], tmp_path: Path) -> None:
    config = GPTQConfig(bits=4, group_size=32, dataset=windows, samples=8, seqlen=32)
    model = load(tiny("qwen3_moe"), quantization_config=config, dtype=torch.bfloat16)
    out = logits(model)
    assert out.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits(again), out)
    kwargs = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(again.generate(IDS, **kwargs), model.generate(IDS, **kwargs))


def test_dequantized_experts_load_as_any_others(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    out = logits(model)
    model.dequantize().save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 192, 64)
    torch.testing.assert_close(logits(again), out, rtol=1e-5, atol=1e-5)


def test_offloaded_experts(checkpoint: Path, tiny: Tiny, windows: list[list[int]], tmp_path: Path) -> None:
    expected = logits(load(checkpoint))
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = load(checkpoint, device_map=device_map, offload_folder=tmp_path / "a")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    # An offloaded model writes no text and takes no backward pass.
    expected = logits(quantize(tiny("mixtral"), windows, generated=0, output_hessian="identity"))
    config = GPTQConfig(bits=4, group_size=32, dataset=windows, samples=8, seqlen=32)
    made = load(tiny("mixtral"), quantization_config=config, device_map=device_map, offload_folder=tmp_path / "b")
    torch.testing.assert_close(logits(made), expected, rtol=1e-5, atol=1e-5)


def changed(checkpoint: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> Path:
    shutil.copytree(checkpoint, folder)
    state = tensors(folder)
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **config}))
    return folder


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        (["scales"], r"block_sparse_moe\.experts\.3\.w2\.scales is missing"),
        (["qweight", "qzeros", "scales", "g_idx"], r"mlp\.experts\.3\.w2\.weight is missing"),
    ],
)
def test_missing_tensors_of_an_expert(leaves: list[str], message: str, checkpoint: Path, tmp_path: Path) -> None:
    def drop(state: dict[str, torch.Tensor]) -> None:
        for leaf in leaves:
            del state[f"model.layers.1.block_sparse_moe.experts.3.w2.{leaf}"]

    with pytest.raises(CheckpointError, match=message):
        load(changed(checkpoint, tmp_path / "m", drop))


def test_more_experts_than_the_config_says(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"experts\.3\.w1, but MixtralForCausalLM has no module .* the config it"):
        load(changed(checkpoint, tmp_path / "m", lambda state: None, num_local_experts=3))


def test_an_expert_of_another_shape(checkpoint: Path, tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.1.w1.qweight"

    def cut(state: dict[str, torch.Tensor]) -> None:
        state[name] = state[name][:, :64].contiguous()

    with pytest.raises(CheckpointError, match=r"experts\.1\.w1\.qweight has shape \(8, 64\)"):
        load(changed(checkpoint, tmp_path / "m", cut))
