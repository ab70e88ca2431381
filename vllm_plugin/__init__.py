"""The vLLM plugin: `--quantization hf_gptq` serves every GPTQ variant, with LoRA adapters.

vLLM finds `register` through the entry point group `vllm.general_plugins`.
"""

from __future__ import annotations


def register() -> None:
    """Make the quantization method `hf_gptq` known to vLLM, in each of its processes; harmless to repeat."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .config import NAME, HfGptqConfig
    from .dense import require_every_weight

    register_quantization_config(NAME)(HfGptqConfig)
    require_every_weight()
