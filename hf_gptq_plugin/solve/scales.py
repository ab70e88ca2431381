"""Scales and zeros of every group, fixed from the weights before the solve."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .. import native
from ..format.spec import QuantSpec

METHODS = ("minmax", "mse", "percentile", "entropy")
PERCENTILE = 0.995

# Ranges tried, as fractions of the minmax range. A symmetric grid with a negative scale has its extra step on the
# other side, so it may also pay to widen it.
_SHRINK_SYM = torch.linspace(1.1, 0.5, 25, dtype=torch.float32, device="cpu")
_SHRINK_ASYM = torch.linspace(1.0, 0.5, 21, dtype=torch.float32, device="cpu")


def choose_scales(
    weight: Tensor, importance: Tensor, spec: QuantSpec, method: str, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor]:
    """Choose the grid of every group of adjacent columns.

    "minmax" covers each group's range. "mse" tries shrunken ranges, and for symmetric grids both signs of the
    scale (codes 0..15 around 8 reach one step further down than up, and the sign decides to which side that step
    goes), and keeps the one with the least `Σ_k importance[k] · (w - ŵ)²`.

    The other two come from the calibration of activations, where they work on histograms of a great many values. A
    group has 32 to 128, so here both are defined on the values themselves, all of the same weight:

    "percentile" is "minmax" on the range between two quantiles of the group's values: symmetric, up to the
    `PERCENTILE` quantile of `|w|`; asymmetric, from the `1 - PERCENTILE` to the `PERCENTILE` quantile of `w`. Between
    two values it interpolates linearly, so that even a small group's largest values are clipped a little.

    "entropy" tries what "mse" tries and keeps the grid with the least Kullback–Leibler divergence of the magnitudes
    before from those after, `Σ p log(p / q) - p + q` with `p = |w|` and `q = |ŵ|`: the usual one were both sums 1, and
    unlike it not blind to a grid that is wrong by a factor. A weight rounded to 0 has `q = |scale| / 4`, the mean of
    what is rounded to 0 from everywhere in reach. It minds relative errors, so it clips more than "mse". (TensorRT's
    histogram over so few values has each in a bin of its own, and then never clips.)

    Args:
        weight: fp32 `[N, K]`, columns in the order in which groups are cut.
        importance: fp32 `[K]`, not negative; the Hessian's diagonal. Only "mse" looks at it.
        spec: bits, group_size, sym, format.
        method: one of `METHODS`.
        dtype: what scales are stored in; they are rounded to it before they are judged.

    Returns:
        scales fp32 `[N, G]` (exact in `dtype`, never 0 or subnormal) and zeros fp32 `[N, G]`.
    """
    if method not in METHODS:
        raise ValueError(f"scale_search={method!r} is not supported; use one of {', '.join(METHODS)}")
    full_range = method in ("mse", "entropy")
    if not full_range:
        shrink = torch.ones(1)
    else:
        shrink = _SHRINK_SYM if spec.sym else _SHRINK_ASYM
    columns = weight.shape[1]
    width = spec.width(columns)
    starts = [*range(0, columns, width), columns]
    library = native.library()
    built_in = method == "mse" or (method == "minmax" and not spec.sym)
    if library is not None and weight.device.type == "cpu" and built_in:
        return _search_native(weight, importance, spec, shrink, starts, dtype)
    scales = weight.new_empty(weight.shape[0], len(starts) - 1)
    zeros = torch.empty_like(scales)
    for g, (a, b) in enumerate(itertools.pairwise(starts)):
        scales[:, g], zeros[:, g] = search_group(
            weight[:, a:b], importance[a:b], spec, shrink.to(weight.device), full_range, dtype, method
        )
    return scales, zeros


def search_group(
    weight: Tensor, importance: Tensor, spec: QuantSpec, shrink: Tensor, full_range: bool, dtype: torch.dtype,
    method: str = "mse",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Best scale and zero `[N]` of one group `[N, width]`; the reference of the native search."""
    maxq, tiny = spec.maxq, torch.finfo(dtype).tiny
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if method == "percentile":
        low, high = _quantiles(weight, low, high, spec.sym)
    empty = (low == 0) & (high == 0)
    middle = float(2 ** (spec.bits - 1))
    candidates: list[tuple[Tensor, Tensor]] = []
    for t in shrink:
        if spec.sym:
            scale = torch.maximum(-low, high) * (2 * t) / maxq
            zero = torch.full_like(scale, middle)
            candidates += [(scale, zero), (-scale, zero)] if full_range else [(scale, zero)]
        else:
            scale = (high - low) * t / maxq
            candidates.append((scale, -low * t))
    best_error = torch.full_like(low, torch.inf)
    best_scale = torch.where(empty, 1.0, tiny)
    lowest = float(spec.zero_offset)
    best_zero = torch.full_like(low, middle) if spec.sym else torch.round(-low / tiny).clamp(lowest, maxq)
    for raw_scale, zero in candidates:
        scale = raw_scale.to(dtype).float()
        usable = torch.isfinite(scale) & (scale.abs() >= tiny) & ~empty
        scale = torch.where(usable, scale, 1.0)
        z = zero if spec.sym else torch.round(zero / scale).clamp(lowest, maxq)
        code = (torch.round(weight / scale[:, None]) + z[:, None]).clamp(0, maxq)
        if method == "entropy":
            error = _divergence(weight, code - z[:, None], scale)
        else:
            error = (importance * (weight - (code - z[:, None]) * scale[:, None]) ** 2).sum(1)
        better = usable & (error < best_error)
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, z, best_zero)
    return best_scale, best_zero


def _quantiles(weight: Tensor, low: Tensor, high: Tensor, sym: bool) -> tuple[Tensor, Tensor]:
    """The clipped range `[N]` of one group; the whole one where nothing would be left of it."""
    if sym:
        right = torch.quantile(weight.abs(), PERCENTILE, dim=1)
        left = -right
    else:
        left = torch.quantile(weight, 1 - PERCENTILE, dim=1).clamp(max=0)
        right = torch.quantile(weight, PERCENTILE, dim=1).clamp(min=0)
    nothing = (left == 0) & (right == 0)
    return torch.where(nothing, low, left), torch.where(nothing, high, right)


def _divergence(weight: Tensor, steps: Tensor, scale: Tensor) -> Tensor:
    """`Σ p log(p / q) - p + q` of every row, see `choose_scales`.

    Args:
        weight: `[N, width]`.
        steps: codes less their zero, `[N, width]`.
        scale: `[N]`.
    """
    p = weight.abs()
    q = steps.abs().clamp(min=0.25) * scale.abs()[:, None]
    return (torch.xlogy(p, p / q) - p + q).sum(1)


def _search_native(
    weight: Tensor, importance: Tensor, spec: QuantSpec, shrink: Tensor, starts: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    library = native.library()
    assert library is not None  # the caller looked
    rows, columns = weight.shape
    weight, importance = weight.float().contiguous(), importance.float().contiguous()
    bounds = torch.tensor(starts, dtype=torch.int32, device="cpu")
    shrink = shrink.float().contiguous()
    scales = weight.new_empty(rows, len(starts) - 1)
    zeros = torch.empty_like(scales)
    native.check(
        library.hf_gptq_scale_search(
            weight.data_ptr(), importance.data_ptr(), bounds.data_ptr(), rows, columns, len(starts) - 1,
            spec.bits, int(spec.sym), shrink.data_ptr(), shrink.numel(), native.DTYPES[dtype],
            scales.data_ptr(), zeros.data_ptr(), spec.zero_offset,
        )
    )  # fmt: skip
    return scales, zeros
