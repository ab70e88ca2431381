"""What a checkpoint folder holds, from its JSON and its safetensors headers: no model is built, no code is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..format.checkpoint import (
    INDEX,
    TensorInfo,
    agreed_format,
    quantization_of,
    read_headers,
    read_json,
    require_g_idx,
    weight_files,
    zero_format,
)
from ..format.spec import CheckpointConfig, CheckpointError, QuantSpec, name_matches, quant_method
from .layouts import Layout, awq_spec, layout, pack_quantized_specs

# Modules whose stored zeros are looked at to tell v1 from v2.
_LOOKED_AT = 8


@dataclass(frozen=True)
class Move:
    """How the channels of one module change places; see `order`.

    Args:
        rows: new output `i` is old output `rows[i]`; None where outputs stay.
        columns: the same for inputs.
        axis: of outputs in a matrix that is not quantized; 1 in Transformers' Conv1D.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    axis: int = 0


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk.

    Args:
        folder: where it lies.
        config: its config.json.
        layout: "gptq", "gptq_v2", "awq", "compressed-tensors", "dense", or another `quant_method` in lower case.
        label: what the config says, where `layout` is what the tensors say.
        headers: all tensors by name.
        modules: quantized modules: name to tensors by short name.
        specs: per quantized module.
        moves: per module whose channels are to change places as it is read.
    """

    folder: Path
    config: dict[str, Any]
    layout: str
    label: str
    headers: dict[str, TensorInfo]
    modules: dict[str, dict[str, TensorInfo]]
    specs: dict[str, QuantSpec]
    moves: Mapping[str, Move] = field(default_factory=dict)

    @property
    def is_told(self) -> bool:
        """Whether config.json says that it is quantized: Transformers reads nothing else."""
        return bool(quantization_of(self.config))

    def dense(self, name: str) -> Tensor:
        """A tensor that belongs to no quantized module, its channels moved."""
        value = load(self.headers[name], name)
        move = self.moves.get(name.rpartition(".")[0])
        if move is not None and move.rows is not None:
            value = value.index_select(move.axis if value.dim() > 1 else 0, move.rows)
        return value

    def tensors(self, module: str) -> dict[str, Tensor]:
        """The tensors of a quantized module by short name."""
        return {leaf: load(info, f"{module}.{leaf}") for leaf, info in self.modules[module].items()}

    @property
    def dense_linears(self) -> list[str]:
        """Modules with a dense matrix in a numbered block, and the output embedding: what writers of other layouts must
        name as not quantized. Headers do not tell a linear layer from another matrix; naming one too many is harmless.
        """
        found = []
        for name, info in self.headers.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and len(info.shape) == 2:
                found.append(module)
        if "lm_head" not in (*found, *self.modules):
            found.append("lm_head")  # tied
        return sorted(found)


def load(info: TensorInfo, name: str) -> Tensor:
    """One tensor of a file."""
    with safe_open(info.file, framework="pt") as handle:
        return handle.get_tensor(name)


def open_source(folder: str | Path) -> Source:
    """Read what a checkpoint folder says about itself, and check it against its tensors' headers.

    Raises:
        CheckpointError: naming the file, field or tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if quantization is None and (folder / "quantize_config.json").exists():
        quantization = read_json(folder / "quantize_config.json")
    if quantization is None:
        text = config.get("text_config")
        quantization = text.get("quantization_config") if isinstance(text, dict) else None
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(f"quantization_config must be a JSON object, but it is {quantization!r}")
    headers = read_headers(weight_files(folder))
    index = folder / INDEX
    absent = sorted(set(read_json(index)["weight_map"]) - set(headers)) if index.exists() else []
    if absent:
        raise CheckpointError(
            f"{INDEX} names {absent[0]}, and no file holds it; the checkpoint is incomplete: fetch it again"
        )
    method = quant_method(quantization) if quantization else "dense"
    if method in ("gptq", "hf_gptq"):
        return _gptq(folder, config, quantization or {}, headers)
    if method == "awq":
        spec = awq_spec(quantization or {})
        modules = _modules(headers, layout("awq"))
        return Source(folder, config, "awq", "awq", headers, modules, dict.fromkeys(modules, spec))
    if method == "compressed-tensors":
        return _pack_quantized(folder, config, quantization or {}, headers)
    if method == "gptq_v2":
        raise CheckpointError(f'quant_method={method!r} is not known; use "gptq", with checkpoint_format="gptq_v2"')
    if method == "dense":
        packed = [n for n in headers if n.rpartition(".")[2] in ("qweight", "weight_packed", "weight_scale_inv")]
        if packed:
            raise CheckpointError(
                f"config.json has no quantization_config, but the checkpoint holds {packed[0]}; restore the config"
            )
    return Source(folder, config, method, method, headers, {}, {})


