"""Other layouts, converted by the command line and served by the plugin; and ours, converted, by vLLM alone.

Weights begin as codes; their bytes in AWQ's and in compressed-tensors' layout are made here or by compressed-tensors
itself, and what is served must be the dense model of `(code - zero) * scale`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_layers import dense, random_weight

from hf_gptq_plugin.format.grid import QuantizedWeight
from hf_gptq_plugin.format.spec import QuantSpec

pytest.importorskip("vllm.version", reason="these tests need vLLM")

# vLLM, and what it imports, warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


def words(values: np.ndarray, bits: int) -> torch.Tensor:
    """int32 of the rows of `values`, the first in the lowest bits."""
    each = values.reshape(len(values), -1, 32 // bits).astype(np.uint32)
    packed = np.zeros(each.shape[:2], dtype=np.uint32)
    for place in range(32 // bits):
        packed |= each[:, :, place] << np.uint32(bits * place)
    return torch.from_numpy(packed.view(np.int32).copy())


def awq(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """AutoAWQ's "gemm": eight outputs in a word, in this order of its nibbles."""

    def mixed(values: torch.Tensor) -> torch.Tensor:
        eights = values.numpy().reshape(len(values), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return words(eights.reshape(values.shape), 4)

    return {"qweight": mixed(weight.codes.T), "qzeros": mixed(weight.zeros), "scales": weight.scales}


def pack_quantized(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """As llm-compressor writes it, packed by its library."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits = weight.spec.bits
    shifted = [(t.int() - 2 ** (bits - 1)).to(torch.int8).contiguous() for t in (weight.codes, weight.zeros.T)]
    return {
        "weight_packed": pack_to_int32(shifted[0], bits),
        "weight_zero_point": pack_to_int32(shifted[1], bits, packed_dim=0),
        "weight_scale": weight.scales.T.contiguous(),
        "weight_shape": torch.tensor(weight.codes.shape),
        "weight_g_idx": weight.group,
    }


AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": None,
}  # fmt: skip
PACK_QUANTIZED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "global_compression_ratio": None, "kv_cache_scheme": None, "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"], "input_activations": None, "output_activations": None,
            "weights": {
                "num_bits": 8, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32,
                "actorder": "group", "dynamic": False, "observer": "minmax", "observer_kwargs": {},
                "block_structure": None,
            },
        }
    },
}  # fmt: skip


def written(
    source: Path,
    folder: Path,
    spec: QuantSpec,
    pack: Callable[[QuantizedWeight], dict[str, torch.Tensor]],
    config: dict[str, Any],
) -> tuple[Path, Path]:
    """A checkpoint of random codes in the shape of the dense one in `source`, and the dense model that it means."""
    tensors = load_file(source / "model.safetensors")
    packed, plain = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module.endswith("_proj"):
            # q, k and v, and gate and up, have one order of groups: it comes from their common inputs.
            seed = sum(map(ord, module.rpartition(".")[0]))
            group = random_weight(2, spec, tensor.shape[1], seed=seed).group
            weight = random_weight(len(tensor), spec, tensor.shape[1], group, seed=sum(map(ord, module)))
            weight.scales.div_(spec.maxq / 15)  # weights of one size, whatever the bits
            del packed[name]
            packed |= {f"{module}.{leaf}": t.contiguous() for leaf, t in pack(weight).items()}
            plain[name] = dense([weight]).float()
    for place, content, quantization in (("packed", packed, config), ("plain", plain, None)):
        shutil.copytree(source, folder / place)
        save_file(content, folder / place / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((source / "config.json").read_text())
        settings |= {"quantization_config": quantization} if quantization else {}
        (folder / place / "config.json").write_text(json.dumps(settings))
    return folder / "packed", folder / "plain"


def convert(source: Path, target: Path, layout: str) -> Path:
    command = "import sys; from hf_gptq_cli import main; sys.argv[0] = 'hf-gptq'; main()"
    arguments = ["convert", str(source), str(target), "--to", layout]
    done = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


@pytest.mark.parametrize(
    ("spec", "pack", "config"),
    [
        pytest.param(QuantSpec(4, 32, sym=False), awq, AWQ, id="AWQ"),
        pytest.param(
            QuantSpec(8, 32, sym=False, desc_act=True), pack_quantized, PACK_QUANTIZED,
            id="compressed-tensors, 8 bit, act-order",
        ),
    ],
)  # fmt: skip
def test_other_layouts_are_served_after_conversion(
    spec: QuantSpec,
    pack: Callable[[QuantizedWeight], dict[str, torch.Tensor]],
    config: dict[str, Any],
    dense_llama: Path,
    parity: Callable[..., Any],
    tmp_path: Path,
) -> None:
    packed, plain = written(dense_llama, tmp_path, spec, pack, config)
    parity(convert(packed, tmp_path / "gptq", "gptq"), reference=plain)


def cpu_gemm_wna16(
    input: torch.Tensor,
    q_weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> torch.Tensor:
    """vLLM's op, which its library for AVX2 lacks, from the layout that its Python code prepares for it: for each 16
    outputs, a row of two words for each input."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    in_features = q_weight.shape[1] // 2
    codes = (q_weight.view(-1, in_features, 2, 1) >> shifts & 15).view(-1, in_features, 16)
    codes = codes.permute(1, 0, 2).reshape(in_features, -1)
    groups, out_features = scales.shape
    points = torch.full((groups, out_features), 8)
    if zeros is not None:
        points = (zeros.unsqueeze(-1) >> shifts & 15).view(groups, out_features)
    width = in_features // groups
    weight = (codes - points.repeat_interleave(width, 0)) * scales.repeat_interleave(width, 0)
    out = input @ weight.to(input.dtype)
    return out if bias is None else out + bias


@pytest.mark.parametrize(("layout", "method"), [("gptq", "auto_gptq"), ("compressed-tensors", "compressed-tensors")])
def test_vllm_serves_our_checkpoint_without_us(
    layout: str,
    method: str,
    quantized: Callable[..., Path],
    engines: Any,
    parity: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it is, and as compressed-tensors with zero points. Where vLLM's library has no 4-bit product, everything but
    that product is vLLM's in the latter."""
    from vllm import _custom_ops

    has_kernel = hasattr(torch.ops._C, "cpu_gemm_wna16")
    if layout == "gptq" and not has_kernel:
        pytest.skip("vLLM's own 4-bit kernel is not in its library for this processor (it needs AVX-512)")
    checkpoint = quantized(bits=4, group_size=32, sym=layout == "gptq")
    served = checkpoint if layout == "gptq" else convert(checkpoint, tmp_path / "converted", layout)
    arguments = {"quantization": layout}
    if has_kernel:
        arguments["dtype"] = "bfloat16"
    else:
        monkeypatch.setattr(_custom_ops, "cpu_gemm_wna16", cpu_gemm_wna16)
    assert parity(served, reference=checkpoint, **arguments).method == method
    engines.end()
