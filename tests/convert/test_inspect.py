"""Checkpoints of other kinds, and damage that no header shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.convert.inspect import inspect, patterns
from hf_gptq_plugin.convert.source import open_source
from hf_gptq_plugin.convert.stream import convert
from hf_gptq_plugin.format.spec import CheckpointError

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def quantized(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "q"
    config = GPTQConfig(bits=4, group_size=32, method="rtn", sym=False)
    model = AutoModelForCausalLM.from_pretrained(
        tiny("llama", num_hidden_layers=4), quantization_config=config, dtype=torch.float16
    )
    model.save_pretrained(folder)
    return folder


def written(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_patterns() -> None:
    names = ["model.layers.0.mlp.up", "model.layers.12.mlp.up", "lm_head", "a.experts.3.w1", "h1.x"]
    assert patterns(names) == ["model.layers.*.mlp.up", "lm_head", "a.experts.*.w1", "h1.x"]


def test_bitsandbytes(tmp_path: Path) -> None:
    four = {
        "a.weight": torch.zeros(64 * 128 // 2, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(128),
        "a.weight.quant_map": torch.zeros(16),
        "a.weight.quant_state.bitsandbytes__nf4": torch.zeros(90, dtype=torch.uint8),
    }  # fmt: skip
    eight = {
        "b.weight": torch.zeros(64, 32, dtype=torch.int8), "b.SCB": torch.ones(64),
        "b.weight_format": torch.zeros((), dtype=torch.uint8),
    }  # fmt: skip
    config = {"architectures": ["X"], "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    tensors = {**four, **eight, "norm.weight": torch.ones(128, dtype=torch.float16)}
    found = inspect(written(tmp_path / "bnb", config, tensors))
    assert found.layout == "bitsandbytes" and found.problems == []
    assert found.modules == [
        {"modules": 1, "type": "nf4", "names": ["a"]}, {"modules": 1, "type": "int8", "names": ["b"]}
    ]  # fmt: skip
    assert found.parameters == 64 * 128 + 64 * 32 + 128
    assert found.bf16_bytes == 2 * (64 * 128 + 64 * 32) and found.dense_bytes == 256
    assert found.quantized_bytes == 4096 + 512 + 64 + 90 + 2048 + 256 + 1
    assert found.runs["hf_gptq_plugin"].startswith("no: bitsandbytes' grids")


def test_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package reads GGUF files")
    import numpy as np

    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    kinds = ("Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4")
    for number, kind in enumerate(kinds):
        raw = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[raw]
        writer.add_tensor(f"blk.{number}.x.weight", np.zeros((2, 512 // block * size), dtype=np.uint8), raw_dtype=raw)
    writer.add_tensor("output_norm.weight", np.ones(512, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = inspect(tmp_path / "m.gguf")
    assert (found.layout, found.architecture) == ("gguf", "llama")
    assert {kind["type"]: kind["modules"] for kind in found.modules} == dict.fromkeys((*kinds, "F32"), 1)
    assert found.parameters == 6 * 1024 + 512 and found.dense_bytes == 2048
    assert found.bf16_bytes == 2 * 6 * 1024
    # Bytes of a block of each type, by their definitions, for 1024 weights.
    blocks = [32 * 18, 32 * 34, 4 * 144, 4 * 210, 32 * 18, 32 * 17]
    assert found.quantized_bytes == sum(blocks)


def test_what_is_missing(quantized: Path, tmp_path: Path) -> None:
    def without(*prefixes: str) -> list[str]:
        source = shutil.copytree(quantized, tmp_path / "less")
        tensors = load_file(source / "model.safetensors")
        kept = {name: value for name, value in tensors.items() if not name.startswith(prefixes)}
        assert len(kept) < len(tensors)
        save_file(kept, source / "model.safetensors")
        found = inspect(source)
        assert set(found.runs.values()) == {"no: it is damaged, see below"}
        shutil.rmtree(source)
        return found.problems

    assert inspect(quantized).problems == []
    assert without("model.layers.2.") == ["model.layers has no block 2: the checkpoint is incomplete"]
    assert without("model.layers.3.") == ["model.layers has no block 3: the checkpoint is incomplete"]
    assert without("model.layers.1.mlp.up_proj") == [
        "model.layers.1 lacks mlp.up_proj, which the other blocks have"
    ]  # fmt: skip
    assert "mlp.up_proj.qzeros is missing" in without("model.layers.1.mlp.up_proj.qzeros")[0]


def changed(folder: Path, **fields: Any) -> Path:
    """`fields` put into quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_group_index_alone(quantized: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(quantized, tmp_path / "less"))
    tensors = load_file(source / "model.safetensors")
    for leaf in ("qweight", "qzeros", "scales"):
        del tensors[f"model.layers.1.mlp.up_proj.{leaf}"]
    save_file(tensors, source / "model.safetensors")
    (problem,) = inspect(source).problems
    assert problem.startswith("model.layers.1.mlp.up_proj.g_idx stands without its module's qweight")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        AutoModelForCausalLM.from_pretrained(source)


@pytest.mark.parametrize("method", ["GPTQ", None])
def test_other_spellings_of_the_method(quantized: Path, tmp_path: Path, method: str | None) -> None:
    """Read and told: Transformers has dense layers with random weights there, or an error."""
    source = changed(Path(shutil.copytree(quantized, tmp_path / "q")), quant_method=method)
    found = inspect(source)
    (problem,) = found.problems
    assert problem.startswith(f'quant_method={method!r} must be "gptq"') and found.layout == "gptq"
    assert found.runs["hf_gptq_plugin"].startswith("no")
    assert (found.runs["vLLM with this plugin"] == "yes") == (method == "GPTQ")  # vLLM asks for one
    convert(open_source(source), tmp_path / "out", "gptq")
    assert inspect(tmp_path / "out").problems == []
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(quantized / "model.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("method", [["gptq"], 4, {"a": 1}])
def test_a_method_that_is_no_string(quantized: Path, tmp_path: Path, method: Any) -> None:
    source = changed(Path(shutil.copytree(quantized, tmp_path / "q")), quant_method=method)
    (problem,) = inspect(source).problems
    assert problem == f'quant_method={method!r} must be a string, e.g. "gptq"'
    with pytest.raises(CheckpointError, match="must be a string"):
        open_source(source)


@pytest.mark.parametrize("layout", ["awq", "compressed-tensors"])
def test_values_of_other_layouts(quantized: Path, tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "other"
    convert(open_source(quantized), folder, layout)
    assert inspect(folder).problems == []
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in sorted(tensors) if n.endswith(("scales", "weight_scale")))
    tensors[name][1, 2] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    (problem,) = inspect(folder).problems
    assert name.rpartition(".")[0] in problem and "is nan" in problem
    assert inspect(folder, values=False).problems == []
