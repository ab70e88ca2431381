"""How a checkpoint's tensors come into a vLLM layer: each is checked before it is copied, none may stay out.

vLLM fuses modules (q, k, v; gate, up) into one layer, loads each tensor shard by shard, and keeps of each what
belongs to its tensor-parallel rank. Its loaders cut out what they need without comparing shapes, and nothing
notices a tensor that never came.

A rank, or a module of a fused layer, may begin anywhere: inside a 32-bit word, inside a group. So zeros lie unpacked
until those of the whole layer are there, and a layer that is split along its input holds the scales and zeros of every
group until its g_idx shows which of them the rank uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import GroupQuantScaleParameter

from hf_gptq_plugin.format.checkpoint import TENSORS, check_shapes
from hf_gptq_plugin.format.packing import pack_stream, slice_codes, unpack_stream
from hf_gptq_plugin.format.spec import CheckpointError, QuantSpec

ShardId = Any  # vLLM's: "q", "k", "v", an index, a tuple of indices, or None for the whole layer


@dataclass(frozen=True)
class Scheme:
    """How the checkpoint stores one vLLM layer.

    Args:
        names: the checkpoint's modules that the layer fuses, in their order.
        spec: how all of them are quantized.
        scales_dtype: dtype of the scales in the checkpoint.
        zero_bias: those of `names` whose bias is 0 where the checkpoint has none.
    """

    names: tuple[str, ...]
    spec: QuantSpec
    scales_dtype: torch.dtype
    zero_bias: tuple[str, ...] = ()


def layer_name(layer: Any, scheme: Scheme) -> str:
    """vLLM's name of a layer; before 0.31 an output embedding does not know its own."""
    return getattr(layer, "prefix", scheme.names[0])


class ShardLoader:
    """Loads the tensors of one layer and knows which it still waits for.

    Args:
        layer: the layer.
        scheme: how the checkpoint stores it.
        rows: the input features `[start, stop)` of this rank.
        rank_out_features: its `N`.
        load: vLLM's loader of the layer, called as `load(param, tensor)` or `load(param, tensor, shard_id)`; it
            picks this rank's output features.
    """

    def __init__(
        self, layer: Any, scheme: Scheme, rows: tuple[int, int], rank_out_features: int, load: Callable[..., None]
    ) -> None:
        self._prefix = layer_name(layer, scheme)
        self._scheme = scheme
        # Of the whole layer. An output embedding, which has no input_size before vLLM 0.31, is never split along it.
        self._in_features = getattr(layer, "input_size", rows[1])
        self._rows = rows
        self._rank_out_features = rank_out_features
        self._widths = _shard_widths(layer)
        self._load = _load_vocabulary(layer) if isinstance(layer, ParallelLMHead) else load
        self._loaded: dict[str, set[ShardId]] = {leaf: set() for leaf in TENSORS}
        self._biases: set[ShardId] = set()  # whose bias came
        self._g_idx: tuple[str, Tensor] | None = None
        self._fields: Any = None  # zeros, unpacked, until all have come

    def loader(self, leaf: str) -> Callable[..., None]:
        """The weight_loader of the parameter `leaf` (qweight, qzeros, scales or g_idx).

        It raises CheckpointError for a tensor that is not the layer's.
        """

        def load(param: Any, loaded: Tensor, shard_id: ShardId = None) -> None:
            shards = self._shards(shard_id)
            module = self._module(shards)
            width = sum(self._widths[shard] for shard in shards)
            check_shapes(module, {leaf: tuple(loaded.shape)}, self._scheme.spec, self._in_features, width)
            if leaf == "g_idx":
                self._check_same_order(module, loaded)
            part = rank_rows(leaf, loaded, self._scheme.spec, self._rows, self._in_features, width)
            target = self._unpacked(param) if leaf == "qzeros" else param
            if leaf == "g_idx" or self._rows != (0, self._in_features):
                target.data.copy_(part)  # a layer split along its input is neither fused nor split along its output
            else:
                self._load(target, part, *(() if shard_id is None else (shard_id,)))
            self._loaded[leaf].update(shards)
            if leaf == "qzeros" and len(self._loaded[leaf]) == len(self._widths):
                param.data.copy_(pack_stream(self._fields.data, self._scheme.spec.bits))
                self._fields = None

        return load

    def bias_loader(self, own: Callable[..., None]) -> Callable[..., None]:
        """The weight_loader of the layer's bias: the layer's own, noting what came, from the checkpoint or made up by
        the model."""

        def load(param: Any, loaded: Tensor, *shard_id: Any) -> None:
            own(param, loaded, *shard_id)
            self._biases.update(self._shards(*shard_id or (None,)))

        return load

    def require_all(self, bias: Tensor | None) -> None:
        """Check that every tensor of every shard came; biases that the model does not have become 0.

        Args:
            bias: the layer's bias, if the model has one.

        Raises:
            CheckpointError: naming each that did not.
        """
        required = required_tensors(self._scheme.spec, self._in_features, bool(self._loaded["g_idx"]))
        missing = [
            f"{self._module((shard,))}.{leaf}"
            for leaf in required
            for shard in self._widths
            if shard not in self._loaded[leaf]
        ]
        if bias is not None:
            self._make_up(bias)
            missing += [f"{self._module((shard,))}.bias" for shard in self._widths if shard not in self._biases]
        refuse_missing(self._prefix, missing)

    def _make_up(self, bias: Any) -> None:
        for shard, width in self._widths.items():
            if shard not in self._biases and self._module((shard,)) in self._scheme.zero_bias:
                bias.weight_loader(bias, bias.new_zeros(width), *(() if shard is None else (shard,)))

    def _unpacked(self, qzeros: Any) -> Any:
        """What zeros are loaded into before they are packed into the parameter `qzeros`."""
        if self._fields is None:
            data = torch.empty(len(qzeros), self._rank_out_features, dtype=torch.uint8, device=qzeros.device)
            along_both = {"input_dim": 0, "output_dim": 1}
            self._fields = GroupQuantScaleParameter(data=data, weight_loader=qzeros.weight_loader, **along_both)
            self._fields.tp_rank, self._fields.tp_size = qzeros.tp_rank, qzeros.tp_size
        return self._fields

    def _check_same_order(self, module: str, g_idx: Tensor) -> None:
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


