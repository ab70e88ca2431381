"""Half-quadratic quantization: shift a group's grid for the sake of most weights, at the cost of the few outliers."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..format.spec import QuantSpec

NORM = 0.7  # p; below 1, so that few large errors count less than many small ones
_BETA = 10.0
_GROWTH = 1.01  # of beta, per round
_ROUNDS = 20
_STEPS = torch.linspace(0.9, 1.1, 21)  # of the closing search around the scale found


def half_quadratic(
    weight: Tensor, scales: Tensor, zeros: Tensor, spec: QuantSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Refine the grid of every group of adjacent columns so that `Σ |w - ŵ|^p` falls.

    The maths, for one group, with `q` the codes and `ŵ = (q - z) s`: the errors are split into outliers `e`, which are
    let go, and the rest,

        min over e, z, s of  Σ |e|^p + β/2 · Σ (w - e - (q - z) s)²

    and solved in turn: `e` is the error shrunken towards 0 (`shrink`), `z` the mean of `q - (w - e) / s`, `s` the least
    squares' fit of `w - e` by `q - z`; then the codes are rounded anew and β grows. Deviations from the paper: zeros of
    this format are integers, so z is rounded in every round, and the scale, which the paper leaves alone, makes good
    for it; symmetric grids keep their zero and fit only the scale; errors are measured in steps of the grid, so that β
    means the same for every layer; at last scales some percent to either side are tried. Every group keeps the best
    grid that was met, the one it came with included.

    Args:
        weight: fp32 `[N, K]`, columns in the order in which groups are cut.
        scales, zeros: fp32 `[N, G]`, to begin with.
        spec: bits, group_size, sym, format.
        dtype: what scales are stored in; they are rounded to it before they are judged.

    Returns:
        scales fp32 `[N, G]` (exact in `dtype`, never 0 or subnormal) and zeros fp32 `[N, G]`.

    References:
        Badri & Shaji 2023 (HQQ).
    """
    columns = weight.shape[1]
    scales, zeros = scales.clone(), zeros.clone()
    starts = [*range(0, columns, spec.width(columns)), columns]
    for g, (a, b) in enumerate(itertools.pairwise(starts)):
        scales[:, g], zeros[:, g] = _refined(weight[:, a:b], scales[:, g], zeros[:, g], spec, dtype)
    return scales, zeros


def shrink(error: Tensor, beta: float) -> Tensor:
    """`argmin over e of |e|^p + β/2 (e - error)²`, nearly: the generalized soft threshold of the paper."""
    size = error.abs()
    # 0 ** (p - 1) is infinite, and clamped it gives the 0 that is right.
    return error.sign() * (size - size.pow(NORM - 1) / beta).clamp(min=0)


def objective(weight: Tensor, scale: Tensor, zero: Tensor, maxq: int) -> Tensor:
    """`Σ |w - ŵ|^p` of every row of one group.

    Args:
        weight: `[N, width]`.
        scale, zero: `[N]`.
    """
    codes = _codes(weight, scale, zero, maxq)
    return (weight - (codes - zero[:, None]) * scale[:, None]).abs().pow(NORM).sum(1)


def _refined(weight: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One group `[N, width]`; scale and zero `[N]`."""
    lowest, maxq = spec.zero_range
    best = (objective(weight, scale, zero, maxq), scale, zero)
    beta = _BETA
    for _ in range(_ROUNDS):
        codes, step = _codes(weight, scale, zero, maxq), scale[:, None]
        error = weight / step - (codes - zero[:, None])
        target = weight / step - shrink(error, beta)  # in steps
        if not spec.sym:
            zero = torch.round((codes - target).mean(1)).clamp(lowest, maxq)
        q = codes - zero[:, None]
        scale = _usable(scale * (q * target).sum(1) / (q * q).sum(1), scale, dtype)
        best = _better(best, weight, scale, zero, maxq)
        beta *= _GROWTH
    _, around, zero = best
    for t in _STEPS.tolist():
        best = _better(best, weight, _usable(around * t, around, dtype), zero, maxq)
    return best[1], best[2]


def _better(
    best: tuple[Tensor, Tensor, Tensor], weight: Tensor, scale: Tensor, zero: Tensor, maxq: int
) -> tuple[Tensor, Tensor, Tensor]:
    value = objective(weight, scale, zero, maxq)
    better = value < best[0]
    return tuple(torch.where(better, new, old) for new, old in zip((value, scale, zero), best, strict=True))  # type: ignore[return-value]


def _usable(scale: Tensor, otherwise: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they are stored; `otherwise` where they cannot be (all codes at the zero, too small, too large)."""
    stored = scale.to(dtype).float()
    return torch.where(torch.isfinite(stored) & (stored.abs() >= torch.finfo(dtype).tiny), stored, otherwise)


def _codes(weight: Tensor, scale: Tensor, zero: Tensor, maxq: int) -> Tensor:
    return (torch.round(weight / scale[:, None]) + zero[:, None]).clamp(0, maxq)
