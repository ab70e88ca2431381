"""The ops that every stack calls: `hf_gptq::linear`, its transpose for gradients, and `hf_gptq::dequantize`.

Each has a short PyTorch reference, which is also what runs on devices without a kernel of ours; on the CPU the
native library takes over, on NVIDIA GPUs the CUDA library (`nn/cuda.py`). Neither mutates nor aliases its arguments.
The choice of a kernel lies inside the op, so that a traced graph never branches on the number of tokens.

On the CPU the native library itself is `hf_gptq::linear`, with no Python between PyTorch and the kernel, if both are
new enough; `hf_gptq::linear_checked` is the same in Python, for weights in other layouts, and says what is wrong.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import native, native_cuda
from ..format import packing, tiles
from ..format.grid import dequantize as dequantize_codes
from ..format.grid import natural_groups
from ..format.spec import BITS, QuantSpec, words
from . import cuda

# The tensors of a weight, in the order of the ops' arguments.
WEIGHT_TENSORS = ("qweight", "scales", "qzeros", "g_idx", "perm")
_WEIGHT = (
    "Tensor qweight, Tensor scales, Tensor? qzeros, Tensor? g_idx, Tensor? perm, "
    "int bits, int group_size, int zero_offset"
)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LIBRARY = torch.library.Library("hf_gptq", "DEF")
_LIBRARY.define(f"linear(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor")
_LIBRARY.define(f"linear_checked(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor")
_LIBRARY.define(f"linear_transposed(Tensor x, int in_features, {_WEIGHT}) -> Tensor")
_LIBRARY.define(f"dequantize(int in_features, ScalarType dtype, {_WEIGHT}) -> Tensor")


@dataclass(frozen=True)
class KernelWeight:
    """A quantized weight `[N, K]` as the ops take it.

    Args:
        qweight: int32, canonical `[R, N]`, blocked `[ceil(N / 16), R, 16]` for the CPU, or tiles
            `[ceil(N / 64), ceil(rows / 64), 4, 32 * bits]` for GPUs (`format.tiles`).
        scales: fp16, bf16 or fp32 `[G, N]`.
        qzeros: canonical int32 `[G, words(N)]`, or None where every zero is `2**(bits - 1)`.
        g_idx: int32 `[K]`, or None where it is `k // group_size`.
        perm: int32 `[K]`, or None: row `i` of the codes belongs to input feature `perm[i]`. Rows sorted by
            group let the kernels walk whole groups. With tiles also the longer form of `format.tiles.row_order`.
        bits: width of a code.
        group_size: input features per group where g_idx is None, never -1.
        zero_offset: what is added to a field of qzeros.
        in_features: `K`, or 0 where nobody packs or unpacks.
    """

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor | None
    g_idx: Tensor | None
    perm: Tensor | None
    bits: int
    group_size: int
    zero_offset: int
    in_features: int = 0

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The ops' trailing arguments, in their order."""
        return (
            self.qweight, self.scales, self.qzeros, self.g_idx, self.perm,
            self.bits, self.group_size, self.zero_offset,
        )  # fmt: skip

    @classmethod
    def from_canonical(
        cls, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, spec: QuantSpec, in_features: int
    ) -> KernelWeight:
        """Read a checkpoint's tensors as they lie, leaving out what says nothing."""
        trivial = g_idx is None or bool(torch.equal(g_idx, natural_groups(in_features, spec.group_size, g_idx.device)))
        zeros = packing.unpack_zeros(qzeros, spec.bits, spec.zero_offset, scales.shape[1])
        return cls(
            qweight=qweight,
            scales=scales,
            qzeros=None if bool((zeros == 2 ** (spec.bits - 1)).all()) else qzeros,
            g_idx=None if trivial else g_idx,
            perm=None,
            bits=spec.bits,
            group_size=spec.width(in_features),
            zero_offset=spec.zero_offset,
            in_features=in_features,
        )

    def packed(self) -> KernelWeight:
        """In the layout that the kernels of its device like best.

        On the CPU bits of the result do not depend on it where groups are natural.
        """
        if self.is_packed:
            return self
        qweight, order = self.canonical_qweight(), None
        if native_cuda.library(qweight.device) is not None:
            qweight, order = cuda.pack(
                qweight, self.bits, self.group_size, self.g_idx, self.scales.shape[0], self.in_features
            )
            return replace(self, qweight=qweight, perm=order)
        if self.g_idx is not None:
            order = torch.argsort(self.g_idx, stable=True).to(torch.int32)
        if qweight.device.type == "cpu" and native.library() is not None:
            qweight = _repack(qweight, self.bits, order)
        elif order is not None:
            qweight = packing.permute_rows(qweight, self.bits, order.long())
        return replace(self, qweight=qweight, perm=order)

    @property
    def is_packed(self) -> bool:
        """Whether it lies as `packed` would lay it out: not so after a move to another device."""
        device = self.qweight.device
        if native_cuda.library(device) is not None:
            return self.qweight.dim() == 4
        if self.g_idx is not None and self.perm is None:
            return False
        blocked = device.type == "cpu" and native.library() is not None
        return self.qweight.dim() == (3 if blocked else 2)

    def outputs(self, low: int, high: int) -> KernelWeight:
        """The part of the weight that makes outputs `low` to `high - 1`, sharing its memory.

        Raises:
            ValueError: `low` is not a multiple of 64, where words of zeros and all blocks of columns begin.
        """
        if low % tiles.PANEL or low < 0:
            raise ValueError(f"low={low} must be a multiple of {tiles.PANEL}, where blocks of columns begin")
        high = min(high, self.scales.shape[1])
        if self.qweight.dim() == 2:
            qweight = self.qweight[:, low:high]
        else:
            width = packing.BLOCK if self.qweight.dim() == 3 else tiles.PANEL
            qweight = self.qweight[low // width : -(-high // width)]
        fields = slice(words(low, self.bits), words(high, self.bits))
        qzeros = None if self.qzeros is None else self.qzeros[:, fields]
        return replace(self, qweight=qweight, scales=self.scales[:, low:high], qzeros=qzeros)

    def canonical_qweight(self) -> Tensor:
        """qweight as a checkpoint stores it, `[R, N]`."""
        if self.qweight.dim() == 4:
            return _from_tiles(self.qweight, self.perm, self.bits, self.in_features, self.scales.shape[1])
        qweight = packing.to_canonical(self.qweight, self.scales.shape[1])
        if self.perm is not None:
            qweight = packing.permute_rows(qweight, self.bits, torch.argsort(self.perm.long()))
        return qweight


def linear(x: Tensor, weight: KernelWeight, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias` on a quantized weight.

    Args:
        x: fp32, bf16 or fp16 `[..., K]`.
        weight: the weight `[N, K]`.
        bias: `[N]` in x's dtype, or None.

    Returns:
        `[..., N]` in x's dtype. On the CPU kernel a row's bits depend on that row alone.

    Raises:
        ValueError: x has another dtype, or other features than the weight, where that names its `in_features`; tensors
            on several devices.
    """
    _check_floats(x)
    # The op sees words, of several features.
    if x.dim() < 1 or (weight.in_features and x.shape[-1] != weight.in_features):
        raise ValueError(f"x has shape {tuple(x.shape)}; the weight has in_features={weight.in_features}")
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        return _with_tangent(x, weight, bias)
    return torch.ops.hf_gptq.linear(x, bias, *weight.arguments)


def _check_floats(x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise ValueError(f"x has dtype {x.dtype}; accepted: float32, bfloat16, float16 and, slowly, float64")


def _with_tangent(x: Tensor, weight: KernelWeight, bias: Tensor | None) -> Tensor:
    """`linear` in forward-mode differentiation: it is linear in x, and plus the bias."""
    x, by_x = forward_ad.unpack_dual(x)
    bias, by_bias = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    y = torch.ops.hf_gptq.linear(x, bias, *weight.arguments)
    if by_x is None and by_bias is None:
        return y
    tangent = torch.zeros_like(y) if by_x is None else torch.ops.hf_gptq.linear(by_x, None, *weight.arguments)
    return forward_ad.make_dual(y, tangent if by_bias is None else tangent + by_bias)


class PreparedWeight:
    """A weight ready for its kernel, for a caller that multiplies by it again and again.

    Checking and describing a weight, and PyTorch's way to an op that is written in Python, take longer than the product
    of a small layer with one token.
    """

    def __init__(self, weight: KernelWeight) -> None:
        """`weight` must be `packed` and name its `in_features`.

        Raises:
            ValueError: shapes or dtypes that do not belong together.
        """
        tensors: tuple[Tensor | None, ...]
        if weight.qweight.dim() == 4:
            product = cuda.Product(weight.in_features, *weight.arguments)
            self._multiply, tensors = product.multiply, product.tensors
        else:
            described, tensors = _describe(weight.in_features, *weight.arguments)
            self._multiply = functools.partial(_multiply, described)
        given = [t for t in weight.arguments[:5] if t is not None]
        self._device = weight.qweight.device
        self._pointers = [(t, t.data_ptr, t.data_ptr(), t.dtype) for t in given]
        # Copies, made of tensors that are not contiguous, would not follow their values.
        memory = {t.untyped_storage().data_ptr() for t in given}
        self._follows = all(t is None or t.untyped_storage().data_ptr() in memory for t in tensors)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """What `linear` gives, or None where it must be asked: something watches ops (gradients, tracing, a profiler),
        x is not a plain tensor on the weight's device in a dtype of the kernels, or the weight's memory has been
        exchanged."""
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or type(x) is not Tensor
            or x.dtype not in native.DTYPES
            or x.device != self._device
            or x.is_neg()
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._get_tracing_state() is not None
            or torch.autograd._profiler_enabled()
            or forward_ad._current_level >= 0
            or not self._follows
        ):
            return None
        for tensor, address, known, dtype in self._pointers:
            if address() != known or tensor.dtype != dtype:
                return None
        return self._multiply(x, bias)


def linear_transposed(x: Tensor, weight: KernelWeight, in_features: int) -> Tensor:
    """`x @ W`, what carries a gradient from a layer's output back to its input.

    Args:
        x: fp32, bf16 or fp16 `[..., N]`.
        weight: the weight `[N, K]`.
        in_features: `K`.

    Returns:
        `[..., K]` in x's dtype. On the CPU kernel a row's bits depend on that row alone.

    Raises:
        ValueError: x has another dtype, or other features than the weight has outputs.
    """
    _check_floats(x)
    return torch.ops.hf_gptq.linear_transposed(x, in_features, *weight.arguments)


def dequantize(weight: KernelWeight, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight `[N, K]` that the codes stand for, computed in fp32 and rounded once to `dtype`."""
    return torch.ops.hf_gptq.dequantize(in_features, dtype, *weight.arguments)


def _dequantize_reference(
    in_features: int, dtype: torch.dtype, qweight: Tensor, scales: Tensor, qzeros: Tensor | None,
    g_idx: Tensor | None, perm: Tensor | None, bits: int, group_size: int, zero_offset: int,
) -> Tensor:  # fmt: skip
    out_features = scales.shape[1]
    if qweight.dim() == 4:
        qweight, perm = _from_tiles(qweight, perm, bits, in_features, out_features), None
    codes = packing.unpack_codes(packing.to_canonical(qweight, out_features), bits, in_features)
    if perm is not None:
        codes = codes[:, torch.argsort(perm.long())]
    if qzeros is None:
        zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.int32)
    else:
        zeros = packing.unpack_zeros(qzeros, bits, zero_offset, out_features)
    group = natural_groups(in_features, group_size, scales.device) if g_idx is None else g_idx
    return dequantize_codes(codes, scales, zeros, group, dtype)


def _linear_reference(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    return torch.nn.functional.linear(x, _dequantize_reference(x.shape[-1], x.dtype, *weight), bias)


def _from_tiles(qweight: Tensor, perm: Tensor | None, bits: int, in_features: int, out_features: int) -> Tensor:
    """Tiles to canonical words `[R, N]`, on any device."""
    if native_cuda.library(qweight.device) is not None:
        return cuda.unpack(qweight, bits, perm, in_features, out_features)
    codes = tiles.unpack_tiles(qweight, bits)[:out_features]
    inputs, _ = tiles.split_order(perm, in_features)
    codes = codes[:, :in_features] if inputs is None else codes[:, tiles.row_of(inputs, in_features).long()]
    return packing.pack_codes(codes, bits)


def _for_cuda(in_features: int, weight: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a weight as tiles. Layers pack when they are loaded; this is for weights that did not."""
    if weight[0].dim() == 4:
        return weight
    return replace(KernelWeight(*weight), in_features=in_features).packed().arguments


def _dequantize_cuda(in_features: int, dtype: torch.dtype, *weight: Any) -> Tensor:
    if native_cuda.library(weight[0].device) is None or dtype not in native_cuda.DTYPES:
        return _dequantize_reference(in_features, dtype, *weight)
    return cuda.dequantize(in_features, dtype, *_for_cuda(in_features, weight))


def _linear_cuda(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    if native_cuda.library(x.device) is None or x.dtype not in native_cuda.DTYPES:
        return _linear_reference(x, bias, *weight)
    _check_devices(x, bias=bias)
    check_weight(x, weight)  # a kernel would read another device's memory
    return cuda.linear(x, bias, *_for_cuda(x.shape[-1], weight))


def _linear_transposed_reference(x: Tensor, in_features: int, *weight: Any) -> Tensor:
    return x @ torch.ops.hf_gptq.dequantize(in_features, x.dtype, *weight)


def _dequantize_cpu(in_features: int, dtype: torch.dtype, *weight: Any) -> Tensor:
    if weight[0].dim() == 4:  # packed on a GPU that is gone, or for an emulated one
        return _dequantize_cuda(in_features, dtype, *weight)
    library = native.library()
    if library is None or dtype not in native.DTYPES:
        return _dequantize_reference(in_features, dtype, *weight)
    described, keep = _describe(in_features, *weight)
    # A perm that names an input twice leaves another's column unwritten.
    made = torch.empty if keep[4] is None else torch.zeros
    out = made(described.N, in_features, dtype=dtype, device=weight[0].device)
    native.check(library.hf_gptq_dequantize(ctypes.byref(described), out.data_ptr(), native.DTYPES[dtype], in_features))
    del keep
    return out


def _linear_cpu(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    if weight[0].dim() == 4:
        return _linear_cuda(x, bias, *weight)
    library = native.library()
    if library is None or x.dtype not in native.DTYPES:
        return _linear_reference(x, bias, *weight)
    described, keep = _describe(x.shape[-1], *weight)
    out = _multiply(described, x, bias)
    del keep
    return out


def _multiply(described: native.Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    library = native.library()
    if library is None:
        raise native.NativeError(f"the native library is gone: {native.status().detail}")
    in_features, out_features = described.K, described.N
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}; the weight has in_features={in_features}")
    rows, count, stride = x, x.numel() // in_features, in_features
    if not x.is_contiguous():
        rows = x.reshape(-1, in_features)
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        stride = rows.stride(0)
    if bias is not None:
        if bias.shape != (out_features,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; the weight has out_features={out_features}")
        _check_devices(x, bias=bias)
        bias = bias.to(x.dtype).contiguous()
    out = x.new_empty((*x.shape[:-1], out_features))
    native.check(
        library.hf_gptq_linear(
            ctypes.byref(described), rows.data_ptr(), native.DTYPES[x.dtype], count, stride,
            native.pointer(bias), out.data_ptr(),
        )
    )  # fmt: skip
    return out


def _linear_transposed_cpu(x: Tensor, in_features: int, *weight: Any) -> Tensor:
    library = native.library()
    if weight[0].dim() == 4 or library is None or x.dtype not in native.DTYPES:
        return _linear_transposed_reference(x, in_features, *weight)
    described, keep = _describe(in_features, *weight)
    if x.shape[-1:] != (described.N,):
        raise ValueError(f"x has shape {tuple(x.shape)}; the weight has out_features={described.N}")
    rows = x.reshape(-1, described.N)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    # As above: what a perm that names an input twice leaves out.
    out = (x.new_empty if keep[4] is None else x.new_zeros)((*x.shape[:-1], in_features))
    native.check(
        library.hf_gptq_linear_transposed(
            ctypes.byref(described), rows.data_ptr(), native.DTYPES[x.dtype], rows.shape[0], rows.stride(0),
            out.data_ptr(),
        )
    )  # fmt: skip
    del keep
    return out


def _describe(
    in_features: int, qweight: Tensor, scales: Tensor, qzeros: Tensor | None, g_idx: Tensor | None,
    perm: Tensor | None, bits: int, group_size: int, zero_offset: int,
) -> tuple[native.Weight, tuple[Tensor | None, ...]]:  # fmt: skip
    """The C description of a weight, and the tensors that must live while it is used.

    Raises:
        ValueError: shapes or dtypes that do not belong together; native code never sees them.
    """
    if bits not in BITS or zero_offset not in (0, 1) or scales.dim() != 2:
        raise ValueError(
            f"bits={bits}, zero_offset={zero_offset} and scales of shape {tuple(scales.shape)} are no weight; accepted "
            "are bits 2, 3, 4 or 8, zero_offset 0 or 1, and scales [G, N]"
        )
    groups, out_features = scales.shape
    if in_features < 1 or out_features < 1:
        raise ValueError(f"in_features={in_features}, out_features={out_features}; both must be 1 at least")
    rows = words(in_features, bits)
    blocks = -(-out_features // packing.BLOCK)
    if qweight.dtype != torch.int32 or tuple(qweight.shape) not in (
        (rows, out_features),
        (blocks, rows, packing.BLOCK),
    ):
        raise ValueError(
            f"qweight is {qweight.dtype} {tuple(qweight.shape)}; bits={bits}, in_features={in_features} and "
            f"out_features={out_features} need int32 {(rows, out_features)} or {(blocks, rows, packing.BLOCK)}"
        )
    if g_idx is None and (group_size < 1 or groups != -(-in_features // group_size)):
        raise ValueError(
            f"scales has {groups} groups; in_features={in_features} and group_size={group_size} need another number"
        )
    if scales.dtype not in native.DTYPES:
        raise ValueError(f"scales has dtype {scales.dtype}; accepted: float32, float16, bfloat16")
    for name, tensor, shape in (
        ("qzeros", qzeros, (groups, words(out_features, bits))),
        ("g_idx", g_idx, (in_features,)),
        ("perm", perm, (in_features,)),
    ):
        if tensor is not None and (tensor.dtype != torch.int32 or tuple(tensor.shape) != shape):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be int32 {shape}")
    keep = tuple(t if t is None else t.contiguous() for t in (qweight, scales, qzeros, g_idx, perm))
    blocked = qweight.dim() == 3
    described = native.Weight(
        qweight=native.pointer(keep[0]),
        block_stride=rows * packing.BLOCK if blocked else packing.BLOCK,
        row_stride=packing.BLOCK if blocked else out_features,
        scales=native.pointer(keep[1]),
        qzeros=native.pointer(keep[2]),
        g_idx=native.pointer(keep[3]),
        perm=native.pointer(keep[4]),
        K=in_features,
        N=out_features,
        G=groups,
        group_size=group_size,
        bits=bits,
        scale_dtype=native.DTYPES[scales.dtype],
        zero_offset=zero_offset,
    )
    return described, keep


def _repack(qweight: Tensor, bits: int, order: Tensor | None) -> Tensor:
    """Canonical to blocked by the native library, row `order[i]` of the codes in place `i`.

    Raises:
        ValueError: qweight is not int32, or not on the CPU.
    """
    library = native.library()
    if library is None:
        raise native.NativeError(f"repacking needs the native library: {native.status().detail}")
    if qweight.dtype != torch.int32 or qweight.device.type != "cpu":
        raise ValueError(f"qweight is {qweight.dtype} on {qweight.device}; it must be int32, on the CPU to be repacked")
    rows, columns = qweight.shape
    source = qweight.contiguous()
    order = None if order is None else order.to(qweight.device, torch.int32).contiguous()
    out = qweight.new_empty(-(-columns // packing.BLOCK), rows, packing.BLOCK)
    native.check(
        library.hf_gptq_repack(
            source.data_ptr(), packing.BLOCK, columns,
            out.data_ptr(), rows * packing.BLOCK, packing.BLOCK, rows, columns,
            native.pointer(order), 0 if order is None else order.numel(), bits,
        )
    )  # fmt: skip
    return out


def _check_devices(x: Tensor, **tensors: Tensor | None) -> None:
    """All on one device. What is on `meta` has no values: PyTorch takes the fakes below for it, whatever else is real.

    Raises:
        ValueError: one is elsewhere.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{name} is on {tensor.device}, x on {x.device}; "
                + ("load its values first" if tensor.is_meta else "move one of them")
            )


def check_weight(x: Tensor, weight: Sequence[Any]) -> None:
    """`_check_devices` of the tensors of an op's trailing arguments."""
    _check_devices(x, **dict(zip(WEIGHT_TENSORS, weight, strict=False)))


def _linear_fake(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    _check_devices(x, bias=bias)
    check_weight(x, weight)
    return x.new_empty((*x.shape[:-1], weight[1].shape[1]))


def _linear_transposed_fake(x: Tensor, in_features: int, *weight: Any) -> Tensor:
    check_weight(x, weight)
    return x.new_empty((*x.shape[:-1], in_features))


def _dequantize_fake(in_features: int, dtype: torch.dtype, *weight: Any) -> Tensor:
    check_weight(weight[1], weight)
    return weight[1].new_empty((weight[1].shape[1], in_features), dtype=dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _bias, *weight = inputs
    ctx.save_for_backward(*weight[:5])
    ctx.numbers = weight[5:]
    ctx.in_features = x.shape[-1]


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx = g·Ŵ and db = Σ g; codes, scales and zeros get none."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.hf_gptq.linear_transposed(grad, ctx.in_features, *ctx.saved_tensors, *ctx.numbers)
    if ctx.needs_input_grad[1]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return (grad_x, grad_bias, *(None,) * 8)


def _save_transposed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, _in_features, *weight = inputs
    ctx.save_for_backward(*weight[:5])
    ctx.numbers = weight[5:]


def _transposed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of a gradient: the product forward again."""
    grad_x = torch.ops.hf_gptq.linear(grad, None, *ctx.saved_tensors, *ctx.numbers) if ctx.needs_input_grad[0] else None
    return (grad_x, *(None,) * 9)


for _name in ("linear", "linear_checked"):
    _LIBRARY.impl(_name, _linear_reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _linear_cuda, "CUDA")
    torch.library.register_fake(f"hf_gptq::{_name}", _linear_fake, lib=_LIBRARY)
    torch.library.register_autograd(
        f"hf_gptq::{_name}", _linear_backward, setup_context=_save_for_backward, lib=_LIBRARY
    )
_LIBRARY.impl("linear_checked", _linear_cpu, "CPU")
if not native.register_linear():
    _LIBRARY.impl("linear", _linear_cpu, "CPU")
_LIBRARY.impl("linear_transposed", _linear_transposed_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_transposed", _linear_transposed_cpu, "CPU")
torch.library.register_fake("hf_gptq::linear_transposed", _linear_transposed_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "hf_gptq::linear_transposed", _transposed_backward, setup_context=_save_transposed, lib=_LIBRARY
)
_LIBRARY.impl("dequantize", _dequantize_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantize", _dequantize_cpu, "CPU")
_LIBRARY.impl("dequantize", _dequantize_cuda, "CUDA")
torch.library.register_fake("hf_gptq::dequantize", _dequantize_fake, lib=_LIBRARY)
