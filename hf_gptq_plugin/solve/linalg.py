"""Dense linear algebra whose bits do not depend on the number of threads, which BLAS does not promise.

Everything falls back to PyTorch where the native library is missing or a tensor is not on the CPU.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from .. import native

_STORE, _ADD, _ADD_SYMMETRIC = 0, 1, 2  # enum hf_gptq_matmul_mode
_NOT_POSITIVE_DEFINITE = 14  # enum hf_gptq_error
_MOST_KEYS = 1 << 13  # whose scores are held at once
_FEW_KEYS = 1024  # where pairs of bf16 are multiplied one by one
_FEW_ROWS = 16  # for fewer, a weight in 16 bits is not worth converting


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a · b`, fp32 `[M, N]`, without gradient. A row has the same bits whatever the other rows are.

    Args:
        a: fp32 `[M, K]`, any strides.
        b: fp32 `[K, N]`, any strides.

    Raises:
        ValueError: other dtypes or shapes.
    """
    _require(a, b)
    library = _library_for(a, b)
    if library is None:
        return a @ b
    out = a.new_empty(a.shape[0], b.shape[1])
    _product(library, a, b, out, _STORE)
    return out


def add_gram(total: Tensor, left: Tensor, right: Tensor | None = None) -> None:
    """`total += leftᵀ · right` in place.

    Args:
        total: fp32 `[Ka, Kb]`, contiguous; symmetric if right is None.
        left: fp32 or bf16 `[T, Ka]`, any strides. Products of bf16 are exact, and their sums are fp32's; where the
            processor has instructions for it, they take half the time, elsewhere as long as fp32.
        right: `[T, Kb]`, as left; None stands for left, and takes about half the time.

    Raises:
        ValueError: other dtypes, shapes or strides.
    """
    other = left if right is None else right
    _require(left.T, other, torch.float32, torch.bfloat16)
    shape = (left.shape[1], other.shape[1])
    if total.dtype != torch.float32 or total.shape != shape or not total.is_contiguous():
        raise ValueError(f"total is {total.dtype} {tuple(total.shape)}; it must be float32 {shape}, contiguous")
    library = _library_for(total, left, other)
    if library is None:
        total.addmm_(left.T.float(), other.float())
        return
    if not multiplies_bf16():
        left = left.float()
        other = left if right is None else right.float()
    _product(library, left.T, other, total, _ADD_SYMMETRIC if right is None else _ADD)


