"""What a checkpoint holds, which stacks run it, and what is wrong with it, for people and for machines."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..format.checkpoint import check_shapes, check_values
from ..format.spec import WORD, CheckpointError, QuantSpec
from .layouts import check_rest
from .source import Source, load, open_source, read_json, stored_bytes, weight_files
from .stream import read_module

_FLOATS = ("F64", "F32", "F16", "BF16")  # of GGUF
_STACKS = ("hf_gptq_plugin", "vLLM with this plugin", "vLLM alone")
_DAMAGED = "no: it is damaged, see below"
_READ = ("gptq", "gptq_v2", "awq", "compressed-tensors", "dense")
# Tensors of a module beside its weight.
_BITSANDBYTES = re.compile(
    r"(?P<module>.+?)(\.weight\.((nested_)?(absmax|quant_map)|quant_state\.bitsandbytes__(?P<kind>\w+))|\.SCB|\.weight_format)"
)


@dataclass
class Findings:
    """What `inspect` found.

    Args:
        folder: the checkpoint.
        layout: see `Source`; "gguf" for a GGUF file.
        label: what its config says.
        architecture: class of the model, as config.json names it.
        modules: how many modules have which spec, commonest first, with their names, numbers as `*`.
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
        CheckpointError: it cannot be read at all: no folder, no config.json, no safetensors file.
    """
    path = Path(folder)
    if path.is_file() or (path.is_dir() and not (path / "config.json").exists() and list(path.glob("*.gguf"))):
        return _gguf(path)
    try:
        source = open_source(path)
    except CheckpointError as error:
        return _unreadable(path, error)
    found = Findings(str(path), source.layout, source.label, _architecture(source.config))
    _sizes(found, source)
    if source.layout == "bitsandbytes":
        _bitsandbytes(found, source)
    if source.layout != source.label:
        found.problems.append(
            f"labelled checkpoint_format={source.label}, but zero points are stored as {source.layout}; other readers "
            f"decode every weight one step off: hf-gptq convert {path} OUT --to {source.layout} writes the right label"
        )
    if source.layout in ("gptq", "gptq_v2"):
        found.problems += _gptq_problems(source, values)
    elif values:
        found.problems += _other_problems(source)
    found.problems += _incomplete(source)
    found.runs = _runs(source, found.problems)
    if source.layout in ("gptq", "gptq_v2"):
        _method(found, source)
    return found


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "?"


def _unreadable(path: Path, error: CheckpointError) -> Findings:
    """What can be said of a checkpoint whose tensors do not fit its config.

    Raises:
        CheckpointError: `error`, where the config or the files cannot be read.
    """
    config = read_json(path / "config.json")
    weight_files(path)
    quantization = config.get("quantization_config")
    label = str(quantization.get("quant_method") or "gptq").lower() if isinstance(quantization, dict) else "dense"
    return Findings(
        str(path), label, label, _architecture(config), runs=dict.fromkeys(_STACKS, _DAMAGED), problems=[str(error)]
    )


def _method(found: Findings, source: Source) -> None:
    """Transformers knows one spelling of `quant_method`: others give random weights or an error. vLLM asks for any."""
    quantization = source.config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else "gptq"
    if method == "gptq":
        return
    advice = f"hf-gptq convert {found.folder} OUT --to {source.layout} writes it so"
    found.problems.append(
        f'quant_method={method!r} must be "gptq": Transformers does not know the checkpoint; {advice}'
    )
    stacks = _STACKS if method is None else ("hf_gptq_plugin",)
    found.runs |= dict.fromkeys(stacks, 'no: quant_method must be "gptq", see below')


def _sizes(found: Findings, source: Source) -> None:
    kinds: dict[QuantSpec, list[str]] = {}
    for module, spec in source.specs.items():
        kinds.setdefault(spec, []).append(module)
    for spec, modules in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        found.modules.append(
            {"modules": len(modules), "bits": spec.bits, "group_size": spec.group_size, "sym": spec.sym}
            | {"desc_act": spec.desc_act, "names": patterns(modules)}
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


def patterns(modules: list[str]) -> list[str]:
    """Names with their numbers as `*`, each once."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in modules))


