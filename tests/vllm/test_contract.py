"""What the plugin relies on in vLLM. A failure here means that vLLM has changed, and says where."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from vllm_server import vllm_version

pytest.importorskip("vllm.version", reason="these tests need vLLM")

# vLLM, and what it imports, warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

# What vLLM calls or asks, by class of the plugin.
HOOKS = {
    "HfGptqConfig": (
        "get_name", "get_supported_act_dtypes", "get_min_capability", "get_config_filenames", "from_config",
        "override_quantization_method", "get_checkpoint_weight_mapper", "maybe_update_config", "apply_vllm_mapper",
        "get_quant_method",
    ),
    "HfGptqLinearMethod": ("create_weights", "process_weights_after_loading", "apply", "tie_weights"),
    "HfGptqMoEMethod": (
        "create_weights", "process_weights_after_loading", "apply", "get_fused_moe_quant_config",
    ),
}  # fmt: skip


def plugin_classes() -> dict[str, type]:
    from vllm_plugin import config, linear, moe

    return {kind.__name__: kind for kind in (config.HfGptqConfig, linear.HfGptqLinearMethod, moe.HfGptqMoEMethod)}


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", HOOKS)
def test_vllm_calls_what_the_plugin_defines(name: str) -> None:
    """With the arguments that the plugin takes."""
    kind = plugin_classes()[name]
    defined = {m for m, value in vars(kind).items() if isinstance(value, FunctionType | classmethod | staticmethod)}
    for hook in HOOKS[name]:
        assert hook in defined
        owners = [base for base in kind.__mro__[1:] if base.__module__.startswith("vllm.") and hook in vars(base)]
        assert owners, (
            f"vLLM {vllm_version()} knows no {hook} in any base class of {name}; see who does its work now, or the "
            "plugin's is never called"
        )
        ours, theirs = parameters(getattr(kind, hook)), parameters(getattr(owners[0], hook))
        if any(p.kind is p.VAR_KEYWORD for p in ours.values()):
            continue
        named = {n for n, p in theirs.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        unknown = sorted(named - set(ours))
        assert not unknown, (
            f"vLLM {vllm_version()} passes {unknown} to {owners[0].__name__}.{hook}; take it in {name}.{hook}"
        )


def test_vllm_still_drops_the_order_of_groups() -> None:
    """The reason for get_checkpoint_weight_mapper: without it act-order would be served as wrong text."""
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    kept = list(QuantizationConfig.get_checkpoint_weight_mapper().apply([("layer.g_idx", torch.zeros(1))]))
    assert kept == [], f"vLLM {vllm_version()} keeps g_idx: get_checkpoint_weight_mapper may go"


def test_the_engine_asks_the_plugin(quantized: Callable[..., Path], engines: Any) -> None:
    """It gave the checkpoint's headers and the model's renamings, and every linear layer is the plugin's."""
    from vllm.model_executor.layers.linear import LinearBase

    llm = engines(quantized(bits=4, group_size=32), enable_lora=True, max_loras=3, max_lora_rank=8)
    config = llm.llm.llm_engine.vllm_config.quant_config
    assert type(config) is plugin_classes()["HfGptqConfig"]
    assert "model.layers.0.self_attn.q_proj.qweight" in config._headers, "maybe_update_config was not called"
    methods = llm.llm.apply_model(
        lambda model: {n: type(m.quant_method).__name__ for n, m in model.named_modules() if isinstance(m, LinearBase)}
    )
    assert len(methods[0]) == 8 and set(methods[0].values()) == {"HfGptqLinearMethod"}
