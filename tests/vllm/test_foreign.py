"""Checkpoints that others wrote, or as they write them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_gptq_plugin.format.packing import pack_stream, unpack_stream
from hf_gptq_plugin.format.spec import QuantSpec

pytest.importorskip("vllm.version", reason="these tests need vLLM")

# vLLM, and what it imports, warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


def as_autogptq_wrote_it(source: Path, target: Path) -> Path:
    """Of a 4-bit symmetric checkpoint without act-order: no quantization_config in config.json, an older
    quantize_config.json, weights under AutoGPTQ's file name, no g_idx, a bias of zeros on every layer, and zeros stored
    as they are though nothing says v2."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config.pop("quantization_config")
    (target / "config.json").write_text(json.dumps(config))
    (target / "quantize_config.json").write_text(
        json.dumps(
            {
                "bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "static_groups": False,
                "sym": True, "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model",
            }
        )
    )  # fmt: skip
    tensors = load_file(target / "model.safetensors")
    for name in list(tensors):
        module, _, leaf = name.rpartition(".")
        if leaf == "g_idx":
            del tensors[name]
        elif leaf == "qzeros":
            columns = tensors[f"{module}.scales"].shape[1]
            tensors[name] = pack_stream(unpack_stream(tensors[name], 4, columns) + 1, 4)
        elif leaf == "scales":
            tensors[f"{module}.bias"] = torch.zeros(tensors[name].shape[1], dtype=torch.float16)
    (target / "model.safetensors").unlink()
    save_file(tensors, target / "gptq_model-4bit-32g.safetensors", metadata={"format": "pt"})
    return target


def test_as_autogptq_wrote_it(quantized: Callable[..., Path], parity: Callable[..., Any], tmp_path: Path) -> None:
    original = quantized(bits=4, group_size=32)
    parity(as_autogptq_wrote_it(original, tmp_path / "autogptq"), reference=original)


COMMON = {"bits": 4, "group_size": 128, "desc_act": True, "sym": False, "checkpoint_format": "gptq_v2"}
OTHERS: dict[str, dict[str, Any]] = {
    "gptqmodel": {
        "lm_head": False, "quant_method": "gptq", "pack_dtype": "int32", "dynamic": None,
        "meta": {"quantizer": ["gptqmodel:2.2.0"], "damp_percent": 0.05, "static_groups": False},
    },
    "optimum": {
        "quant_method": "gptq", "use_cuda_fp16": True, "backend": "auto", "batch_size": 1, "damp_percent": 0.1,
        "block_name_to_quantize": "model.layers", "cache_block_outputs": True, "dataset": "wikitext2",
        "exllama_config": {"version": 1}, "model_seqlen": 2048, "pad_token_id": None, "tokenizer": None,
        "module_name_preceding_first_block": ["model.embed_tokens"], "modules_in_block_to_quantize": None,
        "true_sequential": True, "max_input_length": None, "meta": {"quantizer": ["optimum:1.23.3", "auto_gptq:0.7.1"]},
    },
    "AutoGPTQ": {
        "is_marlin_format": False, "awq_gemm": False, "damp_percent": 0.01, "static_groups": False,
        "true_sequential": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("writer", OTHERS)
def test_fields_that_others_write(writer: str) -> None:
    from vllm_plugin.config import HfGptqConfig

    made = HfGptqConfig.from_config({**COMMON, **OTHERS[writer]})
    assert made.checkpoint.spec == QuantSpec(4, 128, False, True, "gptq_v2")


GPTQMODEL = """
import sys
import torch
from gptqmodel import GPTQModel, QuantizeConfig

model = GPTQModel.load(sys.argv[1], QuantizeConfig(bits=4, group_size=32, desc_act=True), device="cpu")
rng = torch.Generator().manual_seed(1)
windows = [torch.randint(3, 256, (32,), generator=rng).tolist() for _ in range(4)]
model.quantize([{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows], batch_size=1)
model.save(sys.argv[2])
"""


def test_act_order_by_gptqmodel_has_transformers_perplexity(
    dense_llama: Path,
    engines: Any,
    parity: Callable[..., Any],
    reference: Any,
    prompts: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if importlib.util.find_spec("gptqmodel") is None:
        pytest.skip("gptqmodel is not installed; it is a peer, and no part of the test extra")
    engines.end()
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    # In a process of its own: it replaces parts of Transformers when it is imported.
    command = [sys.executable, "-c", GPTQMODEL, str(dense_llama), str(tmp_path / "made")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr[-3000:]
    config = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert config["desc_act"] is True
    llm = parity(tmp_path / "made", quantization=None)
    assert llm.method == "hf_gptq"
    expected = reference(tmp_path / "made").perplexity(prompts)
    assert llm.perplexity(prompts) == pytest.approx(expected, rel=1e-4)
