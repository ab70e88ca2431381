"""How a checkpoint's tensors come into a vLLM layer: each is checked before it is copied, none may stay out.

vLLM fuses modules (q, k, v; gate, up) into one layer and loads each tensor shard by shard. Its loaders cut
out what they need without comparing shapes, and nothing notices a tensor that never came.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from hf_gptq_plugin.format.checkpoint import TENSORS, check_shapes
from hf_gptq_plugin.format.grid import natural_groups
from hf_gptq_plugin.format.spec import WORD, CheckpointError, QuantSpec, words

ShardId = Any  # vLLM's: "q", "k", "v", an index, a tuple of indices, or None for the whole layer


@dataclass(frozen=True)
class Scheme:
    """How the checkpoint stores one vLLM layer.

    Args:
        names: the checkpoint's modules that the layer fuses, in their order.
        spec: how all of them are quantized.
        scales_dtype: dtype of the scales in the checkpoint.
        has_bias: the checkpoint has a bias for at least one of them (some models make up the others).
    """

    names: tuple[str, ...]
    spec: QuantSpec
    scales_dtype: torch.dtype
    has_bias: bool = True


class ShardLoader:
    """Loads the tensors of one layer and knows which it still waits for.

    Args:
        layer: the layer.
        scheme: how the checkpoint stores it.
        rank_in_features: `K` of this rank's part.
        load: vLLM's loader of the layer, called as `load(param, tensor)` or `load(param, tensor, shard_id)`.
    """

    def __init__(self, layer: Any, scheme: Scheme, rank_in_features: int, load: Callable[..., None]) -> None:
        self._prefix = layer.prefix
        self._scheme = scheme
        self._in_features = layer.input_size  # of the whole layer, not of this rank's part
        self._widths = _shard_widths(layer)
        self._load = _load_vocabulary(layer, scheme.spec.bits) if isinstance(layer, ParallelLMHead) else load
        self._is_row_slice = rank_in_features != layer.input_size
        self._loaded: dict[str, set[ShardId]] = {leaf: set() for leaf in TENSORS}
        self._g_idx: tuple[str, Tensor] | None = None

    def loader(self, leaf: str) -> Callable[..., None]:
        """The weight_loader of the parameter `leaf` (qweight, qzeros, scales or g_idx).

        It raises CheckpointError for a tensor that is not the layer's.
        """

        def load(param: nn.Parameter, loaded: Tensor, shard_id: ShardId = None) -> None:
            shards = self._shards(shard_id)
            module = self._module(shards)
            width = sum(self._widths[shard] for shard in shards)
            check_shapes(module, {leaf: tuple(loaded.shape)}, self._scheme.spec, self._in_features, width)
            if leaf == "g_idx":
                self._check_g_idx(module, loaded)
            if leaf != "g_idx" or not self._is_row_slice:
                self._load(param, loaded, *(() if shard_id is None else (shard_id,)))
            self._loaded[leaf].update(shards)

        return load

    def require_all(self, bias: Tensor | None) -> None:
        """Check that every tensor of every shard came.

        Args:
            bias: the layer's bias, if the model has one.

        Raises:
            CheckpointError: naming each that did not.
        """
        spec = self._scheme.spec
        # A layer without g_idx has its groups in natural order, unless act-order says otherwise.
        ordered = spec.desc_act and spec.groups(self._in_features) > 1
        required = TENSORS if ordered or self._loaded["g_idx"] else TENSORS[:-1]
        missing = [
            f"{self._module((shard,))}.{leaf}"
            for leaf in required
            for shard in self._widths
            if shard not in self._loaded[leaf]
        ]
        if bias is not None and not self._scheme.has_bias:
            missing += [f"{name}.bias" for name in self._scheme.names]
        if missing:
            raise CheckpointError(
                f"the checkpoint has no {', '.join(dict.fromkeys(missing))}, so {self._prefix} cannot be "
                "served; the checkpoint is incomplete: fetch it again"
            )

    def _check_g_idx(self, module: str, g_idx: Tensor) -> None:
        natural = natural_groups(self._in_features, self._scheme.spec.group_size, g_idx.device)
        if self._is_row_slice and not torch.equal(g_idx, natural):
            raise CheckpointError(
                f"{module}.g_idx is in act-order (desc_act=true), and tensor parallelism splits the layer "
                "along its input, which is not supported yet; serve with --tensor-parallel-size 1"
            )
        if self._g_idx is None:
            self._g_idx = module, g_idx
        elif not torch.equal(self._g_idx[1], g_idx):
            raise CheckpointError(
                f"{module}.g_idx differs from {self._g_idx[0]}.g_idx, but vLLM runs both as one layer "
                f"({self._prefix}) with one order of groups; quantize again, or serve the checkpoint with "
                "Transformers"
            )

    def _shards(self, shard_id: ShardId) -> tuple[ShardId, ...]:
        if shard_id is None:
            return tuple(self._widths)
        shards = shard_id if isinstance(shard_id, tuple) else (shard_id,)
        unknown = [shard for shard in shards if shard not in self._widths]
        if unknown:
            raise CheckpointError(
                f"vLLM loads shard {unknown[0]!r} into {self._prefix}, but its shards are "
                f"{list(self._widths)}; layers of this kind are not supported yet: serve the checkpoint with "
                "Transformers"
            )
        return shards

    def _module(self, shards: tuple[ShardId, ...]) -> str:
        """The checkpoint's module that `shards` come from, for messages."""
        names = self._scheme.names
        if len(names) == 1:
            return names[0]
        if len(names) == len(self._widths) and len(shards) == 1:
            return names[list(self._widths).index(shards[0])]
        return f"{self._prefix}[{', '.join(map(str, shards))}]"


