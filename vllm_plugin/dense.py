"""The weights that are not quantized: vLLM looks after them only where none is."""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from .config import NAME
from .linear import HfGptqLinearMethod
from .moe import HfGptqMoEMethod


def require_every_weight() -> None:
    """Let vLLM's loader refuse a checkpoint of ours that leaves a parameter as it was made, as it does for models that
    are not quantized; harmless to repeat. Our own layers say by themselves what they lack."""
    if hasattr(DefaultModelLoader, "_hf_gptq"):
        return
    load, track = DefaultModelLoader.load_weights, DefaultModelLoader.track_weights_loading

    @wraps(load)
    def load_weights(self: Any, model: nn.Module, model_config: Any) -> None:
        if model_config.quantization == NAME and getattr(self, "enable_weights_track", True) is None:
            self.enable_weights_track = True
        load(self, model, model_config)

    @wraps(track)
    def track_weights_loading(
        self: Any, model: nn.Module, loaded_weights: set[str] | None, *rest: Any, **named: Any
    ) -> None:
        if loaded_weights is not None:
            for name, module in model.named_modules():
                if isinstance(getattr(module, "quant_method", None), HfGptqLinearMethod | HfGptqMoEMethod):
                    prefix = f"{name}." if name else ""
                    loaded_weights |= {f"{prefix}{own}" for own, _ in module.named_parameters()}
            # A router that the layer of experts holds, too, has two names; it is loaded by one of them.
            aliases: dict[int, set[str]] = {}
            for name, parameter in model.named_parameters(remove_duplicate=False):
                aliases.setdefault(id(parameter), set()).add(name)
            for names in aliases.values():
                if names & loaded_weights:
                    loaded_weights |= names
        track(self, model, loaded_weights, *rest, **named)

    DefaultModelLoader.load_weights = load_weights  # type: ignore[method-assign]
    DefaultModelLoader.track_weights_loading = track_weights_loading  # type: ignore[method-assign]
    DefaultModelLoader._hf_gptq = True  # type: ignore[attr-defined]