def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x · weightᵀ`: what `torch.nn.functional.linear` computes, on the CPU without gradient natively in fp32, and in
    16 bits where the processor has no instructions for them and there are rows enough (exact products, fp32 sums,
    rounded once).

    Args:
        x: `[..., K]`.
        weight: `[N, K]`.

    Returns:
        `[..., N]`; computed natively, a row has the same bits whatever the other rows are.
    """
    library = _library_for(x, weight)
    graph = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    rows = x.numel() // max(x.shape[-1], 1)
    ours = x.dtype == torch.float32 or (
        x.dtype in native.DTYPES and rows >= _FEW_ROWS and not (x.dtype == torch.bfloat16 and multiplies_bf16())
    )
    if library is None or graph or not ours or x.dtype != weight.dtype or weight.dim() != 2:
        return torch.nn.functional.linear(x, weight)
    product = matmul(x.reshape(-1, x.shape[-1]).float(), weight.float().T)
    # No view for autograd, so that models may write into it, as into the output of torch's own product.
    return torch.ops.aten._unsafe_view(product.to(x.dtype), [*x.shape[:-1], len(weight)])  # type: ignore[no-any-return]


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, causal: bool = False
) -> Tensor | None:
    """Softmax attention in bf16 without gradient, natively, closer to the exact one than torch's; see `attends_faster`.
    Scores, powers and weighted sums are fp32, and rounded once in the end.

    Args:
        query: bf16 `[B, heads, Tq, D]`, any strides.
        key, value: `[B, heads or a divisor of it, Tk, D]`.
        scale: of scores; None for `D ** -0.5`.
        causal: whether query `i` sees keys `0 … i` only.

    Returns:
        bf16 as query, or None where PyTorch must be asked: on other devices, for other shapes and dtypes. A query has
        the same bits whatever the others are.
    """
    library, tensors = _library_for(query, key, value), (query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if (
        library is None
        or any(t.dtype != torch.bfloat16 or t.dim() != 4 or len(t) != len(query) or not t.numel() for t in tensors)
        or key.shape != value.shape
        or query.shape[-1] != key.shape[-1]
        or query.shape[-1] % 2
        or query.shape[1] % key.shape[1]
        or key.shape[2] > _MOST_KEYS
        or not 0 < scale < math.inf
        or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    ):
        return None
    shared = key.shape[0] * key.shape[1]
    alone = query.shape[2] == 1 and not causal  # then heads that share keys are queries of one head
    rows = query.reshape(shared, -1, query.shape[3]) if alone else query.flatten(0, 1)
    laid_out = [t if _in_pairs(t) else t.contiguous() for t in (rows, key.flatten(0, 1), value.flatten(0, 1))]
    heads, queries, width = rows.shape
    out = query.new_empty(queries, heads, width).transpose(0, 1)
    sides = [number for t in (*laid_out, out) for number in (t.data_ptr(), t.stride(0), t.stride(1))]
    native.check(library.hf_gptq_attention(*sides, heads, heads // shared, queries, key.shape[2], width, scale, causal))
    return out.reshape(query.shape)


def attends_faster(keys: int) -> bool:
    """Whether `attention` is faster than PyTorch's with so many keys: 2.5 times with AVX512-BF16, 1.9 times on AVX2."""
    isa = native.status().isa
    return isa in ("amx", "avx512bf16") or (keys <= _FEW_KEYS and isa in ("avx512f", "avx2"))


def _in_pairs(rows: Tensor) -> bool:
    """Whether the native library can read two numbers of a row at a time."""
    return rows.stride(2) == 1 and not (rows.stride(0) | rows.stride(1)) % 2 and rows.data_ptr() % 4 == 0


def multiplies_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices faster than fp32 ones."""
    has: Any = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(has())


def inverse_factor(matrix: Tensor, overwrite: bool = False) -> Tensor | None:
    """The upper triangular `U` with `matrix⁻¹ = Uᵀ · U`; None where the matrix is not positive definite in fp32.

    With the rows and columns reversed, an ordinary Cholesky factor is the reverse one, `H = R Rᵀ` with `R` upper
    triangular. Then `H⁻¹ = R⁻ᵀ R⁻¹`, so `U = R⁻¹` is the factor that is wanted: one factorization and one triangular
    inverse where the usual way takes a Cholesky, an inverse and a Cholesky.

    Args:
        matrix: fp32 `[K, K]`, symmetric.
        overwrite: whether the factor may take the matrix's place in memory. The matrix is lost then.

    Raises:
        ValueError: another dtype or shape.
    """
    if matrix.dtype != torch.float32 or matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"matrix is {matrix.dtype} {tuple(matrix.shape)}; it must be float32 and square")
    library = _library_for(matrix)
    if library is None:
        upper = _inverse_factor_reference(matrix)
    else:
        matrix = matrix.contiguous()
        upper = matrix if overwrite else torch.empty_like(matrix)
        code = library.hf_gptq_factorize(matrix.data_ptr(), len(matrix), upper.data_ptr())
        if code == _NOT_POSITIVE_DEFINITE:
            return None
        native.check(code)
    return upper if upper is not None and all_finite(upper) else None


def _inverse_factor_reference(matrix: Tensor) -> Tensor | None:
    lower, info = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if int(info) != 0:
        return None
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True).contiguous()


def solve_symmetric(matrices: Tensor, right: Tensor) -> Tensor:
    """`x` with `A x = b` of many small systems, in float64 and without pivoting, as positive definite ones allow.

    Args:
        matrices: `A`, float64 `[n, G, G]`, symmetric; below the diagonal never read.
        right: `b`, float64 `[n, G]`.

    Returns:
        float64 `[n, G]`; a singular system gives values that are not finite, or mean nothing.
    """
    library = _library_for(matrices, right)
    if library is None:
        upper = matrices.triu()
        return torch.linalg.solve_ex(upper + upper.triu(1).mT, right[..., None]).result[..., 0]
    matrices = matrices.clone(memory_format=torch.contiguous_format)
    right = right.clone(memory_format=torch.contiguous_format)
    native.check(library.hf_gptq_solve_symmetric(matrices.data_ptr(), right.data_ptr(), *right.shape))
    return right


def all_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no infinity, without temporaries of the tensor's size."""
    return all(math.isfinite(bound) for bound in torch.aminmax(values))  # NaN is handed on


def total(values: Tensor) -> float:
    """The sum of all elements, rounded once: no order of summation, no number of threads changes it."""
    return math.fsum(values.flatten().tolist())


def _require(a: Tensor, b: Tensor, *dtypes: torch.dtype) -> None:
    accepted = dtypes or (torch.float32,)
    if a.dtype != b.dtype or a.dtype not in accepted or a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        raise ValueError(
            f"cannot multiply {a.dtype} {tuple(a.shape)} by {b.dtype} {tuple(b.shape)}; both must be {names} matrices, "
            "and the columns of the one as many as the rows of the other"
        )


def _library_for(*tensors: Tensor) -> ctypes.CDLL | None:
    return native.library() if all(t.device.type == "cpu" for t in tensors) else None


def _product(library: ctypes.CDLL, a: Tensor, b: Tensor, out: Tensor, mode: int) -> None:
    native.check(
        library.hf_gptq_matmul(
            a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), a.shape[0], b.shape[1], a.shape[1],
            native.DTYPES[a.dtype], out.data_ptr(), out.stride(0), mode,
        )
    )  # fmt: skip