def _modules(headers: Mapping[str, TensorInfo], kind: Layout) -> dict[str, dict[str, TensorInfo]]:
    """Quantized modules by their leaves.

    Raises:
        CheckpointError: a module without one of the tensors it must have.
    """
    found: dict[str, dict[str, TensorInfo]] = {}
    first = kind.required[0]
    for name, info in headers.items():
        module, _, leaf = name.rpartition(".")
        if leaf in kind.leaves and (f"{module}.{first}" in headers or leaf == "qzeros"):
            found.setdefault(module, {})[leaf] = info
    for module, tensors in found.items():
        if f"{module}.weight" in headers:
            raise CheckpointError(f"the checkpoint holds both {module}.{first} and {module}.weight; remove one of them")
        for leaf, info in tensors.items():
            wanted = 1 if leaf in ("g_idx", "weight_g_idx", "weight_shape") else 2
            if len(info.shape) != wanted:
                raise CheckpointError(
                    f"{module}.{leaf} has shape {list(info.shape)}; it must have {wanted} dimension"
                    f"{'s' if wanted > 1 else ''}: fetch it again"
                )
            if 0 in info.shape:
                raise CheckpointError(
                    f"{module}.{leaf} has shape {list(info.shape)}, which holds nothing: fetch it again"
                )
        for leaf in kind.required:
            if leaf not in tensors:
                raise CheckpointError(f"{module}.{leaf} is missing from the checkpoint: fetch it again")
        for leaf, info in tensors.items():
            packed = leaf in ("qweight", "qzeros", "weight_packed", "weight_zero_point")
            scale = leaf in ("scales", "weight_scale")
            whole = ("I32",) if leaf == "g_idx" else ("I32", "I64")
            accepted = ("I32",) if packed else ("F16", "BF16", "F32") if scale else whole
            if info.dtype not in accepted:
                raise CheckpointError(f"{module}.{leaf} has dtype {info.dtype}; accepted: {', '.join(accepted)}")
    if not found:
        raise CheckpointError(f"quantization_config says {kind.name}, but no module has a {first}")
    return dict(sorted(found.items()))


def _gptq(folder: Path, config: dict[str, Any], quantization: dict[str, Any], headers: dict[str, TensorInfo]) -> Source:
    checkpoint = CheckpointConfig.from_dict(quantization)
    label = checkpoint.spec.checkpoint_format
    modules = _modules(headers, layout("gptq"))
    specs = {}
    for module, tensors in modules.items():
        # Codes that are there are read, as the loaders do, even where a rule excludes the module.
        specs[module] = checkpoint.for_module(module) or checkpoint.spec
        require_g_idx(module, specs[module], tensors, tensors["scales"].shape[0])
    evidence = {}
    for module in list(modules)[:: max(1, len(modules) // _LOOKED_AT)]:
        info = modules[module]
        qweight, qzeros = (load(info[leaf], f"{module}.{leaf}") for leaf in ("qweight", "qzeros"))
        evidence[module] = zero_format(qweight, qzeros, specs[module], info["scales"].shape[-1])
    real = agreed_format(label, evidence)
    specs = {module: replace(spec, checkpoint_format=real) for module, spec in specs.items()}
    return Source(folder, config, real, label, headers, modules, specs)


def _pack_quantized(
    folder: Path, config: dict[str, Any], quantization: dict[str, Any], headers: dict[str, TensorInfo]
) -> Source:
    groups = pack_quantized_specs(quantization)
    modules = _modules(headers, layout("compressed-tensors"))
    specs = {}
    for module, tensors in modules.items():
        named = [spec for targets, spec in groups.values() if _targeted(module, targets)]
        usual = [spec for targets, spec in groups.values() if "Linear" in targets]
        if not (named or usual):
            raise CheckpointError(f"{module}.weight_packed belongs to none of config_groups' targets")
        spec = (named or usual)[0]
        if ("weight_zero_point" in tensors) == spec.sym:
            raise CheckpointError(
                f"{module} has {'a' if spec.sym else 'no'} weight_zero_point, but config_groups says "
                f"symmetric={spec.sym}"
            )
        specs[module] = replace(spec, desc_act="weight_g_idx" in tensors)
    return Source(folder, config, "compressed-tensors", "compressed-tensors", headers, modules, specs)


def _targeted(module: str, targets: list[str]) -> bool:
    """Whether a target names a module: by name, or as a regex behind "re:"."""
    for target in targets:
        if target == module or (target.startswith("re:") and name_matches(target[3:], module)):
            return True
    return False


def stored_bytes(info: TensorInfo) -> int:
    """Size of a tensor."""
    width = 8 if info.dtype.endswith("64") else 4 if info.dtype.endswith("32") else 2 if "16" in info.dtype else 1
    return width * int(torch.Size(info.shape).numel())
