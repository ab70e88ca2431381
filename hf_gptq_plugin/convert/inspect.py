"""What a checkpoint holds, which stacks run it, and what is wrong with it, for people and for machines."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..format.checkpoint import check_shapes, check_values
from ..format.spec import WORD, CheckpointError, QuantSpec
from .source import Source, load, open_source, stored_bytes

_READ = ("gptq", "gptq_v2", "awq", "compressed-tensors", "dense")


@dataclass
class Findings:
    """What `inspect` found.

    Args:
        folder: the checkpoint.
        layout: see `Source`; "gguf" for a GGUF file.
        label: what its config says.
        architecture: class of the model, as config.json names it.
        modules: how many modules have which spec, commonest first.
        quantized_bytes, dense_bytes: of quantized modules' tensors, and of all others.
        bf16_bytes: what the quantized modules would take in bf16.
        parameters: weights of the whole checkpoint.
        runs: stack to "yes", or the reason why not.
        problems: what is wrong, one sentence each.
    """

    folder: str
    layout: str
    label: str
    architecture: str
    modules: list[dict[str, Any]] = field(default_factory=list)
    quantized_bytes: int = 0
    dense_bytes: int = 0
    bf16_bytes: int = 0
    parameters: int = 0
    runs: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def inspect(folder: str | Path, values: bool = True) -> Findings:
    """Look at a checkpoint.

    Args:
        folder: a folder, or a GGUF file.
        values: read the tensors of quantized modules too, for what headers do not show.

    Raises:
        CheckpointError: it cannot be read at all.
    """
    path = Path(folder)
    if path.is_file() or (path.is_dir() and not (path / "config.json").exists() and list(path.glob("*.gguf"))):
        return _gguf(path)
    source = open_source(path)
    architectures = source.config.get("architectures") or ["?"]
    found = Findings(str(path), source.layout, source.label, str(architectures[0]))
    _sizes(found, source)
    if source.layout != source.label:
        found.problems.append(
            f"labelled checkpoint_format={source.label}, but zero points are stored as {source.layout}; other readers "
            f"decode every weight one step off: hf-gptq convert {path} OUT --to {source.layout} writes the right label"
        )
    if source.layout == "gptq" or source.layout == "gptq_v2":
        found.problems += _gptq_problems(source, values)
    found.runs = _runs(source, found.problems)
    return found


def _sizes(found: Findings, source: Source) -> None:
    kinds: Counter[QuantSpec] = Counter(source.specs.values())
    for spec, count in kinds.most_common():
        found.modules.append(
            {"modules": count, "bits": spec.bits, "group_size": spec.group_size, "sym": spec.sym}
            | {"desc_act": spec.desc_act}
        )
    belonging = set()
    for module, tensors in source.modules.items():
        belonging |= {f"{module}.{leaf}" for leaf in tensors}
        found.quantized_bytes += sum(map(stored_bytes, tensors.values()))
        count = _weights(tensors, source.layout, source.specs[module])
        found.bf16_bytes += 2 * count
        found.parameters += count
    for name, info in source.headers.items():
        if name not in belonging:
            found.dense_bytes += stored_bytes(info)
            found.parameters += torch.Size(info.shape).numel()


def _weights(tensors: dict[str, Any], layout: str, spec: QuantSpec) -> int:
    """`N · K` of a quantized module from its headers."""
    if layout == "awq":
        rows, columns = tensors["qweight"].shape
        return rows * columns * 8
    if layout == "compressed-tensors":
        rows, columns = tensors["weight_packed"].shape
        return rows * columns * (WORD // spec.bits)
    words, columns = tensors["qweight"].shape
    return columns * (tensors["g_idx"].shape[0] if "g_idx" in tensors else words * WORD // spec.bits)


def _gptq_problems(source: Source, values: bool) -> list[str]:
    problems = []
    for module, tensors in source.modules.items():
        spec = source.specs[module]
        shapes = {leaf: info.shape for leaf, info in tensors.items()}
        rows, columns = shapes["qweight"]
        in_features = shapes["g_idx"][0] if "g_idx" in shapes else rows * WORD // spec.bits
        try:
            check_shapes(module, shapes, spec, in_features, columns)
            if values:
                g_idx = load(tensors["g_idx"], f"{module}.g_idx") if "g_idx" in tensors else None
                check_values(module, load(tensors["scales"], f"{module}.scales"), g_idx)
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def _runs(source: Source, problems: list[str]) -> dict[str, str]:
    """Which stacks take the checkpoint as it is."""
    if problems and source.layout == source.label:
        return dict.fromkeys(("hf_gptq_plugin", "vLLM with this plugin", "vLLM alone"), "no: it is damaged, see below")
    if source.layout not in _READ:
        return {"hf_gptq_plugin": f"no: {source.layout} is not GPTQ", "vLLM alone": "see vLLM's own documentation"}
    if source.layout in ("gptq", "gptq_v2"):
        return {"hf_gptq_plugin": "yes", "vLLM with this plugin": "yes", "vLLM alone": _vllm_alone(source)}
    if source.layout == "dense":
        return {"hf_gptq_plugin": "yes, and quantizes it", "vLLM alone": "yes"}
    return {
        "hf_gptq_plugin": f"after hf-gptq convert {source.folder} OUT --to gptq_v2",
        "vLLM with this plugin": f"after hf-gptq convert {source.folder} OUT --to gptq_v2",
        "vLLM alone": "yes",
    }


def _vllm_alone(source: Source) -> str:
    """What vLLM 0.32 says of a GPTQ checkpoint without this plugin."""
    reasons = []
    for spec in dict.fromkeys(source.specs.values()):
        if spec.bits not in (4, 8):
            reasons.append(f"{spec.bits} bit")
        if not spec.sym:
            reasons.append("asymmetric")
        if spec.desc_act:
            reasons.append("act-order")
        if spec.group_size not in (-1, 32, 64, 128):
            reasons.append(f"groups of {spec.group_size}")
    if source.layout == "gptq_v2":
        reasons.append("v2 zeros")
    return f"no: {', '.join(dict.fromkeys(reasons))}" if reasons else "yes"


def _gguf(path: Path) -> Findings:
    """A GGUF file by the `gguf` library's reader."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ImportError("GGUF files are read by the gguf library; install it: pip install gguf") from None
    file = path if path.is_file() else sorted(path.glob("*.gguf"))[0]
    if file.suffix != ".gguf":
        raise CheckpointError(f"{file.name} is not a checkpoint folder and not a .gguf file")
    try:
        reader = GGUFReader(str(file))
    except Exception as error:  # whatever damage makes it raise
        raise CheckpointError(f"{file.name} cannot be read as GGUF ({type(error).__name__}: {error})") from None
    architecture = reader.get_field("general.architecture")
    found = Findings(str(path), "gguf", "gguf", str(architecture.contents()) if architecture else "?")
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    found.modules = [{"modules": count, "type": name} for name, count in kinds.most_common()]
    for tensor in reader.tensors:
        count = int(tensor.n_elements)
        found.parameters += count
        if tensor.tensor_type.name in ("F32", "F16", "BF16"):
            found.dense_bytes += int(tensor.n_bytes)
        else:
            found.quantized_bytes += int(tensor.n_bytes)
            found.bf16_bytes += 2 * count
    found.runs = {"hf_gptq_plugin": "no: GGUF is llama.cpp's", "llama.cpp": "yes"}
    return found
