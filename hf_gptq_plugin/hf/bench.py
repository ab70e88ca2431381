"""Tokens per second of a model in Transformers: reading a prompt, and writing token by token."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from .. import native, native_cuda
from ..nn.linear import QuantLinear


@dataclass(frozen=True)
class Speed:
    """What was measured; times are medians over `repeats` after one that does not count.

    Args:
        prefill: prompt tokens read per second.
        decode: tokens written per second, of all sequences of the batch together.
        first: seconds from a prompt to its first token.
        prompt, new, batch, repeats: tokens per prompt, tokens written, sequences at once, measurements.
        weights: bytes of all parameters in memory.
        machine: what it was measured on.
    """

    prefill: float
    decode: float
    first: float
    prompt: int
    new: int
    batch: int
    repeats: int
    weights: int
    machine: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def speed(
    model: Any, prompt: int = 128, new: int = 32, batch: int = 1, repeats: int = 3, progress: bool = True
) -> Speed:
    """Time a causal language model on random token ids, greedily, with its cache.

    Args:
        model: of Transformers, on its device.
        prompt: tokens per prompt.
        new: tokens to write after the first, per sequence.
        batch: sequences at once.
        repeats: measurements.
        progress: show a bar.

    Raises:
        ValueError: a number below 1, or more tokens than the model has positions.
    """
    for name, value in (("prompt", prompt), ("new", new), ("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and prompt + new > most:
        raise ValueError(f"prompt={prompt} and new={new} are more than the {most} positions that the model has")
    model.eval()
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    # Transformers renamed it in 5.24.
    cache = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    firsts, steps = [], []
    for number in tqdm(range(repeats + 1), desc="Timing", unit="run", disable=not progress):
        start = _now(model)
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        middle = _now(model)
        for _ in range(new):
            out = model(input_ids=token, use_cache=True, **{cache: out[cache]})
            token = out.logits[:, -1:].argmax(-1)
        end = _now(model)
        if number:
            firsts.append(middle - start)
            steps.append(end - middle)
    first, step = statistics.median(firsts), statistics.median(steps)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Speed(
        batch * prompt / first, batch * new / step, first, prompt, new, batch, repeats, weights, machine(model)
    )


def machine(model: Any) -> dict[str, str]:
    """What a measurement depends on besides the model."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    status = native.status()
    if model.device.type == "cuda":
        kernel = "PyTorch" if native_cuda.problem(model.device) else "CUDA"
    else:
        kernel = status.isa if status.state == "loaded" else "PyTorch"
        kernel += ", int8 activations" if status.activations == "int8" else ""
    return {
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine(),
        "threads": str(torch.get_num_threads()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "kernel": str(kernel) if layers else "none",
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _now(model: Any) -> float:
    wait: Callable[[], None] = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    return time.perf_counter()
