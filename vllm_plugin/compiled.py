"""Keeps vLLM's cache of compiled models from answering for another checkpoint.

vLLM compiles a model's graph once and finds it again, also in another process, by a key made of configurations and
source code. What it compiles with a quantized layer depends on more: whether its zeros are all alike, whether its
groups are in order, how its zeros are stored. All of that is known only once the tensors are loaded; a checkpoint that
was quantized again into the same folder may differ in nothing else.
"""

from __future__ import annotations

import hashlib
from typing import Any

from hf_gptq_plugin.nn.ops import KernelWeight

_FIELD = "hf_gptq"


def describe(weight: KernelWeight) -> str:
    """Everything of a weight that a compiled graph relies on: numbers, and each tensor's dtype and shape."""
    return repr([t if isinstance(t, int | None) else (str(t.dtype), tuple(t.shape)) for t in weight.arguments])


def note(vllm_config: Any, layer: str, *weights: KernelWeight) -> None:
    """Make the key of the model's compiled graphs depend on how `layer` is run.

    Args:
        vllm_config: vLLM's configuration of the model; its `additional_config` is part of the key.

    Raises:
        ValueError: an `additional_config` that is no dict.
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, dict):
        raise ValueError(
            f"additional_config is {type(additional).__name__}, but hf_gptq keeps there what its compiled graphs "
            "depend on; pass a dict"
        )
    digest = hashlib.sha256(additional.get(_FIELD, "").encode())
    digest.update("\n".join([layer, *map(describe, weights)]).encode())
    vllm_config.additional_config = {**additional, _FIELD: digest.hexdigest()}
