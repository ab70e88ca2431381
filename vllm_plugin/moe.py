"""The method that runs a mixture's quantized experts in vLLM: parameters, loading, one call of one op.

vLLM keeps the experts of a layer together: the first matrices of expert `e`, gate above up, are row `e` of
`w13_qweight` and its companions, the last ones row `e` of `w2_qweight`. Tensor parallelism splits the first along
their output and the last along their input; expert parallelism gives each rank some of the experts, whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase

from hf_gptq_plugin.format.checkpoint import TENSORS, check_shapes, check_values, zero_format
from hf_gptq_plugin.format.grid import natural_groups
from hf_gptq_plugin.format.packing import pack_stream, unpack_zeros
from hf_gptq_plugin.format.spec import CheckpointError, QuantSpec
from hf_gptq_plugin.nn.moe import ACTIVATIONS, moe, stack
from hf_gptq_plugin.nn.ops import WEIGHT_TENSORS, KernelWeight

from .compiled import note
from .linear import ZeroFormat
from .loading import empty_tensors, rank_rows, refuse_missing, required_tensors, used_groups


@dataclass(frozen=True)
class ExpertsScheme:
    """How the checkpoint stores the experts of one layer.

    Args:
        names: the checkpoint's module of each matrix: (expert, shard) to name; shards are vLLM's "w1" (gate, or the
            only first matrix), "w3" (up) and "w2" (down).
        up, down: how the first and the last matrices are quantized.
        scales_dtype: dtype of the scales.
    """

    names: Mapping[tuple[int, str], str]
    up: QuantSpec
    down: QuantSpec
    scales_dtype: torch.dtype


@dataclass(frozen=True)
class _Side:
    """The matrices that vLLM keeps in one stack.

    Args:
        shards: their names, in the order in which their outputs follow each other.
        spec: how they are quantized.
        rows: this rank's input features `[start, stop)`, of `in_features`.
        columns: this rank's output features of each shard, of `out_features`.
    """

    shards: tuple[str, ...]
    spec: QuantSpec
    rows: tuple[int, int]
    in_features: int
    columns: tuple[int, int]
    out_features: int


class HfGptqMoEMethod(FusedMoEMethodBase):
    """Runs the routed experts of one layer on GPTQ codes.

    Args:
        scheme: how the checkpoint stores them.
        zeros: how it stores zeros, shared by all layers.
        moe_config: vLLM's description of the layer.
        prefix: the layer's name, for messages.

    Raises:
        CheckpointError: experts that this method cannot run.
    """

    def __init__(self, scheme: ExpertsScheme, zeros: ZeroFormat, moe_config: FusedMoEConfig, prefix: str) -> None:
        super().__init__(moe_config)
        self._scheme = scheme
        self._zeros = zeros
        self._prefix = prefix
        activation = moe_config.activation.value
        self._activation = activation.removesuffix("_no_mul")
        self._gated = moe_config.is_act_and_mul
        for is_so, what in (
            (self._activation not in ACTIVATIONS, f"the activation {activation!r}"),
            (moe_config.swiglu_limit is not None, "a limit on its activations"),
            (moe_config.has_bias, "experts with biases"),
        ):
            if is_so:
                raise CheckpointError(
                    f"{prefix} has {what}, which quantized experts do not support yet; serve the model dense, or the "
                    "checkpoint with Transformers"
                )

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the experts' tensors, in the sizes of this rank, as parameters of `layer`.

        Raises:
            CheckpointError: places for experts that the checkpoint does not have.
            ValueError: adapters on the experts.
        """
        ranks, rank = self.moe.tp_size, self.moe.tp_rank
        hidden, cut = (0, hidden_size), intermediate_size_per_partition
        inner = (rank * cut, (rank + 1) * cut)
        ups = ("w1", "w3") if self._gated else ("w1",)
        self._sides = {
            "w13": _Side(ups, self._scheme.up, hidden, hidden_size, inner, cut * ranks),
            "w2": _Side(("w2",), self._scheme.down, inner, cut * ranks, hidden, hidden_size),
        }
        self._loaded: set[tuple[int, str, str]] = set()
        self._vllm_config = get_current_vllm_config()
        _refuse_adapters(self._prefix, self._vllm_config.lora_config)
        local_id = layer._map_global_expert_id_to_local_expert_id
        self._experts = {e: local for e, _ in self._scheme.names if (local := local_id(e)) != -1}
        if num_experts != len(self._experts):
            raise CheckpointError(
                f"{self._prefix} has room for {num_experts} experts on this rank, and the checkpoint has "
                f"{len(self._experts)} for it; redundant and fused shared experts are not supported with hf_gptq"
            )
        for stem, side in self._sides.items():
            columns = (side.columns[1] - side.columns[0]) * len(side.shards)
            empty = empty_tensors(side.spec, self._scheme.scales_dtype, side.rows, side.in_features, columns)
            for leaf, tensor in empty.items():
                parameter = nn.Parameter(tensor.repeat(num_experts, *(1,) * tensor.dim()), requires_grad=False)
                parameter.weight_loader = self._loader(side, leaf)  # type: ignore[attr-defined]
                layer.register_parameter(f"{stem}_{leaf}", parameter)

    def _loader(self, side: _Side, leaf: str) -> Callable[..., bool | None]:
        """The weight_loader of one parameter; it raises CheckpointError for a tensor that is not the layer's."""
        places = {shard: place for place, shard in enumerate(side.shards)}
        width = side.columns[1] - side.columns[0]
        g_idx: dict[int, tuple[str, Tensor]] = {}
        zeros: dict[tuple[int, str], Tensor] = {}  # unpacked, until those of all of an expert's shards have come

        def load(
            param: nn.Parameter,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            local = self._experts.get(expert_id)
            if local is None:  # another rank's
                return False if return_success else None
            module = self._scheme.names[expert_id, shard_id]
            sizes = side.in_features, side.out_features
            check_shapes(module, {leaf: tuple(loaded_weight.shape)}, side.spec, *sizes)
            if leaf == "g_idx":
                first, order = g_idx.setdefault(local, (module, loaded_weight))
                if not torch.equal(order, loaded_weight):
                    raise CheckpointError(
                        f"{module}.g_idx differs from {first}.g_idx, but vLLM runs both as one matrix with one order "
                        "of groups; quantize again, or serve the checkpoint with Transformers"
                    )
            part = rank_rows(leaf, loaded_weight, side.spec, side.rows, *sizes)
            if leaf == "g_idx":
                param.data[local] = part
            elif leaf == "qzeros":
                zeros[local, shard_id] = part[:, slice(*side.columns)]
                if all((local, shard) in zeros for shard in side.shards):
                    together = torch.cat([zeros.pop((local, shard)) for shard in side.shards], dim=1)
                    param.data[local] = pack_stream(together, side.spec.bits)
            else:
                target = param.data[local][:, places[shard_id] * width : (places[shard_id] + 1) * width]
                target.copy_(part[:, slice(*side.columns)])
            self._loaded.add((expert_id, shard_id, leaf))
            return True if return_success else None

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded and lay it out for the kernels, under the same names.

        Raises:
            CheckpointError: a tensor that never came, or values that cannot be.
        """
        refuse_missing(self._prefix, self._missing())
        # Both sides show how zeros are stored before either is laid out.
        loaded = {stem: self._checked(layer, stem) for stem in self._sides}
        self._weights = {stem: self._lay_out(stem, tensors) for stem, tensors in loaded.items()}
        for stem, weight in self._weights.items():
            kept = {"qweight": weight.qweight, "scales": weight.scales, "qzeros": weight.qzeros}
            kept.update(g_idx=weight.g_idx, perm=weight.perm)
            for leaf in TENSORS:
                delattr(layer, f"{stem}_{leaf}")
            for leaf, tensor in kept.items():
                value = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                layer.register_parameter(f"{stem}_{leaf}", value)
        self._numbers = {stem: (w.bits, w.group_size) for stem, w in self._weights.items()}
        note(self._vllm_config, self._prefix, *self._weights.values())
        del self._weights

    def _missing(self) -> list[str]:
        missing = []
        for side in self._sides.values():
            for expert in self._experts:
                came = {leaf for leaf in TENSORS if any((expert, s, leaf) in self._loaded for s in side.shards)}
                missing += [
                    f"{self._scheme.names[expert, shard]}.{leaf}"
                    for leaf in required_tensors(side.spec, side.in_features, "g_idx" in came)
                    for shard in side.shards
                    if (expert, shard, leaf) not in self._loaded
                ]
        return missing

    def _checked(self, layer: Any, stem: str) -> dict[str, Tensor]:
        """The tensors of one side, without the groups of other ranks."""
        side = self._sides[stem]
        loaded = {leaf: getattr(layer, f"{stem}_{leaf}").data for leaf in TENSORS}
        for expert, local in self._experts.items():
            names = [self._scheme.names[expert, shard] for shard in side.shards]
            check_values(" and ".join(names), loaded["scales"][local], loaded["g_idx"][local])
            one = {leaf: tensor[local] for leaf, tensor in loaded.items()}
            columns = one["scales"].shape[-1]
            shown = zero_format(one["qweight"], one["qzeros"], side.spec, columns, one["g_idx"])
            self._zeros.add(names[0], shown)
        return used_groups(loaded)

    def _lay_out(self, stem: str, loaded: dict[str, Tensor]) -> KernelWeight:
        side = self._sides[stem]
        spec = replace(side.spec, checkpoint_format=self._zeros.value)
        in_features = side.rows[1] - side.rows[0]
        zeros = unpack_zeros(loaded["qzeros"], spec.bits, spec.zero_offset, loaded["scales"].shape[-1])
        natural = natural_groups(in_features, spec.group_size, loaded["g_idx"].device)
        is_symmetric = self._zeros.is_certain and bool((zeros == 2 ** (spec.bits - 1)).all())
        is_natural = bool((loaded["g_idx"] == natural).all())
        weights = [
            KernelWeight(
                qweight=loaded["qweight"][expert],
                scales=loaded["scales"][expert],
                qzeros=None if is_symmetric else loaded["qzeros"][expert],
                g_idx=None if is_natural else loaded["g_idx"][expert],
                perm=None,
                bits=spec.bits,
                group_size=spec.width(in_features),
                zero_offset=spec.zero_offset,
                in_features=in_features,
            )
            for expert in range(len(loaded["qweight"]))
        ]
        packed = [weight.packed() for weight in weights]
        # A kernel's layout may pad groups, by more where an expert's groups are more uneven; the ops also take
        # checkpoints' own layout.
        shapes = {(w.qweight.shape, None if w.perm is None else w.perm.shape) for w in packed}
        return stack(packed if len(shapes) == 1 else weights)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: nothing for vLLM's own kernels."""
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """The weighted sum of the chosen experts, a new tensor `[T, K]`; what shared experts add is vLLM's."""
        if layer.apply_router_weight_on_input:
            # vLLM asks for it only with one expert per token.
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        up, down = self._weight(layer, "w13"), self._weight(layer, "w2")
        return moe(x, topk_weights, topk_ids, up, down, self._activation, self._gated, layer.expert_map)

    def _weight(self, layer: Any, stem: str) -> KernelWeight:
        bits, group_size = self._numbers[stem]
        tensors = {leaf: getattr(layer, f"{stem}_{leaf}") for leaf in WEIGHT_TENSORS}
        return KernelWeight(**tensors, bits=bits, group_size=group_size, zero_offset=self._zeros.offset)


def _refuse_adapters(prefix: str, lora_config: Any) -> None:
    """vLLM puts adapters on experts inside its own kernels only, and on every layer that is not excluded."""
    if lora_config is not None and (lora_config.target_modules is None or "experts" in lora_config.target_modules):
        raise ValueError(
            f"{prefix} holds quantized experts, on which vLLM cannot put LoRA adapters; name the layers that may have "
            "them, for example with --lora-target-modules q_proj k_proj v_proj o_proj"
        )