def _bitsandbytes(found: Findings, source: Source) -> None:
    """Modules of bitsandbytes: 4 bit by their quant_state, 8 bit by their row scales."""
    kinds: dict[str, list[str]] = {}
    for name, info in source.headers.items():
        match = _BITSANDBYTES.fullmatch(name)
        if match is None or f"{match['module']}.weight" not in source.headers:
            continue
        found.parameters -= torch.Size(info.shape).numel()
        found.quantized_bytes += stored_bytes(info)
        found.dense_bytes -= stored_bytes(info)
        kind = match["kind"] or ("int8" if name.endswith(".SCB") else None)
        if kind is not None:
            kinds.setdefault(kind, []).append(match["module"])
    for kind, modules in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        each = 1 if kind == "int8" else 2  # weights per byte
        for module in modules:
            packed = source.headers[f"{module}.weight"]
            count = torch.Size(packed.shape).numel()
            found.parameters += (each - 1) * count
            found.bf16_bytes += 2 * each * count
            found.quantized_bytes += stored_bytes(packed)
            found.dense_bytes -= stored_bytes(packed)
        found.modules.append({"modules": len(modules), "type": kind, "names": patterns(modules)})
    if not kinds:
        found.problems.append("quantization_config says bitsandbytes, but no module has a quant_state or row scales")


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
    orphans = (n for n in source.headers if n.endswith(".g_idx") and n.removesuffix(".g_idx") not in source.modules)
    problems = [f"{name} stands without its module's qweight: the checkpoint is incomplete" for name in orphans]
    for module, tensors in source.modules.items():
        spec = source.specs[module]
        shapes = {leaf: info.shape for leaf, info in tensors.items()}
        rows, columns = shapes["qweight"]
        in_features = shapes["g_idx"][0] if "g_idx" in shapes else rows * WORD // spec.bits
        try:
            check_shapes(module, shapes, spec, in_features, columns)
            if values:
                with safe_open(tensors["qweight"].file, framework="pt") as handle:
                    row = handle.get_slice(f"{module}.qweight")[rows - 1]
                check_rest(module, row, spec, in_features)
                g_idx = load(tensors["g_idx"], f"{module}.g_idx") if "g_idx" in tensors else None
                check_values(module, load(tensors["scales"], f"{module}.scales"), g_idx)
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def _other_problems(source: Source) -> list[str]:
    problems = []
    for module in source.modules:
        try:
            read_module(source, module)
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def _incomplete(source: Source) -> list[str]:
    """Blocks, and modules of one block, that a whole checkpoint would have."""
    blocks: dict[str, dict[int, set[str]]] = {}
    for name in source.headers:
        match = re.match(r"(.*?)\.(\d+)\.(.+)\.[^.]+$", name)
        if match:
            blocks.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    problems = []
    text = source.config.get("text_config")
    config = text if isinstance(text, dict) else source.config
    expected = config.get("num_hidden_layers")
    for stack, found in blocks.items():
        whole = expected if type(expected) is int and stack.endswith(("model.layers", "language_model.layers")) else 0
        absent = sorted(set(range(min(max(whole, max(found) + 1), 100_000))) - set(found))
        if absent:
            shown = ", ".join(map(str, absent[:8])) + (", …" if len(absent) > 8 else "")
            problems.append(f"{stack} has no block {shown}: the checkpoint is incomplete")
        usual = Counter(map(frozenset, found.values())).most_common(1)[0]
        for number, modules in sorted(found.items()):
            # Blocks of another kind have modules of their own; one that only lacks some, and is nearly alone, is not.
            if modules < usual[0] and usual[1] >= max(2, 0.9 * (len(found) - 1)):
                missing = ", ".join(sorted(usual[0] - modules))
                problems.append(f"{stack}.{number} lacks {missing}, which the other blocks have")
    return problems


def _runs(source: Source, problems: list[str]) -> dict[str, str]:
    """Which stacks take the checkpoint as it is."""
    if problems and source.layout == source.label:
        return dict.fromkeys(_STACKS, _DAMAGED)
    if source.layout == "bitsandbytes":
        return {
            "hf_gptq_plugin": "no: bitsandbytes' grids are not uniform; Transformers loads it where that is installed",
            "vLLM with this plugin": "no: it is not GPTQ",
            "vLLM alone": "where vLLM's bitsandbytes plugin and bitsandbytes are installed, on a GPU",
        }
    if source.layout not in _READ:
        return {"hf_gptq_plugin": f"no: {source.layout} is not GPTQ", "vLLM alone": "see vLLM's own documentation"}
    if source.layout in ("gptq", "gptq_v2"):
        alone = _vllm_alone(source)
        if not source.is_told:
            return {
                "hf_gptq_plugin": f"after hf-gptq convert {source.folder} OUT --to {source.layout}: Transformers reads "
                "config.json alone, which has no quantization_config",
                "vLLM with this plugin": "yes, with --quantization hf_gptq",
                "vLLM alone": f"{alone}, with --quantization gptq" if alone == "yes" else alone,
            }
        return {"hf_gptq_plugin": "yes", "vLLM with this plugin": "yes", "vLLM alone": alone}
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
        if spec.desc_act and spec.group_size != -1:
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
    kinds: dict[str, list[str]] = {}
    for tensor in reader.tensors:
        kind, count = tensor.tensor_type.name, int(tensor.n_elements)
        kinds.setdefault(kind, []).append(str(tensor.name))
        found.parameters += count
        if kind in _FLOATS:
            found.dense_bytes += int(tensor.n_bytes)
        else:
            found.quantized_bytes += int(tensor.n_bytes)
            found.bf16_bytes += 2 * count
    found.modules = [
        {"modules": len(names), "type": kind, "names": patterns(names)}
        for kind, names in sorted(kinds.items(), key=lambda item: -len(item[1]))
    ]
    found.runs = {
        "hf_gptq_plugin": "no: GGUF is llama.cpp's; Transformers reads it dense (gguf_file=), for quantizing again",
        "llama.cpp": "yes",
    }
    return found
