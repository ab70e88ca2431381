"""Write a quantized checkpoint as one GGUF file for llama.cpp, tensor by tensor."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..format.grid import QuantizedWeight
from ..format.spec import CheckpointError
from ..format.staging import staged
from .gguf_blocks import BLOCK, SIZES, TYPES, Choice, blocks, choose, rotary_order
from .gguf_meta import architecture, number, rope_factors, write_config, write_tokenizer
from .order import moved
from .source import Move, Source
from .stream import Converted, read_module, relative_error, require_kept

# llama.cpp's numbers of the commonest type, for general.file_type.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
_DENSE_TYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: its name there, its source, type, shape `[rows, columns]`, and why no block fits."""

    name: str
    source: str
    type: str
    shape: tuple[int, ...]
    order: Tensor | None
    quantized: bool
    reason: str = ""

    @property
    def nbytes(self) -> int:
        if self.type in SIZES:
            return self.shape[0] * self.shape[1] // BLOCK * SIZES[self.type]
        return int(torch.Size(self.shape).numel()) * _WIDTHS[self.type]


def file_of(out: str | Path) -> Path:
    """Where a GGUF file goes: `out` itself where it ends in .gguf, else `out/model.gguf`."""
    path = Path(out)
    return path if path.suffix == ".gguf" else path / "model.gguf"