def empty_tensors(
    spec: QuantSpec, scales_dtype: torch.dtype, rows: tuple[int, int], in_features: int, out_features: int
) -> dict[str, Tensor]:
    """What a rank's tensors are loaded into.

    Args:
        rows: its input features `[start, stop)`, of `in_features`.
        out_features: its `N`.

    Returns:
        The canonical tensors, qweight and g_idx of the rank's inputs, qzeros and scales of all groups of
        `in_features`; g_idx in natural order, which stays where the checkpoint has none.
    """
    whole, part = spec.shapes(in_features, out_features), spec.shapes(rows[1] - rows[0], out_features)
    return {
        "qweight": torch.empty(part["qweight"], dtype=torch.int32),
        "qzeros": torch.empty(whole["qzeros"], dtype=torch.int32),
        "scales": torch.empty(whole["scales"], dtype=scales_dtype),
        "g_idx": torch.arange(*rows, dtype=torch.int32) // spec.width(in_features),
    }


def rank_rows(
    leaf: str, loaded: Tensor, spec: QuantSpec, rows: tuple[int, int], in_features: int, out_features: int
) -> Tensor:
    """Of a checked tensor, what a rank with input features `rows` needs, for every output feature; of qzeros the
    stored fields of all groups, uint8 `[G, N]`."""
    if leaf == "qzeros":
        return unpack_stream(loaded, spec.bits, out_features)
    if rows == (0, in_features):
        return loaded
    if leaf == "qweight":
        return slice_codes(loaded, spec.bits, *rows)
    return loaded[slice(*rows)] if leaf == "g_idx" else loaded


def used_groups(loaded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the groups before the first and after the last that a rank's g_idx names; one layer or stacked experts."""
    g_idx = loaded["g_idx"]
    first, last = int(g_idx.min()), int(g_idx.max())
    groups = {leaf: loaded[leaf][..., first : last + 1, :] for leaf in ("scales", "qzeros")}
    return {**loaded, **groups, "g_idx": g_idx - first}


def required_tensors(spec: QuantSpec, in_features: int, has_g_idx: bool) -> tuple[str, ...]:
    """The tensors that every module must have; without g_idx groups are in natural order, unless act-order says
    otherwise.

    Args:
        has_g_idx: another module of the same layer has a g_idx.
    """
    ordered = spec.desc_act and spec.groups(in_features) > 1
    return TENSORS if ordered or has_g_idx else TENSORS[:-1]


def refuse_missing(prefix: str, missing: list[str]) -> None:
    """Raise CheckpointError if there is a `missing` tensor of layer `prefix`."""
    if missing:
        raise CheckpointError(
            f"the checkpoint has no {', '.join(dict.fromkeys(missing))}, so {prefix} cannot be served; the "
            "checkpoint is incomplete: fetch it again"
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


def _load_vocabulary(layer: ParallelLMHead) -> Callable[..., None]:
    """The loader of an output embedding, whose vocabulary vLLM pads; its own fails where there is padding.

    Padding gets scale zero, hence logit zero, and is cut off by vLLM.
    """

    def load(param: Any, loaded: Tensor) -> None:
        first, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
        param.data.zero_()
        param.data[:, : end - first] = loaded[:, first:end]

    return load
