"""The method that runs a quantized linear layer in vLLM: parameters, what follows loading, one call."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
    RowvLLMParameter,
)

from hf_gptq_plugin.format.checkpoint import TENSORS, agreed_format, check_values, zero_format
from hf_gptq_plugin.format.grid import natural_groups
from hf_gptq_plugin.format.spec import WORD, QuantSpec, words
from hf_gptq_plugin.nn.ops import KernelWeight, linear

from .loading import Scheme, ShardLoader, check_slices


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
        """Register the checkpoint's tensors, in the sizes of this rank, as parameters of `layer`.

        Raises:
            CheckpointError: a fused or tensor-parallel layer that cannot be cut where vLLM cuts it.
        """
        spec, in_features = self._scheme.spec, input_size_per_partition
        check_slices(layer.prefix, spec, input_size, output_size, in_features, output_partition_sizes)
        self._in_features = in_features
        self._group_size = spec.width(in_features)
        self._loader = ShardLoader(layer, self._scheme, in_features, extra_weight_attrs["weight_loader"])
        empty = {
            leaf: torch.empty(shape, dtype=self._scheme.scales_dtype if leaf == "scales" else torch.int32)
            for leaf, shape in spec.shapes(in_features, sum(output_partition_sizes)).items()
        }
        factor = Fraction(WORD, spec.bits)
        # The one group of a layer that is split along its input lies on every rank.
        replicated = in_features != input_size and spec.groups(input_size) == 1
        scales_class, qzeros_class = (
            (ChannelQuantScaleParameter, PackedColumnParameter)
            if replicated
            else (GroupQuantScaleParameter, PackedvLLMParameter)
        )
        along_groups = {"output_dim": 1} if replicated else {"output_dim": 1, "input_dim": 0}
        parameters = {
            "qweight": PackedvLLMParameter(
                data=empty["qweight"],
                input_dim=0,
                output_dim=1,
                packed_dim=0,
                packed_factor=factor,
                weight_loader=self._loader.loader("qweight"),
            ),
            "qzeros": qzeros_class(
                data=empty["qzeros"],
                packed_dim=1,
                packed_factor=factor,
                weight_loader=self._loader.loader("qzeros"),
                **along_groups,
            ),
            "scales": scales_class(data=empty["scales"], weight_loader=self._loader.loader("scales"), **along_groups),
            # Stays as it is where the checkpoint has none.
            "g_idx": RowvLLMParameter(
                data=natural_groups(in_features, spec.group_size, empty["qweight"].device),
                input_dim=0,
                weight_loader=self._loader.loader("g_idx"),
            ),
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
        spec = self._scheme.spec
        check_values(layer.prefix, loaded["scales"], loaded["g_idx"])
        found = _zero_evidence(layer, loaded, spec)
        self._zeros.add(layer.prefix, found)
        spec = replace(spec, checkpoint_format=self._zeros.value)
        weight = KernelWeight.from_canonical(**loaded, spec=spec, in_features=self._in_features).packed()
        # A layer that shows no evidence must follow a later one that does, so its zeros are kept.
        self._symmetric = weight.qzeros is None and found is not None
        self._natural = weight.g_idx is None
        for leaf, tensor in {**loaded, "qweight": weight.qweight}.items():
            # Plain parameters: vLLM's own would send every call of the op through __torch_function__.
            layer.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        layer.register_buffer("perm", weight.perm, persistent=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias`, a new tensor `[..., N]`; x `[..., K]`."""
        weight = KernelWeight(
            qweight=layer.qweight,
            scales=layer.scales,
            qzeros=None if self._symmetric else layer.qzeros,
            g_idx=None if self._natural else layer.g_idx,
            perm=layer.perm,
            bits=self._scheme.spec.bits,
            group_size=self._group_size,
            zero_offset=self._zeros.offset,
        )
        return linear(x, weight, bias)

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
    return zero_format(loaded["qweight"][:, :columns], qzeros, spec, columns)
