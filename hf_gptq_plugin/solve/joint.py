"""What the column loop, descent and refit become where errors of outputs are felt together.

The loss of a layer's errors `E [N, K]` is then `tr(M E H Eᵀ)` with `M [N, N]` what an error in one output does to
another's worth, in place of `tr(E H Eᵀ)`. Given the errors of the columns solved so far, the best that the free columns
can do does not depend on `M`, so that GPTQ's update stays as it is; only a column's rounding changes. It is a column
loop of its own, along the rows: what rounding one row costs is made good by the rows still free, as far as `M` says
that they can. `M` is blocks on the diagonal: errors of rows in different parts are taken to be felt apart.

References: Tseng et al. 2025 (YAQA), whose two-sided rounding this is, in GPTQ's form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from .hessian import SolveError
from .linalg import inverse_factor, matmul, solve_symmetric, total
from .refine import group_sums, group_systems, spread, values

_ROWS = 768  # the most whose errors are felt together: what bounds a part's memory
_COLUMNS = 128  # per lazy batch


def part_rows(rows: int, most: int = _ROWS) -> int:
    """Rows per part of a weight with so many, `most` at most: parts are of one size, but the last may be smaller."""
    return -(-rows // -(-rows // min(most, _ROWS)))


class Metric:
    """`M` of a weight.

    Args:
        parts: symmetric and positive definite, fp32 `[n, n]` each, all of one size but the last, see `part_rows`.

    Raises:
        SolveError: one is not positive definite.
    """

    def __init__(self, parts: list[Tensor]) -> None:
        self.parts = [part.cpu().contiguous() for part in parts]
        self.rows = sum(map(len, parts))
        self.spans = [slice(a, a + len(parts[0])) for a in range(0, self.rows, len(parts[0]))]
        factors = [inverse_factor(part) for part in self.parts]
        if any(factor is None for factor in factors):
            raise SolveError("the Hessian of the layer's outputs is not positive definite; use more calibration text")
        self.flat = torch.cat([part.flatten() for part in self.parts])
        self.factors = [factor for factor in factors if factor is not None]
        self.flat_factors = torch.cat([factor.flatten() for factor in self.factors])

    def times(self, matrix: Tensor) -> Tensor:
        """`M · matrix`, `[N, K]`."""
        return torch.cat([matmul(part, matrix[span]) for part, span in zip(self.parts, self.spans, strict=True)])

    @property
    def diagonal(self) -> Tensor:
        """`[N]`."""
        return torch.cat([part.diagonal() for part in self.parts])

    def error(self, delta: Tensor, hessian: Tensor) -> float:
        """`tr(M Δ H Δᵀ)`; delta fp32 `[N, K]`."""
        return total((self.times(matmul(delta, hessian)) * delta).sum(1, dtype=torch.float64))


def by_falling_diagonal(parts: Sequence[Tensor]) -> tuple[Metric, Tensor]:
    """The metric of rows reordered within their parts, and that order `[N]`: what is felt most is rounded first, when
    most rows can still make it good."""
    orders = [torch.argsort(part.diagonal(), descending=True, stable=True) for part in parts]
    metric = Metric([part[order][:, order] for part, order in zip(parts, orders, strict=True)])
    return metric, torch.cat([order.cpu() + span.start for order, span in zip(orders, metric.spans, strict=True)])


def solve_columns(
    weight: Tensor, upper: Tensor, metric: Metric, scales: Tensor, zeros: Tensor, group: Tensor, bits: int
) -> Tensor:
    """The column loop; arguments as `gptq.solve_columns`.

    Returns:
        uint8 codes `[N, K]` in solve order, the same bits for any number of threads.
    """
    work = weight.T.clone(memory_format=torch.contiguous_format)
    codes = work.new_empty(work.shape, dtype=torch.uint8)
    scales, zeros, group = scales.T.contiguous(), zeros.T.contiguous(), group.to(torch.int32).contiguous()
    upper = upper.contiguous()
    for a in range(0, len(work), _COLUMNS):
        block = slice(a, a + _COLUMNS)
        _solve_block(work[block], upper[block, block], metric, scales, zeros, group[block], codes[block], bits)
        rest = slice(a + _COLUMNS, None)
        work[rest] -= matmul(upper[block, rest].T, work[block])
    return codes.T


def _solve_block(
    work: Tensor, upper: Tensor, metric: Metric, scales: Tensor, zeros: Tensor, group: Tensor, codes: Tensor, bits: int
) -> None:
    """Columns `[B, N]` of weights become their errors over the pivot; codes are written. See the C header."""
    library = native.library()
    if library is None:
        for span, factor in zip(metric.spans, metric.factors, strict=True):
            _solve_block_reference(work, upper, factor, scales, zeros, group, codes, bits, span)
        return
    native.check(
        library.hf_gptq_joint_solve(
            work.data_ptr(), upper.data_ptr(), upper.stride(0), metric.flat_factors.data_ptr(), scales.data_ptr(),
            zeros.data_ptr(), group.data_ptr(), codes.data_ptr(), metric.rows, len(work), len(scales),
            len(metric.parts[0]), bits,
        )
    )  # fmt: skip


def _solve_block_reference(
    work: Tensor, upper: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, group: Tensor, codes: Tensor, bits: int,
    rows: slice,
) -> None:  # fmt: skip
    for c, g in enumerate(group.tolist()):
        s, z = scales[g, rows], zeros[g, rows]
        pulled, value = work[c, rows].clone(), torch.empty_like(s)
        for n in range(len(s)):
            code = (torch.round(pulled[n] / s[n]) + z[n]).clamp(0, 2**bits - 1)
            codes[c, rows][n] = code.to(torch.uint8)
            value[n] = (code - z[n]) * s[n]
            pulled[n + 1 :] += (value[n] - pulled[n]) / factor[n, n] * factor[n, n + 1 :]
        work[c, rows] = (work[c, rows] - value) / upper[c, c]
        work[c + 1 :, rows] -= upper[c, c + 1 :, None] * work[c, rows]


def descend(
    weight: Tensor, hessian: Tensor, metric: Metric, codes: Tensor, scales: Tensor, zeros: Tensor, group: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One round of coordinate descent on the codes; arguments as `refine.descend`. Never raises the error.

    Returns:
        uint8 codes `[N, K]`, and the error of every row, its outputs by themselves, float64 `[N]`.
    """
    pull = matmul(hessian, (weight - values(codes.float(), scales, zeros, group)).T)
    codes, hessian = codes.T.clone(memory_format=torch.contiguous_format), hessian.contiguous()
    scales, zeros, group = scales.T.contiguous(), zeros.T.contiguous(), group.to(torch.int32).contiguous()
    for a in range(0, len(pull), _COLUMNS):
        block, rest = slice(a, a + _COLUMNS), slice(a + _COLUMNS, None)
        changes = _descend_block(
            pull[block], hessian[block, block], metric, scales, zeros, group[block], codes[block], bits
        )
        if bool(changes.any()):
            pull[:a] += matmul(hessian[block, :a].T, changes)
            pull[rest] += matmul(hessian[block, rest].T, changes)
    delta = weight - values(codes.T.float(), scales.T, zeros.T, group)
    return codes.T, (pull.T * delta).sum(1, dtype=torch.float64)


