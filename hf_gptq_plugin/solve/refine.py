"""What lowers a layer's error after, or before, the column loop. The format stays what it is.

All of it works on `tr((W - Ŵ) H (W - Ŵ)ᵀ)`, row by row, with `H` damped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from .linalg import matmul, solve_symmetric

_ROWS = 512  # rows whose [G, G] systems are held at once


def propagate(weight: Tensor, drift: Tensor, inverse_factor: Tensor, order: Tensor, strength: float) -> Tensor:
    """The weight to aim at, given that the inputs are those of a model already quantized up to here.

    The dense model computes `W x*`, this one sees `x`. `Σ (W x* - V x)²` is least for `V = W + W Cᵀ H⁻¹` with
    `C = Σ x (x* - x)ᵀ`; where another `z` is wanted of `V x`, for `V = W + D H⁻¹` with `D = Σ (z - W x) xᵀ`: where the
    output is added to an `r` that was `r*`, `z = W x* + r* - r`. Going the whole way fits the calibration text too
    closely, so part of it is taken.

    Args:
        weight: `W`, fp32 `[N, K]`.
        drift: `D`, fp32 `[N, K]`, see `Hessian.drift`.
        inverse_factor: upper factor of the inverse of the damped `H`, fp32 `[K, K]`, in solve order.
        order: the solve order, `[K]`.
        strength: which part of the way to go, 0 to 1.

    Returns:
        fp32 `[N, K]`.

    References:
        Li et al. 2025 (GPTAQ); Arai & Ichikawa 2025 (QEP).
    """
    moved = matmul(matmul(drift[:, order], inverse_factor.T), inverse_factor)
    out = weight.clone()
    out[:, order] += strength * moved
    return out


def descend(
    weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group: Tensor, bits: int, rounds: int
) -> tuple[Tensor, Tensor]:
    """Cyclic coordinate descent on the codes: each column in turn takes its best code given all others.

    Never raises the error.

    Args:
        weight: fp32 `[N, K]`.
        hessian: damped, fp32 `[K, K]`, columns as in weight.
        codes: uint8 `[N, K]`; not modified.
        scales, zeros: fp32 `[N, G]`.
        group: int32 `[K]`.
        bits: width of a code.
        rounds: passes over the columns; 0 only computes the error.

    Returns:
        codes, and the error of every row, float64 `[N]`.

    References:
        Behdin et al. 2023 (QuantEase).
    """
    library = native.library()
    if library is None or weight.device.type != "cpu":
        return _descend_reference(weight, hessian, codes, scales, zeros, group, bits, rounds)
    weight, hessian = weight.contiguous(), hessian.contiguous()
    scales, zeros = scales.float().contiguous(), zeros.float().contiguous()
    group, codes = group.to(torch.int32).contiguous(), codes.clone(memory_format=torch.contiguous_format)
    loss = weight.new_empty(len(weight), dtype=torch.float64)
    native.check(
        library.hf_gptq_descend(
            weight.data_ptr(), hessian.data_ptr(), scales.data_ptr(), zeros.data_ptr(), group.data_ptr(),
            codes.data_ptr(), loss.data_ptr(), *weight.shape, scales.shape[1], bits, rounds,
        )
    )  # fmt: skip
    return codes, loss


def _descend_reference(
    weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group: Tensor, bits: int, rounds: int
) -> tuple[Tensor, Tensor]:
    q, diagonal = codes.float(), hessian.diagonal()
    for _ in range(rounds):
        before = q.clone()
        pull = (weight - values(q, scales, zeros, group)) @ hessian
        for k, g in enumerate(group.tolist()):
            s, z = scales[:, g], zeros[:, g]
            target = (q[:, k] - z) * s + pull[:, k] / diagonal[k]
            best = (torch.round(target / s) + z).clamp_(0, 2**bits - 1)
            pull -= ((best - q[:, k]) * s)[:, None] * hessian[k]
            q[:, k] = best
        if torch.equal(q, before):
            break
    return q.to(torch.uint8), row_errors(weight - values(q, scales, zeros, group), hessian)


def refit_scales(
    weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, width: int, dtype: torch.dtype,
    errors: Tensor,
) -> Tensor:  # fmt: skip
    """The best scales for given codes, in closed form, where they lower a row's error once they are rounded.

    With `q` a row of codes less their zeros and `q_g` its part in group `g`, the error is a quadratic in the row's
    scales `s [G]`: its least lies where `A s = b`, `A[g, h] = q_g H q_hᵀ`, `b[g] = q_g H wᵀ`.

    Args:
        weight: fp32 `[N, K]`, groups adjacent.
        hessian: damped, fp32 `[K, K]`.
        codes: uint8 `[N, K]`.
        scales, zeros: fp32 `[N, G]`.
        width: columns per group; the last may be shorter.
        dtype: what scales are stored in.
        errors: every row's error with `scales`, `[N]`.

    Returns:
        scales fp32 `[N, G]`, exact in `dtype`; a row keeps its old ones where the new are not better or not usable.
    """
    out, columns = scales.clone(), weight.shape[1]
    for a in range(0, len(weight), _ROWS):
        rows = slice(a, a + _ROWS)
        q = codes[rows].float() - spread(zeros[rows], width, columns)
        matrix = group_systems(q, hessian, width)
        right = group_sums(matmul(weight[rows], hessian) * q, width)
        fitted = solve_symmetric(matrix.double(), right.double()).to(dtype).float()
        # Any scale does for codes that are all zero in a group: not to be found, it stays, and no other depends on it.
        fitted = torch.where(group_sums(q.abs(), width) > 0, fitted, scales[rows])
        usable = (torch.isfinite(fitted) & (fitted.abs() >= torch.finfo(dtype).tiny)).all(1)
        fitted = torch.where(usable[:, None], fitted, scales[rows])
        better = row_errors(weight[rows] - q * spread(fitted, width, columns), hessian) < errors[rows]
        out[rows] = torch.where((better & usable)[:, None], fitted, scales[rows])
    return out


def row_errors(delta: Tensor, hessian: Tensor) -> Tensor:
    """`Δ H Δᵀ` of every row, float64 `[N]`; delta fp32 `[N, K]`."""
    return (matmul(delta, hessian) * delta).sum(1, dtype=torch.float64)


def values(q: Tensor, scales: Tensor, zeros: Tensor, group: Tensor) -> Tensor:
    """What codes `[N, K]` stand for, of groups `[K]` with scales and zeros `[N, G]`."""
    # `index_select` takes a seventh of the time of `[:, group]`.
    return (q - zeros.index_select(1, group)) * scales.index_select(1, group)


def group_systems(q: Tensor, hessian: Tensor, width: int) -> Tensor:
    """`A[g, h] = q_g H q_hᵀ` of every row, fp32 `[N, G, G]`, on and above the diagonal; arguments as `refit_scales`."""
    groups = -(-q.shape[1] // width)
    matrix = q.new_zeros(len(q), groups, groups)
    for g in range(groups):
        part, rest = slice(g * width, (g + 1) * width), slice(g * width, None)
        matrix[:, g, g:] = group_sums(matmul(q[:, part], hessian[part, rest]) * q[:, rest], width)
    # Codes that are all zero in a group leave its scale undetermined: the ridge keeps the system regular.
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    return matrix


def group_sums(values: Tensor, width: int) -> Tensor:
    """Sums `[N, G]` over adjacent groups of columns."""
    missing = -values.shape[1] % width
    padded = torch.nn.functional.pad(values, (0, missing)) if missing else values
    return padded.unflatten(1, (-1, width)).sum(2)


def spread(by_group: Tensor, width: int, columns: int) -> Tensor:
    """Numbers `[N, G]` of adjacent groups, for each of their columns, `[N, K]`."""
    return by_group.repeat_interleave(width, 1)[:, :columns]
