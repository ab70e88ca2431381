"""`hf_gptq` as vLLM sees it: which checkpoints it takes, and how each layer of a model is stored in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata

from hf_gptq_plugin.format.checkpoint import TensorInfo, quantized_modules, read_headers, weight_files
from hf_gptq_plugin.format.spec import CheckpointConfig, CheckpointError, QuantSpec, resolve

from .linear import HfGptqLinearMethod, Scheme, ZeroFormat
from .moe import ExpertsScheme, HfGptqMoEMethod

NAME = "hf_gptq"
# What vLLM runs as one layer. Some models enter these in their class's mapping only when they are made, after vLLM has
# copied it.
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
# All experts of a block are one layer to it, too; one matrix, by either name, tells whether a rule means them.
_EXPERTS = {"experts": ("experts.0.gate_proj", "experts.0.w1")}
_MOST_BLOCKS = 200  # of which a rule may name some
# Models without a bias on their keys, to which vLLM's layer gives one. Its loader makes zeros up beside dense weights.
_NO_KEY_BIAS = ("whisper",)


class HfGptqConfig(QuantizationConfig):
    """The quantization config of a GPTQ checkpoint, and what its tensors say beyond it.

    A layer is quantized exactly where the checkpoint has codes for it. Rules (`dynamic`) are written for the
    checkpoint's module names, so the names of vLLM's layers are traced back to these: through the model's
    renamings, and through the fusion of several modules into one layer.

    Args:
        checkpoint: the checked `quantization_config`.
    """

    def __init__(self, checkpoint: CheckpointConfig) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.zero_format = ZeroFormat(checkpoint.spec.checkpoint_format)
        self._headers: dict[str, TensorInfo] = {}  # by tensor; empty where they cannot be read in advance
        self._quantized: dict[str, dict[str, TensorInfo]] = {}  # by module of the checkpoint
        self._sources: dict[str, str] = {}  # module in vLLM to module of the checkpoint
        self._has_key_bias = True

    def get_name(self) -> str:  # type: ignore[override]  # vLLM's annotation lists its own names only
        """The name behind `--quantization`."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Every dtype that the ops take."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Whatever PyTorch runs on: devices without a kernel use the PyTorch reference."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Where the config stands when it is not in config.json."""
        return ["quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HfGptqConfig:
        """From the checkpoint's JSON.

        Raises:
            CheckpointError: naming the field, its value and what is accepted.
        """
        return cls(CheckpointConfig.from_dict(config))

    @classmethod
    def override_quantization_method(  # type: ignore[override]
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take a GPTQ checkpoint where the user says so, or says nothing and vLLM itself would refuse it."""
        if str(hf_quant_cfg.get("quant_method", "")).lower() != "gptq":
            return None
        if user_quant == NAME or (user_quant is None and _refused_by_vllm(hf_quant_cfg)):
            return NAME
        return None

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Drop no tensor; the inherited mapper drops every g_idx."""
        return WeightsMapper()

    def maybe_update_config(
        self, model_name: str, hf_config: PreTrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Read the headers of the checkpoint's files.

        Raises:
            CheckpointError: a damaged file, no quantized tensor, one of a wrong dtype, or a module that lacks one.
        """
        if Path(model_name).is_dir():
            self._headers = read_headers(weight_files(Path(model_name)))
        else:
            metadata = get_safetensors_params_metadata(model_name, revision=revision)
            metadata.pop("__metadata__", None)
            self._headers = {
                name: TensorInfo(info["dtype"], tuple(info["shape"]), Path(model_name))
                for name, info in metadata.items()
            }
        self._has_key_bias = getattr(hf_config, "model_type", None) not in _NO_KEY_BIAS
        self._quantized = quantized_modules(self._headers)
        if self._headers and not self._quantized:
            raise CheckpointError(
                f"config.json of {model_name} says quant_method=gptq, but no tensor of the checkpoint ends "
                "in .qweight; the weights are not quantized: remove quantization_config from config.json and "
                "serve it without --quantization"
            )
        modules = {tensor.rpartition(".")[0] for tensor in self._headers}
        self._sources = {module: module for module in modules}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Follow a model's renaming of the checkpoint's modules."""
        renamed = {}
        # Public since vLLM 0.31.
        map_name = getattr(hf_to_vllm_mapper, "map_name", None) or hf_to_vllm_mapper._map_name
        for module, source in self._sources.items():
            tensor = map_name(f"{module}.weight")
            if tensor is not None:
                renamed[tensor.removesuffix(".weight")] = source
        self._sources = renamed

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How `layer` is run; None for layers that no checkpoint quantizes.

        Raises:
            CheckpointError: a layer that cannot be run as the checkpoint stores it.
        """
        if isinstance(layer, RoutedExperts):
            experts = self.experts_scheme(layer, prefix)
            if experts is None:
                return UnquantizedFusedMoEMethod(layer.moe_config)
            return HfGptqMoEMethod(experts, self.zero_format, layer.moe_config, prefix)
        if isinstance(layer, LinearBase):
            scheme = self.scheme(prefix)
            return HfGptqLinearMethod(scheme, self.zero_format) if scheme else UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead):
            scheme = self.scheme(prefix) if self._headers or self.checkpoint.lm_head else None
            return HfGptqLinearMethod(scheme, self.zero_format) if scheme else UnquantizedEmbeddingMethod()
        return None

    def scheme(self, prefix: str) -> Scheme | None:
        """How the checkpoint stores vLLM's layer `prefix`; None where it is not quantized.

        Raises:
            CheckpointError: a fused layer of modules that are not quantized alike.
        """
        names = self._checkpoint_modules(prefix)
        spec = self._common_spec(prefix, names)
        if spec is None:
            return None
        zero_bias = () if self._has_key_bias else tuple(name for name in names if name.endswith(".k_proj"))
        return Scheme(tuple(names), spec, self._scales_dtype(names), zero_bias)

    def experts_scheme(self, layer: RoutedExperts, prefix: str) -> ExpertsScheme | None:
        """How the checkpoint stores the routed experts `prefix`; None where they are not quantized.

        Raises:
            CheckpointError: experts that are not quantized alike.
        """
        leaves = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name, "w2": layer.ckpt_down_proj_name}
        modules = {
            (expert, shard): f"{prefix}.{expert}.{leaf}"
            for expert in range(layer.global_num_experts)
            for shard, leaf in leaves.items()
            if leaf is not None
        }
        names = {place: self._sources.get(module, module) for place, module in modules.items()}
        if self._headers and not any(name in self._quantized for name in names.values()):
            if any(name.startswith(f"{prefix}.") for name in self._quantized):
                raise CheckpointError(
                    f"{prefix}: the checkpoint has quantized experts, but none is named as vLLM expects "
                    f"({names[0, 'w1']}); serve the checkpoint with Transformers"
                )
            return None
        up = self._common_spec(prefix, [name for (_, shard), name in names.items() if shard != "w2"])
        down = self._common_spec(prefix, [name for (_, shard), name in names.items() if shard == "w2"])
        if up is None or down is None:
            if up is down:
                return None
            raise CheckpointError(
                f"vLLM runs the experts of {prefix} as one layer, but only some of their matrices are quantized; "
                "quantize all or none, or serve the checkpoint with Transformers"
            )
        return ExpertsScheme(names, up, down, self._scales_dtype(list(names.values())))

    def _common_spec(self, prefix: str, names: list[str]) -> QuantSpec | None:
        missing = [n for n in names if n not in self._quantized and f"{n}.weight" not in self._headers]
        if missing and len(missing) < len(names) and self._headers:
            raise _incomplete(missing[0])
        specs = {name: self._spec(name) for name in names}
        if len(set(specs.values())) > 1:
            # One name for each way of being quantized tells enough: there may be hundreds of experts.
            examples = {spec: name for name, spec in reversed(specs.items())}
            listed = "; ".join(f"{name}: {_describe(spec)}" for spec, name in reversed(examples.items()))
            raise CheckpointError(
                f"vLLM runs {prefix} as one layer, but its parts are not quantized alike ({listed}); "
                "quantize them with one setting, or serve the checkpoint with Transformers"
            )
        return specs[names[0]]

    def _scales_dtype(self, names: list[str]) -> torch.dtype:
        dtypes = {self._quantized[name]["scales"].torch_dtype for name in names if name in self._quantized}
        # float32 holds scales of any stored dtype unchanged.
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def _checkpoint_modules(self, prefix: str) -> list[str]:
        parent, dot, leaf = prefix.rpartition(".")
        fused = self.packed_modules_mapping.get(leaf) or _FUSED.get(leaf, ())
        parts = [f"{parent}{dot}{part}" for part in fused]
        if not parts or (prefix in self._sources and not any(part in self._sources for part in parts)):
            parts = [prefix]  # not fused, or fused on disk already
        return [self._sources.get(part, part) for part in parts]

    def _spec(self, name: str) -> QuantSpec | None:
        if not self._headers:
            return self.checkpoint.for_module(name)
        if name in self._quantized:
            return self.checkpoint.for_module(name) or self.checkpoint.spec
        if f"{name}.weight" not in self._headers and _has_child(name.rpartition(".")[0], self._quantized):
            raise _incomplete(name)
        return None


def _has_child(parent: str, modules: Iterable[str]) -> bool:
    return parent != "" and any(module.rpartition(".")[0] == parent for module in modules)


def _incomplete(name: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint has neither {name}.qweight nor {name}.weight; it is incomplete: fetch it again"
    )


def _describe(spec: QuantSpec | None) -> str:
    if spec is None:
        return "not quantized"
    return f"bits={spec.bits}, group_size={spec.group_size}, sym={spec.sym}, desc_act={spec.desc_act}"


def _refused_by_vllm(config: Mapping[str, Any]) -> bool:
    """Whether vLLM's own GPTQ method would refuse, misread or fail on the checkpoint, or on a part of it."""
    try:
        checkpoint = CheckpointConfig.from_dict(config)
    except CheckpointError:
        return False  # not ours to explain unless we are asked for
    if any(field not in config for field in ("group_size", "desc_act", "sym")):
        return True  # it has no defaults for them
    spec = checkpoint.spec
    rules = (resolve(spec, {".*": o}, "") for p, o in checkpoint.dynamic.items() if p[:2] != "-:")
    return (
        any(own != spec for own in rules)  # vLLM asks for fused layers' names, whatever the rule's are
        or _misled_by_rules(checkpoint)
        or spec.bits not in _own_bits()
        or not spec.sym
        or (spec.desc_act and spec.group_size != -1)
        or spec.checkpoint_format != "gptq"
        or spec.group_size not in (-1, 32, 64, 128)
    )


def _misled_by_rules(checkpoint: CheckpointConfig) -> bool:
    """Whether a rule of `dynamic` says something else of a fused layer's name, which vLLM asks, than of its parts'."""
    if not checkpoint.dynamic:
        return False
    try:
        return any(
            {checkpoint.for_module(f"{stem}.{part}") for part in parts} != {checkpoint.for_module(f"{stem}.{fused}")}
            for block in range(_MOST_BLOCKS)
            for stem in (f"model.layers.{block}.{place}" for place in ("self_attn", "mlp", "block_sparse_moe"))
            for fused, parts in {**_FUSED, **_EXPERTS}.items()
        )
    except CheckpointError:
        return False


def _own_bits() -> tuple[int, ...]:
    """The bits for which vLLM's own method has a kernel on this machine."""
    if not current_platform.is_cpu():
        return (4, 8)
    import vllm._custom_ops  # noqa: F401  (loads the library for this processor)

    # Its library for processors without AVX-512 lacks the kernel, which shows at the first forward pass only.
    return (4,) if hasattr(torch.ops._C, "cpu_gemm_wna16") else ()
