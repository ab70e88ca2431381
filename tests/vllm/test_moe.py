"""Mixtures of experts whose experts are quantized, in vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.version", reason="these tests need vLLM")

# vLLM, and what it imports, warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        pytest.param("mixtral", dict(bits=4, group_size=32), id="Mixtral, 4 bit"),
        pytest.param(
            "qwen3_moe",
            dict(bits=3, group_size=48, sym=False, desc_act=True, dynamic={r"+:.*down_proj": {"bits": 8}}),
            id="Qwen3, 3 bit and 8, act-order, asymmetric, ragged last group",
        ),
    ],
)
def test_quantized_experts_match_transformers(
    kind: str,
    fields: dict[str, Any],
    quantized: Callable[..., Path],
    engines: Any,
    reference: Any,
    prompts: list[list[int]],
    same: Callable[..., None],
) -> None:
    checkpoint = quantized(kind, **fields)
    llm = engines(checkpoint)
    same(reference(checkpoint), prompts, llm.greedy(prompts))
