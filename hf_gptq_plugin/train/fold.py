"""Fold an update of the weight into the codes and scales of a layer that is already quantized."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..format.grid import QuantizedWeight
from ..solve.gptq import SolveSettings, solve_columns
from ..solve.hessian import factorize
from ..solve.linalg import total
from ..solve.refine import descend, refit_scales, row_errors, values

_ROUNDS = 3  # of descent and refit in turn


@dataclass(frozen=True)
class FoldReport:
    """What became of one layer's update.

    Args:
        residual: error on the calibration inputs relative to leaving the update out; 1 is nothing folded, 0 all of it.
        chosen: the candidate that was best: "unchanged", "rounding", "scales", "solver" or "solver and scales".
        codes: share of codes that changed.
        size: norm of the update relative to the weight's, both in the norm of the inputs.
    """

    residual: float
    chosen: str
    codes: float
    size: float


@torch.no_grad()
def fold(
    weight: QuantizedWeight, delta: Tensor, hessian: Tensor, damp_percent: float = 0.01
) -> tuple[QuantizedWeight, FoldReport]:
    """The checkpoint's layer that is closest to `Ŵ + Δ` on its inputs, on its own zeros and groups.

    With `H` the mean of `x xᵀ`, the error of a candidate `Q` is `tr((Ŵ + Δ - Q) H (Ŵ + Δ - Q)ᵀ)`. Candidates: the layer
    as it is; rounding on its grid; its codes with scales fitted; the solver's column loop on its grid; and that with
    descent and scales fitted in turn. The best is taken, so nothing is ever worse than leaving the update out. An
    output feature with a scale of 0 in any group stays as it is.

    Args:
        weight: `[N, K]`.
        delta: the update, fp32 `[N, K]`.
        hessian: fp32 `[K, K]` of the layer's inputs.
        damp_percent: see `SolveSettings`.

    Raises:
        ValueError: an update of another shape, or not finite.
        SolveError: a Hessian that cannot be factorized.
    """
    if delta.shape != weight.codes.shape:
        raise ValueError(f"the update is {tuple(delta.shape)} and the weight {tuple(weight.codes.shape)}")
    if not bool(torch.isfinite(delta).all()):
        raise ValueError("the update is not finite (NaN or infinity); the adapter is damaged")
    spec, columns = weight.spec, weight.codes.shape[1]
    factor = factorize(hessian.clone(), "hessian", damp_percent)
    damped = factor.damped
    wanted = weight.dequantize() + delta.float()
    given = total(row_errors(delta.float().contiguous(), damped))
    before = total(row_errors(weight.dequantize(), damped))
    if not given:
        return weight, FoldReport(1.0, "unchanged", 0.0, 0.0)

    # Groups side by side, which is where `refit_scales` looks for them.
    places = torch.argsort(weight.group.long(), stable=True)
    adjacent = weight.group[places].contiguous()
    given_scales, zeros = weight.scales.T.float().contiguous(), weight.zeros.T.float().contiguous()
    # Rows are solved each by itself: what becomes of those that stay is put back below.
    stays = (given_scales == 0).any(1, keepdim=True)
    scales = torch.where(stays, 1.0, given_scales)
    placed, start = wanted[:, places].contiguous(), weight.codes[:, places].contiguous()
    by_place = damped[places][:, places].contiguous()
    widths = adjacent.bincount()
    even = len(widths) == scales.shape[1] and bool((widths[:-1] == widths[0]).all()) and widths[-1] <= widths[0]

    def refitted(codes: Tensor, old: Tensor) -> Tensor:
        if not even:  # groups of different sizes, of another writer: their scales stay
            return old
        errors = row_errors(placed - values(codes.float(), old, zeros, adjacent), by_place)
        return refit_scales(placed, by_place, codes, old, zeros, int(widths[0]), weight.scales.dtype, errors)

    def rounded() -> Tensor:
        index = adjacent.long()
        return (torch.round(placed / scales[:, index]) + zeros[:, index]).clamp_(0, spec.maxq).to(torch.uint8)

    def solved() -> Tensor:
        order = factor.order
        group = weight.group[order].contiguous()
        found, _ = solve_columns(
            wanted[:, order], factor.upper, scales, zeros, group, spec.bits, SolveSettings().blocksize
        )
        codes = torch.empty_like(found)
        codes[:, order] = found
        return codes[:, places].contiguous()

    looped = solved()
    candidates = {
        "unchanged": (start, scales),
        "rounding": (rounded(), scales),
        "scales": (start, refitted(start, scales)),
    }
    candidates["solver"] = (looped, scales)
    codes, fitted = looped, scales
    for _ in range(_ROUNDS):
        fitted = refitted(codes, fitted)
        codes, _errors = descend(placed, by_place, codes, fitted, zeros, adjacent, spec.bits, 1)
    candidates["solver and scales"] = (codes, fitted)
    candidates = {
        name: (torch.where(stays, start, codes), torch.where(stays, given_scales, s))
        for name, (codes, s) in candidates.items()
    }
    errors = {
        name: total(row_errors(placed - values(codes.float(), s, zeros, adjacent), by_place))
        for name, (codes, s) in candidates.items()
    }
    chosen = min(errors, key=lambda name: (errors[name], name != "unchanged"))
    size = (given / before) ** 0.5 if before else float("inf")
    if chosen == "unchanged":
        return weight, FoldReport(1.0, chosen, 0.0, size)
    best_codes, best_scales = candidates[chosen]
    made = torch.empty_like(weight.codes)
    made[:, places] = best_codes
    report = FoldReport(
        residual=errors[chosen] / errors["unchanged"],
        chosen=chosen,
        codes=float((made != weight.codes).sum()) / (made.shape[0] * columns),
        size=size,
    )
    return replace(weight, codes=made, scales=best_scales.T.to(weight.scales.dtype).contiguous()), report
