"""Use an installed wheel: quantize a tiny model, save it, load it again. Run by `.ci/wheel` outside of the sources."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_gptq_plugin
from hf_gptq_plugin import GPTQConfig, native


def main() -> None:
    """Raises where anything is not as it must be."""
    compilers = [name for name in ("cc", "c++", "gcc", "g++", "clang", "clang++") if shutil.which(name)]
    assert not compilers, f"this is meant to run without a compiler, and there is {compilers}"
    status = native.status()
    assert status.state == "loaded", status
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=128,
    )  # fmt: skip
    windows = torch.randint(3, 256, (8, 32)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        dense, out = Path(folder, "dense"), Path(folder, "gptq")
        AutoModelForCausalLM.from_config(config).save_pretrained(dense)
        quantized = AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=GPTQConfig(bits=4, group_size=32, dataset=windows), dtype=torch.float32
        )
        ids = torch.arange(3, 35)[None]
        logits = quantized(input_ids=ids).logits
        quantized.save_pretrained(out)
        again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert torch.equal(again(input_ids=ids).logits, logits), "the reloaded checkpoint gives other logits"
    layers = len(quantized.hf_quantizer.reports)
    print(f"hf-gptq-plugin {hf_gptq_plugin.__version__} ({status.isa}): {layers} layers quantized, saved and reloaded.")


if __name__ == "__main__":
    main()
