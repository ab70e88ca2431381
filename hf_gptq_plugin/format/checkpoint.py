"""Read and check the tensors of a GPTQ checkpoint on disk, before and after they are loaded.

Headers are checked before a model is built, so that a wrong file ends in one clear error and no weight is ever
left uninitialised; values are checked once the tensors are there.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import packing
from .spec import BITS, FORMATS, WORD, CheckpointError, QuantSpec
from .staging import staged

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
TENSORS = ("qweight", "qzeros", "scales", "g_idx")
_REQUIRED = ("qweight", "qzeros", "scales")
_DTYPES = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16", "F32"), "g_idx": ("I32",)}
_TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors header: dtype as safetensors names it, shape, and the file it is in."""

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch's terms; only those that GPTQ tensors may have."""
        return _TORCH_DTYPES[self.dtype]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of the index where there is one.

    Raises:
        CheckpointError: none, a file of the index that is missing, or a name that leads out of the folder.
    """
    index = folder / INDEX
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
            raise CheckpointError(
                f"{folder} has no safetensors file"
                + (f", only {', '.join(others)}; pickled files can run code and are not read" if others else "")
            )
        return files
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{INDEX} has no weight_map of tensor names to file names")
    files = []
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{INDEX} names the file {name!r}; accepted are plain names of files in its folder")
        try:
            found = (folder / name).is_file()
        except OSError as error:  # a name that no file can have
            raise CheckpointError(f"{INDEX} names {name[:200]!r}, which cannot be read ({error.strerror})") from None
        if not found:
            raise CheckpointError(f"{name} is missing, and {INDEX} names it; the checkpoint is incomplete")
        files.append(folder / name)
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        CheckpointError: no such file, or something else in it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read as JSON ({error}); the checkpoint is incomplete") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} holds a {type(value).__name__}; it must hold a JSON object")
    return value


def quantization_of(config: dict[str, Any]) -> dict[str, Any]:
    """What a config says of quantization, where Transformers looks for it; empty where nothing."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        found = part.get("quantization_config")
        if isinstance(found, dict) and found:
            return found
    return {}


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorInfo]:
    """Headers of all `files`: tensor name to `TensorInfo`.

    Raises:
        CheckpointError: a file that is not safetensors, is truncated or damaged, or a tensor that stands twice.
    """
    headers: dict[str, TensorInfo] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise CheckpointError(
                f"{file.name} is not a safetensors file; GPTQ checkpoints are only read from safetensors "
                "(pickled files can run code), so convert it first"
            )
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():
                    view = handle.get_slice(name)
                    if name in headers:
                        raise CheckpointError(
                            f"tensor {name} stands in {headers[name].file.name} and in {file.name}; remove one"
                        )
                    headers[name] = TensorInfo(view.get_dtype(), tuple(view.get_shape()), file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file.name} cannot be read as safetensors ({error}); it is damaged or was not downloaded whole: "
                "fetch it again"
            ) from None
    return headers


