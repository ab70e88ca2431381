"""One checkpoint and its adapters give the same numbers in vLLM and in Transformers.

Mostly both run in float32 on the same op, so what differs is the rest of the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm.version", reason="these tests need vLLM")

# vLLM, and what it imports, warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

STOCK = dict(bits=4, group_size=32)  # what vLLM's own method takes too


@pytest.fixture
def checkpoint(quantized: Callable[..., Path]) -> Path:
    return quantized(**STOCK)


@pytest.fixture
def adapters(checkpoint: Path, adapter: Callable[..., Path]) -> list[Path]:
    return [adapter(checkpoint, seed=seed) for seed in (1, 2)]


@pytest.fixture
def engine(checkpoint: Path, adapters: list[Path], parity: Callable[..., Any]) -> Any:
    return parity(checkpoint, *adapters)


def test_adapters_in_one_batch_match_transformers(
    checkpoint: Path, adapters: list[Path], engine: Any, reference: Any, prompts: list[list[int]]
) -> None:
    """`parity` has compared log-probabilities; these are the tokens, and one adapter alone, which takes another way
    through vLLM's batch."""
    for path in (*adapters, None):
        for prompt in prompts:
            (said,) = engine.greedy([prompt], [path])
            assert reference(checkpoint, path).logprobs(prompt, said.tokens).argmax(-1).tolist() == said.tokens


def test_a_row_does_not_depend_on_its_batch(engine: Any, prompts: list[list[int]]) -> None:
    together = engine.greedy(prompts)
    for prompt, batched in zip(prompts, together, strict=True):
        (alone,) = engine.greedy([prompt])
        assert alone.tokens == batched.tokens
        # Attention and the dense head may round otherwise in another batch, the quantized layers do not.
        for a, b in zip(alone.logprobs, batched.logprobs, strict=True):
            assert a == pytest.approx(b, abs=1e-5)


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("kind", "fields", "targets"),
    [
        pytest.param(
            "llama", dict(bits=2, group_size=32, sym=False, lm_head=True, dynamic={r"+:.*\.1\.mlp\..*": {"bits": 8}}),
            (*LLAMA, "lm_head"), id="2 bit, some of 8, quantized head with an adapter, padded vocabulary",
        ),
        pytest.param(
            "llama", dict(bits=4, group_size=32, dynamic={r"+:.*\.(q|k|v)_proj": {"group_size": 64}}), LLAMA,
            id="a rule that names the parts of a fused layer",
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
    parity: Callable[..., Any],
) -> None:
    checkpoint = quantized(kind, **fields)
    engine = parity(checkpoint, *(adapter(checkpoint, seed=s, targets=targets) for s in (1, 2)), quantization=None)
    assert engine.method == "hf_gptq"  # the plugin offers itself


def test_two_ranks_match_transformers(quantized: Callable[..., Path], parity: Callable[..., Any], engines: Any) -> None:
    """Tensor parallel: two processes, act-order split along its input, quantized experts, a ragged last group."""
    checkpoint = quantized(
        "qwen3_moe", bits=3, group_size=48, sym=False, desc_act=True, dynamic={r"+:.*down_proj": {"bits": 8}}
    )
    parity(checkpoint, tensor_parallel_size=2)
    engines.end()


def g_idx_out_of_range(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.g_idx"][5] = 7


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.k_proj.scales"
    tensors[name] = tensors[name][:, :-1].contiguous()


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.self_attn.o_proj.qzeros"]


def without_a_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def without_a_head(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_norm, r"not initialized from checkpoint: \{'model\.norm\.weight'\}"),
        (without_a_head, r"not initialized from checkpoint: \{'lm_head\.weight'\}"),
        (g_idx_out_of_range, r"layers\.1\.mlp\.down_proj\.g_idx holds group 7; with 7 groups"),
        (wrong_shape, r"layers\.0\.self_attn\.k_proj\.scales has shape \(4, 63\)"),
        (missing, r"layers\.1\.self_attn\.o_proj\.qzeros is missing"),
    ],
)
def test_damaged_checkpoints_are_not_served(
    damage: Callable[[dict[str, torch.Tensor]], None], message: str, checkpoint: Path, engines: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        engines(folder)


ROUNDINGS = 2 * 17 + 3  # of activations on the way to a logit: in each of two layers, and at the end


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_cost_the_same_in_both_stacks(
    dtype: torch.dtype,
    quantized: Callable[..., Path],
    adapter: Callable[..., Path],
    engines: Any,
    reference: Any,
    prompts: list[list[int]],
) -> None:
    """Both round after every step, but at different steps, so neither is the other's truth: that is float32.

    A rounding is off by at most u, relatively, and by u / sqrt(3) in the root mean square; independent ones add up as
    squares. So log-probabilities of spread s end about s u sqrt(ROUNDINGS / 3) off, whoever computes; twice that is
    allowed, and vLLM may not be much further off than Transformers, nor the two from each other than two independent
    errors.
    """
    checkpoint = quantized(bits=3, group_size=48, sym=False, desc_act=True)
    tuned = adapter(checkpoint, seed=1)
    llm = engines(checkpoint, dtype=str(dtype).removeprefix("torch."), enable_lora=True, max_loras=2, max_lora_rank=8)
    for path in (None, tuned):
        exact, rounded = reference(checkpoint, path), reference(checkpoint, path, dtype)
        spread, off_there, off_here, apart = [], [], [], []
        for prompt, said in zip(prompts, llm.greedy(prompts, [path] * len(prompts)), strict=True):
            truth, there = exact.logprobs(prompt, said.tokens), rounded.logprobs(prompt, said.tokens)
            spread.append(truth.std())
            for place, a, b in zip(said.logprobs, truth, there, strict=True):
                here = torch.tensor(list(place.values()), dtype=torch.float64)
                off_there.append(b[list(place)] - a[list(place)])
                off_here.append(here - a[list(place)])
                apart.append(here - b[list(place)])
        expected = rms(spread) * torch.finfo(dtype).eps / 2 * (ROUNDINGS / 3) ** 0.5
        assert rms(off_here) < 2 * expected
        assert rms(off_here) < 1.5 * rms(off_there)
        assert rms(apart) < 1.5 * 2**0.5 * rms(off_there)


def rms(values: list[torch.Tensor]) -> float:
    """Root of the mean square."""
    return float(torch.stack(values).pow(2).mean().sqrt())
