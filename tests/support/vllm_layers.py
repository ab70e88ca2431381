"""Layers of vLLM made, loaded tensor by tensor and run without an engine, on one rank or a simulated one of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import references
import torch

from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import QuantSpec

K = 80  # with groups of 32 the last one is ragged


@contextmanager
def tensor_parallel(rank: int = 0, size: int = 1) -> Iterator[None]:
    """Layers made inside believe to be rank `rank` of `size`."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("layers.linear", "layers.vocab_parallel_embedding", "parameter"):
            path = f"vllm.model_executor.{module}.get_tensor_model_parallel"
            patch.setattr(f"{path}_rank", lambda: rank)
            patch.setattr(f"{path}_world_size", lambda: size)
        yield


def random_weight(
    out_features: int, spec: QuantSpec, in_features: int = K, group: torch.Tensor | None = None, seed: int = 0
) -> QuantizedWeight:
    """Codes that lie evenly around the zeros, as those of real weights do, so that the format shows."""
    rng = torch.Generator().manual_seed(seed)
    groups, middle = spec.groups(in_features), 2 ** (spec.bits - 1)
    if group is None:
        group = natural_groups(in_features, spec.group_size)
        if spec.desc_act:
            group = group[torch.randperm(in_features, generator=rng)]
    lowest = middle if spec.sym else middle - 1 - spec.maxq // 8
    zeros = torch.randint(lowest, middle + 1, (groups, out_features), generator=rng, dtype=torch.int32)
    reach = max(1, spec.maxq // 4)
    steps = torch.randint(-reach, reach + 1, (out_features // 2, in_features), generator=rng)
    codes = torch.cat((steps, -steps)) + zeros.T[:, group.long()]
    scales = torch.rand(groups, out_features, generator=rng).add(0.5).mul(0.02).half()
    return QuantizedWeight(codes.to(torch.uint8), scales, zeros, group, spec)


def dense(weights: list[QuantizedWeight]) -> torch.Tensor:
    """float64 `[N, K]` of all weights below each other."""
    parts = [references.dequantize(*(t.numpy() for t in (w.codes, w.scales, w.zeros, w.group))) for w in weights]
    return torch.from_numpy(np.concatenate(parts))


def make(kind: Callable[..., Any], spec: QuantSpec, *sizes: Any, bias: bool = False, **arguments: Any) -> Any:
    """A layer of vLLM named "layer", quantized by the plugin."""
    from vllm_plugin.config import HfGptqConfig

    config = HfGptqConfig.from_config(
        {
            "quant_method": "gptq", "bits": spec.bits, "group_size": spec.group_size, "sym": spec.sym,
            "desc_act": spec.desc_act, "checkpoint_format": spec.checkpoint_format, "lm_head": True,
        }
    )  # fmt: skip
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return kind(*sizes, bias=bias, params_dtype=torch.float32, quant_config=config, **arguments)


def load(layer: Any, weight: QuantizedWeight, *shard: Any, leave_out: tuple[str, ...] = ()) -> None:
    for leaf, tensor in weight.pack().items():
        if leaf not in leave_out:
            parameter = getattr(layer, leaf)
            parameter.weight_loader(parameter, tensor, *shard)


def finish(layer: Any) -> Any:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def decoded(layer: Any) -> torch.Tensor:
    """The layer's weight `[N, K]`, seen through its output."""
    return layer.quant_method.apply(layer, torch.eye(layer.g_idx.numel())).T.double()
