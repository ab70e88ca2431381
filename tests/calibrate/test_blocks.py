"""What calibrating a block leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_gptq_plugin import GPTQConfig
from hf_gptq_plugin.calibrate import blocks
from hf_gptq_plugin.nn.linear import QuantLinear


def test_a_bf16_model_calibrates_on_dequantized_weights_and_runs_on_codes(
    tiny: Callable[..., Path], windows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors, products = {}, []
    own = blocks._dense_product
    monkeypatch.setattr(blocks, "_dense_product", lambda *args: products.append(args) or own(*args))
    for fast in (True, False):
        products.clear()
        dtype = torch.bfloat16 if fast else torch.float32
        monkeypatch.setattr(blocks, "compute_dtype", lambda device, dtype=dtype: dtype)
        config = GPTQConfig(bits=4, group_size=32, dataset=windows, samples=len(windows))
        model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.bfloat16, quantization_config=config)
        layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
        assert len(layers) == 14 and not any("forward" in vars(m) for m in layers)
        assert bool(products) is fast
        errors[fast] = torch.tensor([report.solve.relative_error for report in model.hf_quantizer.reports])
    torch.testing.assert_close(errors[True], errors[False], rtol=0.1, atol=0)
