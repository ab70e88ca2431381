"""from_pretrained with methods that need no calibration data."""

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

from hf_gptq_plugin import GPTQConfig, QuantLinear
from hf_gptq_plugin.calibrate.walk import WalkError
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.solve.gptq import SolveSettings
from hf_gptq_plugin.solve.hessian import SolveError
from hf_gptq_plugin.solve.rtn import round_to_nearest

Tiny = Callable[..., Path]
IDS = torch.arange(3, 35)[None]


def quantize(path: Path, method: str, **fields: Any) -> Any:
    config = GPTQConfig(**{"bits": 4, "group_size": 32, "method": method, **fields})
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float32)


@pytest.mark.parametrize("method", ["rtn", "hqq"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_every_layer_is_rounded_by_itself(method: str, kind: str, tiny: Tiny, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(tiny(kind), dtype=torch.float32)
    model = quantize(tiny(kind), method, sym=False)
    reports = {report.name: report for report in model.hf_quantizer.reports}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert set(reports) == set(layers) and len(layers) == {"llama": 14, "gpt2": 8, "gemma3_text": 21}[kind]
    for name, layer in layers.items():
        weight = dense.get_submodule(name).weight.detach()
        weight = weight.T if kind == "gpt2" else weight
        expected, _ = round_to_nearest(weight, QuantSpec(4, 32, False), SolveSettings(), refine=method == "hqq")
        assert torch.equal(layer.quantized_weight().codes, expected.codes)
        assert torch.equal(layer.quantized_weight().scales, expected.scales)
        error = (weight - layer.weight).square().sum() / weight.square().sum()
        assert reports[name].solve.relative_error == pytest.approx(float(error), rel=1e-3)
        assert reports[name].tokens == 0
    logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(input_ids=IDS).logits, logits
    )
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["meta"]["solver"] == {"method": method, "scale_search": "mse"}
    assert "calibration" not in written["meta"] and "method" not in written
    assert "without calibration data" in (tmp_path / "README.md").read_text()


def test_rules_chosen_modules_and_the_output_embedding(tiny: Tiny) -> None:
    dynamic = {r"-:.*layers\.0\.mlp": {}, r"+:.*v_proj": {"bits": 8, "group_size": 16}}
    model = quantize(tiny("llama", tie_word_embeddings=True), "rtn", dynamic=dynamic, lm_head=True)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert model.model.layers[1].self_attn.v_proj.spec == QuantSpec(8, 16)
    assert isinstance(model.lm_head, QuantLinear) and type(model.model.embed_tokens) is nn.Embedding
    assert model.config.tie_word_embeddings is False
    chosen = quantize(tiny("llama"), "hqq", modules_in_block_to_quantize=[["self_attn.o_proj"], ["mlp.up_proj"]])
    names = {n.split(".", 3)[3] for n, m in chosen.named_modules() if isinstance(m, QuantLinear)}
    assert names == {"self_attn.o_proj", "mlp.up_proj"}
    with pytest.raises(WalkError, match=r"no linear layer of model.layers is left"):
        quantize(tiny("llama"), "rtn", dynamic={"-:.*": {}})


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_an_output_embedding_that_a_rule_excludes(method: str, tiny: Tiny, windows: list[list[int]]) -> None:
    data = {"dataset": windows[:1], "samples": 1, "seqlen": 32} if method == "gptq" else {}
    with pytest.raises(WalkError, match=r"lm_head=True and dynamic\['-:lm_head'\], .* contradict each other; drop one"):
        quantize(tiny("llama"), method, dynamic={"-:lm_head": {}}, lm_head=True, **data)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_rules_without_effect_are_warned_of(
    method: str, tiny: Tiny, windows: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    data = {"dataset": windows[:1], "samples": 1, "seqlen": 32} if method == "gptq" else {}
    dynamic: dict[str, Any] = {
        "down_proj": {"bits": 8}, r".*up_proj": {"bit": 8, "mse": 2.0}, "-:lm_head": {"note": 1}, r"-:.*o_proj": {},
    }  # fmt: skip
    quantize(tiny("llama"), method, dynamic=dynamic, **data)
    unmatched, ignored = [r.getMessage() for r in caplog.records if "dynamic[" in r.getMessage()]
    assert "dynamic['down_proj'] has no effect: it matches no linear layer of model.layers, nor" in unmatched
    assert "dynamic['.*up_proj'] has fields that are ignored: bit, mse. Read are bits, group_size" in ignored
    caplog.clear()
    quantize(tiny("llama"), "rtn", dynamic={r"+:.*v_proj": {"bits": 8, "group_size": 16}})
    quantize(tiny("mixtral"), "rtn", dynamic={r"-:.*experts\.0\.w1": {}})
    quantize(tiny("mixtral"), "rtn", dynamic={r"-:.*\.experts": {}})  # they stay fused
    assert "dynamic[" not in caplog.text


def test_an_offloaded_model(tiny: Tiny, tmp_path: Path) -> None:
    expected = quantize(tiny("llama"), "rtn")(input_ids=IDS).logits
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    config = GPTQConfig(bits=4, group_size=32, method="rtn")
    model = AutoModelForCausalLM.from_pretrained(
        tiny("llama"), quantization_config=config, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path
    )
    assert model.model.layers[1].mlp.up_proj.qweight.device.type == "meta"
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["rtn", "hqq"])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_low_memory_gives_the_same(method: str, kind: str, tiny: Tiny, tmp_path: Path) -> None:
    """Blocks that are read one by one, and layers that stay on disk."""
    kept, found = {}, {}
    for low_memory, into in ((False, kept), (True, found)):
        folder = tmp_path / str(low_memory)
        offload = {"offload_folder": str(tmp_path / "offload")} if low_memory and kind == "mixtral" else {}
        config = GPTQConfig(bits=4, group_size=32, method=method, low_memory=low_memory)
        model = AutoModelForCausalLM.from_pretrained(
            tiny(kind), quantization_config=config, dtype=torch.float32, **offload
        )
        layer = next(m for m in model.modules() if isinstance(m, QuantLinear))
        assert layer.qweight.is_meta == low_memory
        model.save_pretrained(folder)
        into.update(load_file(folder / "model.safetensors"))
    assert found.keys() == kept.keys() and all(torch.equal(found[name], value) for name, value in kept.items())


def test_errors_name_the_layer(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SolveError, match=r"model\.layers\.1\.mlp\.up_proj: the weight is not finite"):
        quantize(tmp_path / "m", "rtn")


def test_data_that_are_not_used_are_said_to_be(
    tiny: Tiny, windows: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    quantize(tiny("llama"), "rtn", dataset=windows)
    assert "method='rtn' needs no calibration data; dataset is not used" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "awq"}, "method='awq' is not supported; use one of gptq, rtn, hqq"),
        ({"method": "rtn", "desc_act": True}, "desc_act=True orders groups by what calibration data show"),
        ({"method": "hqq", "dynamic": {"x": {"desc_act": True}}}, "method='hqq' uses none; set desc_act=False"),
        ({"packing": "tight"}, "packing='tight' is not supported; use one of auto, concat, each"),
    ],
)
def test_impossible_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTQConfig(**fields)


def test_another_writers_method_is_not_ours() -> None:
    assert GPTQConfig.from_dict({"quant_method": "gptq", "bits": 4, "method": "gptq_v2"}).method == "gptq"
    assert (GPTQConfig(packing=True).packing, GPTQConfig(packing=False).packing) == ("concat", "each")
