"""Rewrite a checkpoint in another layout, module by module: memory holds one shard that is being filled."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..format.checkpoint import write_json, written_whole
from ..format.grid import QuantizedWeight, natural_groups
from ..format.spec import CheckpointError, QuantSpec
from .layouts import Dense, Layout, layout
from .order import moved
from .source import INDEX, Source

# Whose dense layers are Conv1D, which stores `[K, N]`.
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
SHARD = 1_000_000_000  # bytes
_COMPARED = 1 << 20  # elements of a tensor that are compared at a time
# What goes along: no checkpoints of other frameworks, no model card, which describes the source.
_CARRIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".vocab", ".merges")
_NOT_CARRIED = ("config.json", "quantize_config.json", INDEX, "calibration.json")


@dataclass(frozen=True)
class Converted:
    """What became of one quantized module, or of a tensor beside them.

    Args:
        module: its name; of another tensor its whole name, "lm_head.weight".
        exact: every weight is bit for bit what it was, computed in fp32.
        error: norm of the difference relative to the norm of the weight.
        note: what was lost, or "".
    """

    module: str
    exact: bool
    error: float
    note: str


def convert(
    source: Source, out: str | Path, target: str, shard: int = SHARD, dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[Converted], None] | None = None,
) -> list[Converted]:  # fmt: skip
    """Write `source` in another layout, or in shards of another size.

    Every module is read back from what was written of it and compared with its source.

    Args:
        source: see `open_source`.
        out: folder to write; another one than the source's.
        target: one of `layouts.TARGETS`.
        shard: bytes per file; a tensor that is larger gets a file of its own.
        dtype: of dense weights.
        progress: called with every module.

    Returns:
        What became of every module, and of those other tensors whose values changed.

    Raises:
        CheckpointError: a module that the layout cannot hold; nothing is left at `out`.
    """
    folder = Path(out)
    if folder.is_file():
        raise ValueError(f"OUT={str(folder)!r} is a file; name a folder")
    if folder.exists() and folder.resolve() == source.folder.resolve():
        raise ValueError(f"OUT={str(folder)!r} is the source; name another folder")
    if shard < 1:
        raise ValueError(f"shard={shard} must be at least 1 byte")
    if not source.modules and target != source.layout:
        raise CheckpointError(f"{source.folder} is {source.layout}: there is nothing in it to convert to {target}")
    kind = layout(target, dtype)
    done: list[Converted] = []
    specs: dict[str, QuantSpec] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        belonging = {f"{module}.{leaf}" for module, leaves in source.modules.items() for leaf in leaves}
        for name in sorted(source.headers, key=lambda n: (source.headers[n].file, n)):
            if name not in belonging:
                value = source.dense(name)
                if target == "dense" and value.is_floating_point():
                    value, outcome = _rounded(name, value, dtype)
                    if not outcome.exact:
                        done.append(outcome)
                yield name, value
        for module in source.modules:
            weight = read_module(source, module)
            written = kind.write(module, weight)
            specs[module] = _spec(weight, kind)
            outcome = _compared(module, weight, written, kind, specs[module])
            require_kept(outcome, target)
            if isinstance(kind, Dense) and source.config.get("model_type") in _CONV1D:
                written = {leaf: tensor.T.contiguous() for leaf, tensor in written.items()}
            done.append(outcome)
            if progress is not None:
                progress(outcome)
            yield from ((f"{module}.{leaf}", value.contiguous()) for leaf, value in written.items())

    with written_whole(folder) as staging:
        _write_shards(staging, tensors(), shard)
        config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = {k: v for k, v in config["text_config"].items() if k != "quantization_config"}
        described = kind.config(specs, source.dense_linears) if specs else None
        if described is not None:
            config["quantization_config"] = described
            if target in ("gptq", "gptq_v2"):
                write_json(staging / "quantize_config.json", described)
        elif target == "dense":
            config["dtype"] = str(dtype).removeprefix("torch.")
            config.pop("torch_dtype", None)
        if target in ("awq",):
            config["dtype"] = "float16"
            config.pop("torch_dtype", None)
        write_json(staging / "config.json", config)
        for path in sorted(source.folder.iterdir()):
            carried = path.suffix in _CARRIED or path.name.upper().startswith(("LICENSE", "NOTICE"))
            if path.is_file() and carried and path.name not in _NOT_CARRIED:
                shutil.copyfile(path, staging / path.name)
    if described is None or target not in ("gptq", "gptq_v2"):
        (folder / "quantize_config.json").unlink(missing_ok=True)  # of what was there before
    return done


def read_module(source: Source, module: str) -> QuantizedWeight:
    """A quantized module, its spec saying no more than it needs: in act-order and asymmetric only where it is.

    Its channels are moved as `source.moves` says.

    Raises:
        CheckpointError: tensors that do not fit the spec.
    """
    kind = layout(source.layout)
    if isinstance(kind, Dense):
        raise CheckpointError(f"{module} is dense; there are no codes to convert")
    weight = kind.read(module, source.tensors(module), source.specs[module])
    if module in source.moves:
        weight = moved(weight, source.moves[module])
    spec = weight.spec
    trivial = torch.equal(weight.group, natural_groups(weight.group.numel(), spec.group_size))
    middle = bool((weight.zeros == 2 ** (spec.bits - 1)).all())
    return replace(weight, spec=replace(spec, desc_act=not trivial, sym=middle))


def _spec(weight: QuantizedWeight, kind: Layout) -> QuantSpec:
    fmt = kind.name if kind.name in ("gptq", "gptq_v2") else "gptq"
    return replace(weight.spec, checkpoint_format=fmt)


def _compared(
    module: str, weight: QuantizedWeight, written: Mapping[str, Tensor], kind: Layout, spec: QuantSpec
) -> Converted:
    """Read a module back from what was written and compare the weights in fp32."""
    if isinstance(kind, Dense):
        rounded = written["weight"]
        error = relative_error(weight, lambda rows: rounded[rows].float())
        lost = "weights rounded to " + str(kind.dtype).removeprefix("torch.")
    else:
        back = kind.read(module, written, spec)
        error = relative_error(weight, lambda rows: back.rows(rows).dequantize())
        lost = "scales rounded to float16"
    return Converted(module, not error, error, lost if error else "")


def _rounded(name: str, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Converted]:
    """A tensor that was never quantized in another dtype, and what it lost."""
    made = value.to(dtype)
    if not bool(torch.isfinite(made).all()) and bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{name} holds values that {dtype} cannot; choose another dtype")
    exact, difference, size = True, 0.0, 0.0
    for old, new in zip(value.flatten().split(_COMPARED), made.flatten().split(_COMPARED), strict=True):
        before, after = old.double(), new.double()
        exact = exact and torch.allclose(before, after, rtol=0, atol=0, equal_nan=True)
        difference += float((after - before).square().sum())
        size += float(before.square().sum())
    if exact:
        return made, Converted(name, True, 0.0, "")
    error = math.sqrt(difference / size) if size else math.inf
    return made, Converted(name, False, error, "rounded to " + str(dtype).removeprefix("torch."))


def require_kept(outcome: Converted, target: str) -> None:
    """Check that a module still is what it was, but for rounding.

    Raises:
        CheckpointError: scales or weights went out of what the layout's numbers hold.
    """
    if not outcome.error < 0.5:  # NaN, too
        raise CheckpointError(
            f"{outcome.module} would be lost: its relative error is {outcome.error:.3g} as {target}, whose numbers do "
            "not hold its scales; choose another target or dtype"
        )


def relative_error(weight: QuantizedWeight, given: Callable[[slice], Tensor]) -> float:
    """Norm of the difference relative to the norm of a weight; 0 only where every element is the same.

    Args:
        weight: `[N, K]`.
        given: for some rows, what they became, fp32 `[rows, K]`. Only some rows are in memory at a time.
    """
    if all(torch.equal(weight.rows(rows).dequantize(), given(rows)) for rows in weight.slabs()):
        return 0.0
    difference = size = 0.0
    for rows in weight.slabs():
        wanted = weight.rows(rows).dequantize()
        difference += float(torch.linalg.vector_norm(given(rows) - wanted, dtype=torch.float64)) ** 2
        size += float(torch.linalg.vector_norm(wanted, dtype=torch.float64)) ** 2
    return math.sqrt(difference / size) if size else math.inf


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], limit: int) -> None:
    """Tensors to `model.safetensors`, or to numbered files and an index where they are more than `limit` bytes."""
    files: list[Path] = []
    places: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        if held:
            files.append(folder / f"part-{len(files)}")
            save_file(held, files[-1], metadata={"format": "pt"})
            held.clear()
            size = 0

    for name, value in tensors:
        weight = value.numel() * value.element_size()
        if size and size + weight > limit:
            flush()
        held[name] = value
        places[name] = len(files)
        size += weight
        total += weight
    flush()
    if len(files) == 1:
        os.replace(files[0], folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for path, name in zip(files, names, strict=True):
        os.replace(path, folder / name)
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": {n: names[i] for n, i in places.items()}}
    write_json(folder / INDEX, index)
