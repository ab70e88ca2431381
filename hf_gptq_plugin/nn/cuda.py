"""The ops on an NVIDIA GPU, by the CUDA library.

Which kernel computes a product is decided in the library (`kernels/cuda/rules.h`), by rules on its size:
few rows go to fused kernels, many to a dequantized weight and cuBLAS. Activations in fp32 always go that second way,
in fp32. All memory comes from torch's allocator, all work goes to the current stream, and nothing waits: a call on a
packed weight can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import itertools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import native, native_cuda
from ..format import tiles
from ..format.spec import words

BY_RULE = -1
_STREAMS, _COUNTERS = 64, 1024
# Arrival counters by device, zero between calls, one row for each stream.
_arenas: dict[torch.device, Tensor] = {}
_rows: dict[tuple[torch.device, int], int] = {}
_row_numbers = itertools.count()
_HERE = nullcontext()


def pack(
    qweight: Tensor, bits: int, group_size: int, g_idx: Tensor | None, groups: int, in_features: int
) -> tuple[Tensor, Tensor | None]:
    """Canonical words `[R, N]` as tiles, and the order of the rows (`format.tiles.row_order`)."""
    library, out_features = _library(qweight.device), qweight.shape[1]
    if words(in_features, bits) != qweight.shape[0]:
        raise ValueError(
            f"qweight has {qweight.shape[0]} rows of words; in_features={in_features} at {bits} bits has "
            f"{words(in_features, bits)}. Give KernelWeight its in_features"
        )
    order = tiles.row_order(g_idx, in_features, group_size, groups)
    if order is not None:
        order = order.to(qweight.device)
    inputs, _ = tiles.split_order(order, in_features)
    rows = in_features if inputs is None else inputs.numel()
    out = torch.empty(
        -(-out_features // tiles.PANEL), -(-rows // tiles.TILE), 4, 32 * bits,
        dtype=torch.int32, device=qweight.device,
    )  # fmt: skip
    source = qweight.contiguous()
    _arena(qweight.device)
    with _on(qweight.device):
        native_cuda.check(
            library.hf_gptq_cuda_repack(
                source.data_ptr(), native.pointer(inputs), out.data_ptr(),
                out_features, in_features, rows, bits, _stream(qweight.device),
            )
        )  # fmt: skip
    return out, order


def unpack(packed: Tensor, bits: int, order: Tensor | None, in_features: int, out_features: int) -> Tensor:
    """The inverse of `pack`: canonical words `[R, N]`; by the library, which must be there."""
    library = _library(packed.device)
    inputs, _ = tiles.split_order(order, in_features)
    rows = in_features if inputs is None else inputs.numel()
    row_of = None if inputs is None else tiles.row_of(inputs, in_features)
    out = torch.empty(words(in_features, bits), out_features, dtype=torch.int32, device=packed.device)
    with _on(packed.device):
        native_cuda.check(
            library.hf_gptq_cuda_unpack(
                packed.data_ptr(), native.pointer(row_of), out.data_ptr(),
                out_features, in_features, rows, bits, _stream(packed.device),
            )
        )  # fmt: skip
    return out


class Product:
    """`x @ W.T + bias` on a packed weight that is checked and described once, for any number of calls."""

    def __init__(self, in_features: int, *weight: Any) -> None:
        """`weight` are the arguments of the op.

        Raises:
            ValueError: shapes, dtypes or devices that do not belong together.
        """
        self._weight, self.tensors = _describe(in_features, *weight)
        self._pointer = ctypes.byref(self._weight)
        self.device = self.tensors[0].device
        self._library = _library(self.device)

    def multiply(self, x: Tensor, bias: Tensor | None, regime: int = BY_RULE) -> Tensor:
        """See `linear`; x is on the weight's device."""
        in_features, out_features = self._weight.K, self._weight.N
        if x.dim() < 1 or x.shape[-1] != in_features:
            raise ValueError(f"x has shape {tuple(x.shape)}; the weight has in_features={in_features}")
        if bias is not None:
            if bias.shape != (out_features,):
                raise ValueError(f"bias has shape {tuple(bias.shape)}; the weight has out_features={out_features}")
            if bias.device != x.device:
                raise ValueError(f"bias is on {bias.device}, x on {x.device}; move one of them")
            bias = bias.to(x.dtype).contiguous()
        count = x.numel() // in_features
        if count == 0:
            return x.new_empty((*x.shape[:-1], out_features))
        rows, stride = x, -(-in_features // 8) * 8 if count == 1 else in_features
        if not x.is_contiguous():
            rows = x.reshape(-1, in_features)
            if rows.stride(-1) != 1:
                rows = rows.contiguous()
            stride = rows.stride(0) if count > 1 else stride
        dtype = native_cuda.DTYPES[x.dtype]
        plain = rows.data_ptr() % 16 == 0 and stride % 8 == 0
        plan = native_cuda.Plan()
        with _on(self.device):
            native_cuda.check(
                self._library.hf_gptq_cuda_plan(self._pointer, dtype, count, plain, regime, ctypes.byref(plan))
            )
            if plan.regime == native_cuda.DENSE:
                return torch.nn.functional.linear(x, self.dequantize(x.dtype), bias)
            out = x.new_empty((*x.shape[:-1], out_features))
            scratch = x.new_empty(plan.scratch_bytes, dtype=torch.uint8) if plan.scratch_bytes else None
            stream = _stream(self.device)
            counters, _held = _counters(self.device, stream, plan.counters)
            native_cuda.check(
                self._library.hf_gptq_cuda_linear(
                    self._pointer, rows.data_ptr(), dtype, count, stride, native.pointer(bias), out.data_ptr(), regime,
                    native.pointer(scratch), plan.scratch_bytes, counters, stream,
                )
            )  # fmt: skip
        return out

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense weight `[N, K]`, computed in fp32 and rounded once to `dtype`."""
        out = torch.empty(self._weight.N, self._weight.K, dtype=dtype, device=self.device)
        with _on(self.device):
            native_cuda.check(
                self._library.hf_gptq_cuda_dequantize(
                    self._pointer, out.data_ptr(), native_cuda.DTYPES[dtype], self._weight.K, _stream(self.device)
                )
            )
        return out


def linear(x: Tensor, bias: Tensor | None, *weight: Any, regime: int = BY_RULE) -> Tensor:
    """`x @ W.T + bias` on a packed weight, whose arguments are those of the op.

    Args:
        x: fp16, bf16 or fp32 `[..., K]`.
        bias: `[N]` or None.
        regime: an `hf_gptq_cuda_regime` in place of the rules, for tests and measurements.
    """
    return Product(x.shape[-1], *weight).multiply(x, bias, regime)


def dequantize(in_features: int, dtype: torch.dtype, *weight: Any) -> Tensor:
    """The dense weight `[N, K]` of a packed one, computed in fp32 and rounded once to `dtype`."""
    return Product(in_features, *weight).dequantize(dtype)


def _describe(
    in_features: int, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, g_idx: Tensor | None,
    perm: Tensor | None, bits: int, group_size: int, zero_offset: int,
) -> tuple[native_cuda.Weight, tuple[Tensor, ...]]:  # fmt: skip
    """The C description of a packed weight, and the tensors that must live while it is used.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together; native code never sees them.
    """
    groups, out_features = scales.shape
    inputs, runs = tiles.split_order(perm, in_features)
    rows = in_features if inputs is None else inputs.numel()
    run = group_size if runs is None else tiles.SLICE
    shape = (-(-out_features // tiles.PANEL), -(-rows // tiles.TILE), 4, 32 * bits)
    if qweight.dtype != torch.int32 or tuple(qweight.shape) != shape:
        raise ValueError(
            f"qweight is {qweight.dtype} {tuple(qweight.shape)}; bits={bits}, in_features={in_features}, "
            f"out_features={out_features} and {rows} rows need int32 {shape}"
        )
    if runs is None and (run < 1 or groups < -(-rows // run)):
        raise ValueError(f"scales has {groups} groups; in_features={in_features} and group_size={run} need more")
    if runs is not None and (runs.numel() * run != rows or rows < in_features):
        raise ValueError(f"perm has {rows + runs.numel()} entries, which is no order of {in_features} rows")
    if scales.dtype not in native_cuda.DTYPES:
        raise ValueError(f"scales has dtype {scales.dtype}; accepted: float32, float16, bfloat16")
    if qzeros is not None and (qzeros.dtype != torch.int32 or qzeros.shape != (groups, words(out_features, bits))):
        raise ValueError(
            f"qzeros is {qzeros.dtype} {tuple(qzeros.shape)}; it must be int32 {(groups, words(out_features, bits))}"
        )
    for name, tensor in (("scales", scales), ("qzeros", qzeros), ("perm", perm)):
        if tensor is not None and tensor.device != qweight.device:
            raise ValueError(f"{name} is on {tensor.device}, qweight on {qweight.device}; they must be on one device")
    keep = [_aligned(qweight), _aligned(scales)]
    described = native_cuda.Weight(
        tiles=keep[0].data_ptr(),
        scales=keep[1].data_ptr(),
        N=out_features,
        K=in_features,
        rows=rows,
        G=groups,
        group_size=run,
        bits=bits,
        scale_dtype=native_cuda.DTYPES[scales.dtype],
        zero_offset=zero_offset,
    )
    for name, tensor in (("qzeros", qzeros), ("perm", inputs), ("group_map", runs)):
        if tensor is not None:
            keep.append(tensor.contiguous())
            setattr(described, name, keep[-1].data_ptr())
    return described, tuple(keep)


def _library(device: torch.device) -> ctypes.CDLL:
    library = native_cuda.library(device)
    if library is None:
        raise ValueError(f"there is no CUDA library for {device}: {native_cuda.problem(device)}")
    return library


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, at an address that 16 divides, as torch's own allocations are."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _stream(device: torch.device) -> int:
    # What torch's own compiler calls for it: a Stream object costs more than a launch.
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def _on(device: torch.device) -> Any:
    here = device.type != "cuda" or device.index == torch.cuda.current_device()
    return _HERE if here else torch.cuda.device(device)


def _arena(device: torch.device) -> Tensor:
    """The counters of a device, made at the first call."""
    if device not in _arenas:
        _arenas[device] = torch.zeros(_STREAMS, _COUNTERS, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams may be the first to use them
    return _arenas[device]


def _counters(device: torch.device, stream: int, count: int) -> tuple[int | None, Tensor | None]:
    """The address of `count` zeros that no other kernel uses at the same time, and what must live meanwhile.

    A graph gets its own: it may run beside others, and on another stream than the one that it was captured on.
    """
    if not count:
        return None, None
    if count > _COUNTERS or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return _own_counters(device, count)
    row = _rows.get((device, stream))
    if row is None:  # numbers may be left out: another thread can be here, too
        row = _rows.setdefault((device, stream), next(_row_numbers))
    if row >= _STREAMS:
        return _own_counters(device, count)
    arena = _arena(device)  # a view of the row would take longer than all the rest
    return arena.data_ptr() + row * _COUNTERS * arena.element_size(), arena


def _own_counters(device: torch.device, count: int) -> tuple[int, Tensor]:
    counters = torch.zeros(count, dtype=torch.int32, device=device)
    return counters.data_ptr(), counters