def check_slices(
    prefix: str,
    spec: QuantSpec,
    in_features: int,
    out_features: int,
    rank_in_features: int,
    rank_out_features: list[int],
) -> None:
    """Check that a layer's shards, and a rank's part of it, begin and end at whole words and whole groups.

    Args:
        prefix: the layer, for messages.
        in_features, out_features: `K` and `N` of the whole layer.
        rank_in_features: `K` of this rank's part.
        rank_out_features: `N` of this rank's part, by shard.

    Raises:
        CheckpointError: naming the part.
    """
    whole = next(count for count in range(1, WORD + 1) if count * spec.bits % WORD == 0)
    is_column_slice = sum(rank_out_features) != out_features
    for shard, width in enumerate(rank_out_features):
        if width % whole and (is_column_slice or len(rank_out_features) > 1):
            remedy = "a smaller --tensor-parallel-size" if is_column_slice else "Transformers to serve it"
            raise CheckpointError(
                f"{prefix}: shard {shard} has {width} output features on each rank; with bits={spec.bits} "
                f"zeros can only be cut at multiples of {whole}, where 32-bit words end: use {remedy}"
            )
    if rank_in_features == in_features:
        return
    size = spec.group_size if spec.groups(in_features) > 1 else 1
    if rank_in_features % whole or rank_in_features % size:
        raise CheckpointError(
            f"{prefix}: {rank_in_features} input features on each rank; with bits={spec.bits} and "
            f"group_size={spec.group_size} codes can only be cut at multiples of {whole} and {size}, where "
            "32-bit words and groups end: use a smaller --tensor-parallel-size"
        )


def _shard_widths(layer: Any) -> dict[ShardId, int]:
    """out_features in the checkpoint of each shard that vLLM loads into `layer`."""
    if isinstance(layer, QKVParallelLinear):
        return {
            "q": layer.total_num_heads * layer.head_size,
            "k": layer.total_num_kv_heads * layer.head_size,
            "v": layer.total_num_kv_heads * layer.v_head_size,
        }
    if isinstance(layer, MergedColumnParallelLinear):
        return dict(enumerate(layer.output_sizes))
    return {None: layer.org_vocab_size if isinstance(layer, ParallelLMHead) else layer.output_size}


def _load_vocabulary(layer: ParallelLMHead, bits: int) -> Callable[..., None]:
    """The loader of an output embedding, whose vocabulary vLLM pads; its own fails where there is padding.

    Padding gets scale zero, hence logit zero, and is cut off by vLLM.
    """

    def load(param: Any, loaded: Tensor) -> None:
        if loaded.dim() == 2:
            first, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
            if getattr(param, "packed_dim", None) == 1:
                first, end = words(first, bits), words(end, bits)
            param.data.zero_()
            param.data[:, : end - first] = loaded[:, first:end]
        else:
            param.data.copy_(loaded)

    return load