def write_gguf(
    source: Source, out: str | Path, kind: str = "auto", progress: Callable[[Converted], None] | None = None
) -> tuple[list[Converted], list[str]]:
    """Write `source` as a GGUF file. Codes and scales go over as they are; see `gguf_blocks` for what fits where.

    A module that no block type holds is written as float16 and its note says why. Dense matrices keep their dtype,
    vectors become float32. Every module is read back by the `gguf` package and compared with its source.

    Args:
        source: see `open_source`; a Llama, Mistral, Qwen2 or Qwen3.
        out: a file ending in .gguf, or a folder, which gets model.gguf.
        kind: type of the quantized modules, one of `gguf_blocks.TYPES`.
        progress: called with every quantized module.

    Returns:
        What became of every module, and what else a user should know.

    Raises:
        ImportError: the gguf package is not installed.
        CheckpointError: an architecture, positions or a tokenizer that are not written; nothing is left at `out`.
    """
    if kind not in TYPES:
        raise ValueError(f"GGUF type {kind!r} is not supported; use one of {', '.join(TYPES)}")
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF files are written by the gguf library; install it: pip install gguf") from None
    if not source.modules:
        raise CheckpointError(f"{source.folder} is {source.layout}: it has no codes to write as GGUF")
    target = file_of(out)
    if target.is_dir() or target.parent.is_file():
        raise ValueError(f"OUT={str(out)!r}: {target} cannot be a file; name another")
    arch = architecture(source.config)
    planned = list(_planned(source, arch, kind))
    common = max(sorted({t.type for t in planned if t.quantized}), key=[t.type for t in planned if t.quantized].count)
    existed = target.parent.exists()
    target.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("gguf").setLevel(logging.WARNING)
    with ExitStack() as stack:
        if not existed:
            stack.callback(_remove_if_empty, target.parent)
        staging = stack.enter_context(staged(target.parent, target.name, is_folder=False))
        writer = gguf.GGUFWriter(staging, arch)
        stack.callback(writer.close)
        write_config(writer, source.config, source.folder.resolve().name, _FILE_TYPES[common])
        note = write_tokenizer(writer, source.folder, source.config)
        for tensor in planned:
            raw = gguf.GGMLQuantizationType[tensor.type]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw)
        factors = rope_factors(source.config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", tuple(factors.shape), np.dtype(np.float32), 4 * factors.numel())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = []
        for tensor in planned:
            data, outcome = _written(source, tensor)
            if outcome is not None:
                require_kept(outcome, f"GGUF's {tensor.type}")
            writer.write_tensor_data(data)
            if outcome is not None:
                done.append(outcome)
                if progress is not None:
                    progress(outcome)
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        writer.close()
        os.chmod(staging, 0o644)
        os.replace(staging, target)
    return done, [note] if note else []


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _planned(source: Source, arch: str, kind: str) -> Iterator[_Tensor]:
    """Every tensor of the file, in its order.

    Raises:
        CheckpointError: a tensor that the architecture has no name for.
    """
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    count = int(number(source.config, "num_hidden_layers"))
    if count > len(source.headers):  # the package would list names for all of them first
        raise CheckpointError(
            f"config.json: num_hidden_layers={count} is more than the checkpoint's {len(source.headers)} tensors"
        )
    names = gguf.get_tensor_name_map(numbers[arch], count)
    heads = int(number(source.config, "num_attention_heads"))
    kv_heads = int(number(source.config, "num_key_value_heads", heads))
    mixed = {"q_proj": heads, "k_proj": kv_heads} if arch == "llama" else {}
    belonging = {f"{module}.{leaf}" for module, leaves in source.modules.items() for leaf in leaves}

    def named(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise CheckpointError(f"{name} has no counterpart in GGUF's {arch}")
        return found

    def order(module: str, rows: int) -> Tensor | None:
        of = mixed.get(module.rpartition(".")[2])
        return None if of is None else rotary_order(rows, of)

    tied = bool(source.config.get("tie_word_embeddings")) and "lm_head" not in source.modules
    for name, info in source.headers.items():
        if name in belonging or name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue
        if info.dtype not in _DENSE_TYPES or not 1 <= len(info.shape) <= 2:
            raise CheckpointError(
                f"{name} has dtype {info.dtype} and shape {list(info.shape)}; GGUF has no such tensor"
            )
        dtype = _DENSE_TYPES[info.dtype] if len(info.shape) == 2 else "F32"
        yield _Tensor(named(name), name, dtype, info.shape, order(name.rpartition(".")[0], info.shape[0]), False)
    for module in source.modules:
        weight = read_module(source, module)
        chosen: Choice = choose(weight, kind)
        shape = tuple(weight.codes.shape)
        yield _Tensor(
            named(f"{module}.weight"), module, chosen.type, shape, order(module, shape[0]), True, chosen.reason
        )


def _written(source: Source, tensor: _Tensor) -> tuple[np.ndarray, Converted | None]:
    """A tensor's bytes, and for a quantized module how they compare with the source."""
    if not tensor.quantized:
        return _dense(source.dense(tensor.source), tensor), None
    import gguf

    weight: QuantizedWeight = read_module(source, tensor.source)
    if tensor.order is not None:
        weight = moved(weight, Move(rows=tensor.order))
    if tensor.type == "F16":
        half = torch.cat([weight.rows(rows).dequantize(torch.float16) for rows in weight.slabs()])
        error = relative_error(weight, lambda rows: half[rows].float())
        return half.numpy(), Converted(tensor.source, not error, error, f"dense float16: {tensor.reason}")
    data = blocks(weight, tensor.type)
    kind = gguf.GGMLQuantizationType[tensor.type]
    error = relative_error(weight, lambda rows: torch.from_numpy(gguf.dequantize(data[rows], kind)))
    exact_scales = torch.equal(weight.scales.half().float(), weight.scales.float())
    lost = [] if exact_scales else ["scales rounded to float16"]
    if tensor.type == "Q4_1":
        lost.append("scale times zero rounded to float16")
    return data, Converted(tensor.source, not error, error, " and ".join(lost) if error else "")


def _dense(value: Tensor, tensor: _Tensor) -> np.ndarray:
    if tensor.order is not None:
        value = value[tensor.order]
    if tensor.type == "BF16":
        return value.contiguous().view(torch.int16).numpy()
    return (value.float() if tensor.type == "F32" else value).contiguous().numpy()