def quantized_modules(headers: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The quantized modules of a checkpoint: module name to its tensors by short name.

    Raises:
        CheckpointError: a module that lacks one of qweight, qzeros and scales, or a tensor of a wrong dtype.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in headers.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("qweight", "qzeros") or (leaf in TENSORS and f"{module}.qweight" in headers):
            modules.setdefault(module, {})[leaf] = info
    for module, tensors in modules.items():
        for leaf in _REQUIRED:
            if leaf not in tensors:
                raise CheckpointError(
                    f"{module}.{leaf} is missing from the checkpoint (it has "
                    f"{', '.join(f'{module}.{t}' for t in tensors)}); the checkpoint is incomplete: fetch it again"
                )
        for leaf, info in tensors.items():
            if info.dtype not in _DTYPES[leaf]:
                raise CheckpointError(f"{module}.{leaf} has dtype {info.dtype}; accepted: {', '.join(_DTYPES[leaf])}")
    return modules


def require_g_idx(module: str, spec: QuantSpec, leaves: Iterable[str], groups: int) -> None:
    """Check that a module in act-order says which group each input is in.

    Args:
        leaves: short names of its tensors.
        groups: how many it has; of one, every input is a member.

    Raises:
        CheckpointError: g_idx is missing.
    """
    if spec.desc_act and groups > 1 and "g_idx" not in leaves:
        raise CheckpointError(
            f"{module}.g_idx is missing from the checkpoint, but desc_act=True needs it to know each input's group; "
            "the checkpoint is incomplete: fetch it again"
        )


def check_shapes(
    module: str, shapes: Mapping[str, tuple[int, ...]], spec: QuantSpec, in_features: int, out_features: int
) -> None:
    """Compare the shapes of a module's tensors with what `spec` implies for a weight `[N, K]`.

    Raises:
        CheckpointError: naming the tensor, both shapes, and the bits or group size that would fit.
    """
    expected = spec.shapes(in_features, out_features)
    for leaf in ("qweight", "scales", "qzeros", "g_idx"):  # those first whose shape tells most
        shape = shapes.get(leaf, expected[leaf])
        if tuple(shape) == expected[leaf]:
            continue
        message = (
            f"{module}.{leaf} has shape {tuple(shape)}, but bits={spec.bits} and group_size={spec.group_size} "
            f"on in_features={in_features}, out_features={out_features} need {expected[leaf]}"
        )
        fitting = _fitting(leaf, tuple(shape), in_features, out_features)
        hint = f"; {fitting} would fit: correct quantization_config" if fitting else "; the tensor is not this module's"
        raise CheckpointError(message + hint)


def _fitting(leaf: str, shape: tuple[int, ...], in_features: int, out_features: int) -> str:
    """The bits or group size that explains a mis-shaped tensor, in words; empty when none does."""
    if leaf == "qweight":
        bits = [b for b in BITS if shape == (packing.words(in_features, b), out_features)]
        return f"bits={bits[0]}" if bits else ""
    if leaf == "scales" and len(shape) == 2 and shape[1] == out_features and 0 < shape[0] <= in_features:
        size = -(-in_features // shape[0])
        return f"group_size={size}" if -(-in_features // size) == shape[0] else ""
    return ""


def check_values(module: str, scales: Tensor, g_idx: Tensor | None) -> None:
    """Check loaded values that no header shows.

    Raises:
        CheckpointError: a scale that is not finite, a group index out of range.
    """
    finite = torch.isfinite(scales)
    if not bool(finite.all()):
        group, column = (int(i) for i in (~finite).nonzero()[0])
        raise CheckpointError(
            f"{module}.scales[{group}, {column}] is {float(scales[group, column])}; scales must be finite: "
            "the checkpoint is damaged, quantize or fetch it again"
        )
    if g_idx is not None and g_idx.numel():
        low, high = int(g_idx.min()), int(g_idx.max())
        if low < 0 or high >= scales.shape[0]:
            raise CheckpointError(
                f"{module}.g_idx holds group {low if low < 0 else high}; with {scales.shape[0]} groups the accepted "
                f"values are 0 to {scales.shape[0] - 1}: the checkpoint is damaged"
            )


def zero_format(
    qweight: Tensor, qzeros: Tensor, spec: QuantSpec, out_features: int, g_idx: Tensor | None = None
) -> str | None:
    """The format in which zeros really are stored, where their values show it; None where they do not.

    Some writers label v2 zeros as v1 and the other way round. Symmetric zeros tell by their value. Asymmetric
    ones tell by the codes: weights average to about zero, so codes average to the zero point; an answer is only
    given where one format explains that mean to a quarter of a step and the other is off by three quarters.

    Args:
        qweight, qzeros: canonical tensors, at least their first columns.
        spec: bits and sym; its checkpoint_format is not looked at.
        out_features: `N`.
        g_idx: int `[K]`, by which a zero counts as often as inputs have it; without, all count alike. One that is
            damaged shows nothing; `check_values` tells what is wrong with it.
    """
    fields = packing.unpack_stream(qzeros, spec.bits, out_features)
    if not fields.numel() or not qweight.numel():
        return None
    if g_idx is not None and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < len(fields):
        return None
    if spec.sym:
        low, high = int(fields.min()), int(fields.max())
        middle = 2 ** (spec.bits - 1)
        if low == high and low in (middle - 1, middle):
            return FORMATS[low - middle + 1]
    columns = min(256, out_features)
    in_features = qweight.shape[0] * WORD // spec.bits if g_idx is None else g_idx.numel()
    fields = fields[:, :columns] if g_idx is None else fields[:, :columns][g_idx.long()]
    codes = packing.unpack_codes(qweight[:, :columns], spec.bits, in_features).float()
    # An 8-bit step is so small that a mean says nothing about one step; nor does a mean over few codes.
    if spec.bits == 8 or codes.numel() < 2 or float(codes.std()) * 4 > 0.25 * codes.numel() ** 0.5:
        return None
    offset = float(codes.mean() - fields.float().mean())  # about 1 in v1, about 0 in v2
    if abs(offset - 1) < 0.25 and abs(offset) > 0.75:
        return "gptq"
    if abs(offset) < 0.25 and abs(offset - 1) > 0.75:
        return "gptq_v2"
    return None


def agreed_format(label: str, evidence: Mapping[str, str | None]) -> str:
    """One format for a whole checkpoint from its label and what `zero_format` found per module.

    Raises:
        CheckpointError: modules that contradict each other.
    """
    found = {fmt: module for module, fmt in evidence.items() if fmt is not None}
    if len(found) > 1:
        raise CheckpointError(
            f"the zero points of {found['gptq']} are stored as v1 and those of {found['gptq_v2']} as v2; "
            "a checkpoint must hold one format: quantize it again"
        )
    fmt = next(iter(found), label)
    if fmt != label:
        logger.warning(
            "The checkpoint is labelled checkpoint_format=%s but its zero points are stored as %s; reading them as %s.",
            label, fmt, fmt,
        )  # fmt: skip
    return fmt


# A whole checkpoint, or a part of it; other names are other people's.
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


@contextmanager
def written_whole(directory: str | Path) -> Iterator[Path]:
    """Write a folder's files beside it and move them in when all are complete.

    Yields a new folder next to `directory`; on success its files replace those of the same name, `config.json`
    last, so that an interrupted save leaves either the old checkpoint or none that can be loaded. On an error
    nothing of it stays; what a killed process leaves goes with the next save.
    """
    target = Path(directory).resolve()  # what a link points to, which may lie on another disk
    existed = target.exists()
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target if existed and target.stat().st_dev != target.parent.stat().st_dev else target.parent
    with staged(beside, target.name, is_folder=True) as staging:
        yield staging
        target.mkdir(exist_ok=True)
        for path in staging.iterdir():
            if path.is_file() and (target / path.name).is_dir():
                raise ValueError(
                    f"{target / path.name} is a folder where a file is to be; remove it, or name another folder"
                )
        if existed:
            _remove_stale_shards(target, {path.name for path in staging.iterdir()})
        for path in sorted(staging.iterdir(), key=lambda p: (p.name == "config.json", p.name)):
            if path.is_dir():  # of files whose folder may be there already
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            else:
                os.replace(path, target / path.name)


def _remove_stale_shards(target: Path, written: set[str]) -> None:
    """An older save may have had other shards, which a reader would mix with the new ones."""
    if not any(name.endswith(".safetensors") for name in written):
        return
    shards = [p for p in target.glob("model*.safetensors") if _SHARD.fullmatch(p.name)]
    for path in [*shards, target / INDEX]:
        if path.name not in written:
            path.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON with sorted keys, but for the rules of `dynamic`, of which the first that matches
    counts."""
    path.write_text(json.dumps(_sorted(value), indent=2) + "\n", encoding="utf-8")


def _sorted(value: object, key: str = "") -> object:
    if isinstance(value, Mapping):
        return {k: _sorted(value[k], k) for k in (value if key == "dynamic" else sorted(value))}
    return [_sorted(item) for item in value] if isinstance(value, list | tuple) else value