def _descend_block(
    pull: Tensor, hessian: Tensor, metric: Metric, scales: Tensor, zeros: Tensor, group: Tensor, codes: Tensor,
    bits: int,
) -> Tensor:  # fmt: skip
    """A round over columns `[B, N]`, of which `pull` and `codes` are updated. Returns what the values of the old codes
    were above the new ones', `[B, N]`. See the C header."""
    changes, library = torch.zeros_like(pull), native.library()
    if library is None:
        for span, part in zip(metric.spans, metric.parts, strict=True):
            _descend_block_reference(pull, hessian, part, scales, zeros, group, codes, changes, bits, span)
        return changes
    native.check(
        library.hf_gptq_joint_descend(
            pull.data_ptr(), hessian.data_ptr(), hessian.stride(0), metric.flat.data_ptr(), scales.data_ptr(),
            zeros.data_ptr(), group.data_ptr(), codes.data_ptr(), changes.data_ptr(), metric.rows, len(pull),
            len(scales), len(metric.parts[0]), bits,
        )
    )  # fmt: skip
    return changes


def _descend_block_reference(
    pull: Tensor, hessian: Tensor, part: Tensor, scales: Tensor, zeros: Tensor, group: Tensor, codes: Tensor,
    changes: Tensor, bits: int, rows: slice,
) -> None:  # fmt: skip
    for c, g in enumerate(group.tolist()):
        s, z = scales[g, rows], zeros[g, rows]
        felt = part @ (pull[c, rows] / hessian[c, c])
        for n in range(len(s)):
            code = codes[c, rows][n].float()
            target = (code - z[n]) * s[n] + felt[n] / part[n, n]
            better = (torch.round(target / s[n]) + z[n]).clamp(0, 2**bits - 1)
            step = (code - better) * s[n]
            codes[c, rows][n] = better.to(torch.uint8)
            changes[c, rows][n] = step
            felt += step * part[n]
        pull[:, rows] += hessian[c, :, None] * changes[c, rows]


def refit_scales(
    weight: Tensor, hessian: Tensor, metric: Metric, codes: Tensor, scales: Tensor, zeros: Tensor, width: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Better scales for given codes; arguments as `refine.refit_scales`.

    All rows move at once, each to where it would be best by itself were the others to stay, and then as far along that
    as is best for all of them.

    Returns:
        scales fp32 `[N, G]`, exact in `dtype`; the old ones where the new are not better or not usable.
    """
    columns = weight.shape[1]
    q = codes.float() - spread(zeros, width, columns)
    delta = weight - q * spread(scales, width, columns)
    felt = metric.times(matmul(delta, hessian))
    slope = group_sums(felt * q, width)
    systems, felt_rows = group_systems(q, hessian, width), metric.diagonal[:, None]
    steps = solve_symmetric(systems.double(), (slope / felt_rows).double())
    steps = torch.nan_to_num(steps, 0.0, 0.0, 0.0).float()
    moved = q * spread(steps, width, columns)
    resisted = metric.times(matmul(moved, hessian))
    curvature = total((resisted * moved).sum(1, dtype=torch.float64))
    length = total((slope * steps).sum(1, dtype=torch.float64)) / max(curvature, torch.finfo(torch.float32).tiny)
    fitted = (scales + length * steps).to(dtype).float()
    usable = (torch.isfinite(fitted) & (fitted.abs() >= torch.finfo(dtype).tiny)).all(1, keepdim=True)
    if bool(usable.all()):
        # Of what rounding the scales changes, all that is linear in it, and of the squares those of each by itself.
        rounding = fitted - scales - length * steps
        changed = 2 * rounding * (slope - length * group_sums(resisted * q, width))
        changed -= felt_rows * systems.diagonal(dim1=1, dim2=2) * rounding.square()
        lowered = length**2 * curvature + total(changed.sum(1, dtype=torch.float64))
    else:
        fitted = torch.where(usable, fitted, scales)
        before = total((felt * delta).sum(1, dtype=torch.float64))
        lowered = before - metric.error(weight - q * spread(fitted, width, columns), hessian)
    return fitted if lowered > 0 else scales
