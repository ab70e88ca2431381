"""Adapters that learned on a quantized model in Transformers say the same in vLLM, over every variant of the format.

A model has a layer for each variant, so two engines run them all; what a layer's adapter does must be seen in the
result, or its agreement would show nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_gptq_plugin.format.spec import BITS

pytest.importorskip("vllm.version", reason="these tests need vLLM")

# vLLM, and what it imports, warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-3
THIN = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=16, num_attention_heads=2, num_key_value_heads=1,
    head_dim=32, max_position_embeddings=128, initializer_range=0.1,
)  # fmt: skip
GROUPS = (16, 32, 48, -1, 20)  # of 64 and 96 inputs: whole, and last groups of 16 and 4; five, so that all meet all
VARIANTS = [
    dict(bits=bits, sym=sym, desc_act=desc_act, group_size=GROUPS[place % len(GROUPS)])
    for place, (bits, sym, desc_act) in enumerate(product(BITS, (True, False), (False, True)))
]


@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
def test_every_variant_with_trained_adapters_matches_transformers(
    fmt: str,
    quantized: Callable[..., Path],
    adapter: Callable[..., Path],
    parity: Callable[..., Any],
    reference: Any,
    prompts: list[list[int]],
) -> None:
    rules = {rf"+:model\.layers\.{place}\..*": variant for place, variant in enumerate(VARIANTS)}
    checkpoint = quantized(shape=THIN, bits=4, group_size=32, format=fmt, dynamic=rules)
    adapters = [adapter(checkpoint, seed=seed) for seed in (1, 2)]
    engine = parity(checkpoint, *adapters, quantization=None)
    assert engine.method == "hf_gptq"  # the plugin offers itself
    for tuned in adapters:
        _assert_every_layer_matters(reference(checkpoint, tuned), len(VARIANTS), prompts[0])


def _assert_every_layer_matters(tuned: Any, layers: int, prompt: list[int]) -> None:
    """A layer whose adapter was lost would be seen."""
    whole = tuned.logprobs(prompt[:-8], prompt[-8:])
    for place in range(layers):
        learned = [p for name, p in tuned.model.named_parameters() if f".layers.{place}." in name and "lora_B" in name]
        assert len(learned) == 7
        kept = [p.detach().clone() for p in learned]
        with torch.no_grad():
            for p in learned:
                p.zero_()
            without = tuned.logprobs(prompt[:-8], prompt[-8:])
            for p, values in zip(learned, kept, strict=True):
                p.copy_(values)
        assert (without - whole).abs().max() > 10 * TOLERANCE, place
