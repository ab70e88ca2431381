"""Memory plans for models of Transformers: from a loaded model, or from the JSON and headers of one on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.quantizers.auto import AutoQuantizationConfig

from ..calibrate.walk import LINEAR, linear_shape
from ..convert.source import open_source, weight_files
from ..format.spec import QuantSpec
from ..nn.linear import QuantLinear
from ..train.plan import Budget, budgeted
from .loading import require_weights, text_class
from .quantizer import GptqQuantizer

_ATTENTION = "hf_gptq_planned"
LAYOUTS = ("gptq", "gptq_v2", "dense")


def tune_memory_budget(
    model: str | Path | nn.Module, budget: int, *, dtype: torch.dtype = torch.float32, bits: int = 4,
    group_size: int = 128, **options: Any,
) -> Budget:  # fmt: skip
    """What training takes by each method, and which to choose within a budget. No weight is read.

    Args:
        model: folder of a GPTQ or dense checkpoint, or a model that is loaded.
        budget: bytes.
        dtype: of what is not quantized, and of the arithmetic, for a folder.
        bits, group_size: how a dense checkpoint will be quantized.
        **options: `seqlen`, `windows`, `methods`, `optimizers`, `target_modules`, `rank`, `subspace`; see
            `train.plan.budgeted`.

    Raises:
        ValueError: an argument that cannot be, or a model that cannot be planned.
    """
    loaded = model if isinstance(model, nn.Module) else skeleton(Path(model), dtype, QuantSpec(bits, group_size))
    return budgeted(loaded, budget, prepare=_without_mask, **options)


def skeleton(folder: Path, dtype: torch.dtype, spec: QuantSpec) -> Any:
    """The model of a checkpoint on the meta device, with `QuantLinear` layers where it has codes or will have.

    Raises:
        CheckpointError: a folder that is no checkpoint.
        ValueError: another layout than `LAYOUTS`.
    """
    source = open_source(folder)
    if source.layout not in LAYOUTS:
        raise ValueError(f"{folder} is {source.layout}; plans are made for {', '.join(LAYOUTS)}: convert it first")
    require_weights(folder)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model: Any = text_class(folder).from_config(config, dtype=dtype)
    if source.layout == "dense":
        return as_quantized(model, spec)
    quantization = AutoQuantizationConfig.from_dict(config.quantization_config)
    quantizer = GptqQuantizer(quantization, pre_quantized=True)
    quantizer.preprocess_model(model, dtype=dtype, checkpoint_files=[str(file) for file in weight_files(folder)])
    return model


def as_quantized(model: Any, spec: QuantSpec) -> Any:
    """A dense model on the meta device, as it will be: every linear layer but the output embeddings on codes."""
    head = model.get_output_embeddings()
    found = {name: m for name, m in model.named_modules() if isinstance(m, LINEAR) and m is not head}
    for name, layer in found.items():
        k, n = linear_shape(layer)
        model.set_submodule(name, QuantLinear(k, n, spec, layer.bias is not None, dtype=layer.weight.dtype))
    return model


def _without_mask(model: Any) -> None:
    """Let PyTorch's attention run as it does on real tensors: without a mask where text is not padded. Before fake
    tensors, Transformers builds the whole mask, `[tokens, tokens]`, and attention then keeps it."""
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return
    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    model.set_attn_implementation(_ATTENTION)
