"""One checkpoint and its adapters give the same numbers in vLLM and in Transformers.

Both run in float32 on the same op, so what differs is the rest of the model: 1e-3 in log-probability is asked
for, about 1e-6 is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.version", reason="these tests need vLLM")

# vLLM, and what it imports, warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-3
STOCK = dict(bits=4, group_size=32)  # what vLLM's own method takes too


@pytest.fixture
def checkpoint(quantized: Callable[..., Path]) -> Path:
    return quantized(**STOCK)


@pytest.fixture
def lora_engine(checkpoint: Path, engines: Any) -> Any:
    # One slot more than adapters: on a CPU, vLLM 0.32 gives a request without an adapter what lies in the
    # last slot, when another of its batch has one (vllm-project/vllm#48421).
    return engines(checkpoint, enable_lora=True, max_loras=3, max_lora_rank=8)


def test_base_matches_transformers(
    checkpoint: Path, lora_engine: Any, reference: Any, prompts: list[list[int]], same: Callable[..., None]
) -> None:
    transformers, continuations = reference(checkpoint), lora_engine.greedy(prompts)
    same(transformers, prompts, continuations)
    for prompt, continuation in zip(prompts, continuations, strict=True):
        assert transformers.logprobs(prompt, continuation.tokens).argmax(-1).tolist() == continuation.tokens


def test_two_adapters_in_one_batch_match_transformers(
    checkpoint: Path,
    adapter: Callable[..., Path],
    lora_engine: Any,
    reference: Any,
    prompts: list[list[int]],
    same: Callable[..., None],
) -> None:
    from vllm.lora.request import LoRARequest

    paths = [adapter(checkpoint, seed=1), adapter(checkpoint, seed=2), None]
    models = [reference(checkpoint, path) for path in paths]
    requests = [LoRARequest(f"a{i}", i, str(path)) if path else None for i, path in enumerate(paths, start=1)]
    prompt = prompts[0]
    together = lora_engine.greedy([prompt] * 3, requests)
    for model, continuation in zip(models, together, strict=True):
        same(model, [prompt], [continuation])
    # The adapters must matter, or the comparison shows nothing.
    first, second, base = (model.logprobs(prompt, together[0].tokens) for model in models)
    assert (first - base).abs().max() > 100 * TOLERANCE
    assert (first - second).abs().max() > 100 * TOLERANCE
    # One alone takes another way through vLLM's batch.
    same(models[1], [prompt], lora_engine.greedy([prompt], requests[1:2]))


def test_a_row_does_not_depend_on_its_batch(lora_engine: Any, prompts: list[list[int]]) -> None:
    together = lora_engine.greedy(prompts)
    for prompt, batched in zip(prompts, together, strict=True):
        (alone,) = lora_engine.greedy([prompt])
        assert alone.tokens == batched.tokens
        # Attention and the dense head may round otherwise in another batch, the quantized layers do not.
        for a, b in zip(alone.logprobs, batched.logprobs, strict=True):
            assert a == pytest.approx(b, abs=1e-5)


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("kind", "fields", "targets"),
    [
        pytest.param(
            "llama", dict(bits=3, group_size=48, sym=False, desc_act=True), LLAMA,
            id="3 bit, asymmetric, act-order, ragged last group",
        ),
        pytest.param(
            "llama", dict(bits=2, group_size=32, sym=False, lm_head=True, dynamic={r"+:.*\.1\.mlp\..*": {"bits": 8}}),
            (*LLAMA, "lm_head"), id="2 bit, some of 8, quantized head with an adapter, padded vocabulary",
        ),
        pytest.param(
            "phi3", dict(bits=4, group_size=16), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
            id="fused on disk, tied embeddings, groups of 16",
        ),
    ],
)  # fmt: skip
def test_what_vllm_itself_refuses_matches_transformers(
    kind: str,
    fields: dict[str, Any],
    targets: tuple[str, ...],
    quantized: Callable[..., Path],
    adapter: Callable[..., Path],
    engines: Any,
    reference: Any,
    prompts: list[list[int]],
    same: Callable[..., None],
) -> None:
    from vllm.lora.request import LoRARequest

    checkpoint = quantized(kind, **fields)
    tuned = [adapter(checkpoint, seed=seed, targets=targets) for seed in (1, 2)]
    llm = engines(checkpoint, quantization=None, enable_lora=True, max_loras=3, max_lora_rank=8)
    assert llm.method == "hf_gptq"  # the plugin offers itself
    same(reference(checkpoint), prompts, llm.greedy(prompts))
    requests = [LoRARequest(f"a{i}", i, str(path)) for i, path in enumerate(tuned, start=1)]
    prompt = prompts[0]
    together = llm.greedy([prompt] * 3, [*requests, None])
    for path, continuation in zip([*tuned, None], together, strict=True):
        same(reference(checkpoint, path), [prompt], [continuation])
    assert len({tuple(continuation.tokens) for continuation in together}) == 3  # the adapters matter


def test_two_ranks_match_transformers(
    quantized: Callable[..., Path],
    engines: Any,
    reference: Any,
    prompts: list[list[int]],
    same: Callable[..., None],
) -> None:
    """Tensor parallel: two processes, act-order split along its input, quantized experts, a ragged last group."""
    checkpoint = quantized(
        "qwen3_moe", bits=3, group_size=48, sym=False, desc_act=True, dynamic={r"+:.*down_proj": {"bits": 8}}
    )
    llm = engines(checkpoint, tensor_parallel_size=2)
    same(reference(checkpoint), prompts, llm.greedy(prompts))
    engines.end()


def test_vllm_serves_our_checkpoint_without_us(
    checkpoint: Path, engines: Any, reference: Any, prompts: list[list[int]], same: Callable[..., None]
) -> None:
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM's own 4-bit kernel is not in its library for this processor (it needs AVX-512)")
    llm = engines(checkpoint, quantization="gptq", dtype="bfloat16")
    assert llm.method == "auto_gptq"
    continuations = llm.greedy(prompts)
    exact, rounded = reference(checkpoint), reference(checkpoint, dtype=torch.bfloat16)
    # Theirs and ours are two roundings of one model to bfloat16, each about as far from it as the other.
    error = max(
        float((rounded.logprobs(p, c.tokens) - exact.logprobs(p, c.tokens)).abs().max())
        for p, c in zip(prompts, continuations, strict=True)
    )
    same(exact, prompts, continuations, atol=4 * error)
