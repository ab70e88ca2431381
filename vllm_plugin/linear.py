"""The method that runs a quantized linear layer in vLLM: parameters, what follows loading, one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

from hf_gptq_plugin.format.checkpoint import TENSORS, agreed_format, check_values, zero_format
from hf_gptq_plugin.format.spec import WORD, QuantSpec, words
from hf_gptq_plugin.nn.ops import KernelWeight, linear

from .compiled import note
from .loading import Scheme, ShardLoader, empty_tensors, layer_name, used_groups


class ZeroFormat:
    """How zeros are stored, once for a whole checkpoint: as labelled, until a layer's values show otherwise.

    Args:
        label: the config's checkpoint_format.

    Attributes:
        value: "gptq" or "gptq_v2".
        offset: what is added to a stored zero.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._evidence: dict[str, str] = {}
        self._set(label)

    def add(self, layer: str, found: str | None) -> None:
        """Take in what `zero_format` found for `layer`.

        Raises:
            CheckpointError: layers that contradict each other.
        """
        if found is not None and found not in self._evidence.values():
            self._evidence[layer] = found
            self._set(agreed_format(self._label, self._evidence))

    @property
    def is_certain(self) -> bool:
        """Whether a layer has shown how zeros are stored, so that no later one can change it."""
        return bool(self._evidence)

    def _set(self, value: str) -> None:
        self.value = value
        self.offset = QuantSpec(checkpoint_format=value).zero_offset


@register_weight_loader_v2_supported_method
class HfGptqLinearMethod(LinearMethodBase):
    """Runs one linear layer, or a quantized output embedding, on GPTQ codes.

    Args:
        scheme: how the checkpoint stores the layer.
        zeros: how it stores zeros, shared by all layers.
    """

    def __init__(self, scheme: Scheme, zeros: ZeroFormat) -> None:
        self._scheme = scheme
        self._zeros = zeros

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's tensors, in the sizes of this rank, as parameters of `layer`."""
        spec = self._scheme.spec
        start = layer.tp_rank * input_size_per_partition if input_size_per_partition != input_size else 0
        rows = (start, start + input_size_per_partition)
        self._in_features = input_size_per_partition
        self._vllm_config = get_current_vllm_config()
        self._prefix = layer_name(layer, self._scheme)
        columns = sum(output_partition_sizes)
        self._loader = ShardLoader(layer, self._scheme, rows, columns, extra_weight_attrs["weight_loader"])
        layer.weight_loader = self._loader.bias_loader(layer.weight_loader)  # which the bias gets after this
        empty = empty_tensors(spec, self._scheme.scales_dtype, rows, input_size, columns)
        along_both = {"input_dim": 0, "output_dim": 1}
        kinds: dict[str, Callable[..., BasevLLMParameter]] = {
            "qweight": partial(
                PackedvLLMParameter, packed_dim=0, packed_factor=Fraction(WORD, spec.bits), **along_both
            ),
            "qzeros": BasevLLMParameter,
            "scales": partial(GroupQuantScaleParameter, **along_both),
            "g_idx": BasevLLMParameter,
        }
        parameters = {
            leaf: kind(data=empty[leaf], weight_loader=self._loader.loader(leaf)) for leaf, kind in kinds.items()
        }
        for leaf, parameter in parameters.items():
            layer.register_parameter(leaf, parameter)
        if isinstance(layer, ParallelLMHead):
            # LoRA's logits ask an output embedding's weight for its dtype and device.
            layer.register_buffer("weight", torch.empty(0, dtype=params_dtype), persistent=False)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded and lay it out for the kernels, under the same names.

        Raises:
            CheckpointError: a tensor that never came, or values that cannot be.
        """
        self._loader.require_all(layer.bias)
        loaded = {leaf: getattr(layer, leaf).data for leaf in TENSORS}
        check_values(self._prefix, loaded["scales"], loaded["g_idx"])
        loaded = used_groups(loaded)
        spec = self._scheme.spec
        self._zeros.add(self._prefix, _zero_evidence(layer, loaded, spec))
        spec = replace(spec, checkpoint_format=self._zeros.value)
        weight = KernelWeight.from_canonical(**loaded, spec=spec, in_features=self._in_features).packed()
        # Before there is evidence, a layer must be able to follow a later one, so its zeros are kept.
        self._symmetric = weight.qzeros is None and self._zeros.is_certain
        self._natural = weight.g_idx is None
        self._group_size = weight.group_size
        kept = {
            "qzeros": loaded["qzeros"],
            "g_idx": loaded["g_idx"],
            "qweight": weight.qweight,
            "scales": weight.scales,
        }
        for leaf, tensor in kept.items():
            # Plain parameters: vLLM's own would send every call of the op through __torch_function__.
            layer.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        layer.register_buffer("perm", weight.perm, persistent=False)
        note(self._vllm_config, self._prefix, self._weight(layer))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias`, a new tensor `[..., N]`; x `[..., K]`."""
        return linear(x, self._weight(layer), bias)

    def _weight(self, layer: Any) -> KernelWeight:
        return KernelWeight(
            qweight=layer.qweight,
            scales=layer.scales,
            qzeros=None if self._symmetric else layer.qzeros,
            g_idx=None if self._natural else layer.g_idx,
            perm=layer.perm,
            bits=self._scheme.spec.bits,
            group_size=self._group_size,
            zero_offset=self._zeros.offset,
        )

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> nn.Module:
        """Refuse: a quantized output embedding has a weight of its own."""
        raise ValueError(
            f"config.json says tie_word_embeddings=true, but {self._scheme.names[0]} is quantized and has a "
            "weight of its own; set tie_word_embeddings to false"
        )


def _zero_evidence(layer: Any, loaded: dict[str, Tensor], spec: QuantSpec) -> str | None:
    """`zero_format` of the layer, the padding of a vocabulary left out."""
    columns = loaded["scales"].shape[1]
    if isinstance(layer, ParallelLMHead):
        columns = layer.num_org_embeddings_per_partition
    qzeros = loaded["qzeros"][:, : words(columns, spec.bits)]
    return zero_format(loaded["qweight"][:, :columns], qzeros, spec, columns, loaded["g_idx"])
