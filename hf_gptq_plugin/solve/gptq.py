"""GPTQ: quantize a weight column by column, letting the columns still free absorb each rounding error."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native
from ..format.grid import QuantizedWeight, natural_groups
from ..format.spec import QuantSpec
from . import joint
from .hessian import Factor, SolveError, factorize, output_drift, reordered
from .joint import Metric
from .linalg import all_finite, total
from .refine import descend, propagate, refit_scales, row_errors, values
from .scales import METHODS, choose_scales

ORDERS = ("hessian", "natural")
_ROWS = 256  # solved at once: what bounds the fp32 copies of a weight


@dataclass(frozen=True)
class SolveSettings:
    """How a layer is solved.

    Args:
        damp_percent: damping of the Hessian, as a fraction of its diagonal's mean; raised where it must be.
        order: "hessian" solves columns in order of falling Hessian diagonal, "natural" from left to right.
            Groups lie in natural order either way, unless the spec has desc_act.
        scale_search: "mse", "minmax", "percentile" or "entropy", see `choose_scales`.
        blocksize: columns per lazy batch; a matter of cache only, codes do not depend on it.
        propagation: how much of the error of layers already quantized a layer takes over, 0 to 1; 0 also saves the
            dense model's forward pass. See `refine.propagate`.
        refit: fit scales to the codes after the column loop and after every round of descent. See
            `refine.refit_scales`.
        alternations: times that the column loop runs again with the scales refitted to its codes; none without refit.
            (After three, and three rounds of descent, a layer's error is 2 to 6 percent lower than after none and two;
            at 4 bits a model's perplexity shows nothing of more than one.)
        descent: rounds of coordinate descent after that. See `refine.descend`.
        scales_dtype: what scales are stored in.
    """

    damp_percent: float = 0.01
    order: str = "hessian"
    scale_search: str = "mse"
    blocksize: int = 128
    propagation: float = 0.5
    refit: bool = True
    alternations: int = 1
    descent: int = 1
    scales_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if type(self.damp_percent) not in (int, float) or not 0 < self.damp_percent < 1:
            raise ValueError(f"damp_percent={self.damp_percent!r} must be a number between 0 and 1")
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is not supported; use one of {', '.join(ORDERS)}")
        if self.scale_search not in METHODS:
            raise ValueError(f"scale_search={self.scale_search!r} is not supported; use one of {', '.join(METHODS)}")
        if type(self.blocksize) is not int or self.blocksize < 1:
            raise ValueError(f"blocksize={self.blocksize!r} must be an integer of at least 1")
        if type(self.propagation) not in (int, float) or not 0 <= self.propagation <= 1:
            raise ValueError(f"propagation={self.propagation!r} must be a number between 0 and 1")
        for name in ("alternations", "descent"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name}={value!r} must be an integer of at least 0")
        if not isinstance(self.refit, bool):
            raise ValueError(f"refit={self.refit!r} is not supported; use True or False")

    def order_for(self, spec: QuantSpec) -> str:
        """The order for layers of a spec: desc_act is an order by the Hessian."""
        return "hessian" if spec.desc_act else self.order


@dataclass(frozen=True)
class SolveReport:
    """What a solve did.

    Args:
        relative_error: `tr(ΔHΔᵀ) / tr(WHWᵀ)` with the damped Hessian; 0 is exact, 1 is as bad as zeros.
        loss: `tr(ΔHΔᵀ)` itself, in squared units of the layer's output: summed over outputs, mean over tokens.
        damp_percent: the damping used.
        dead_columns: inputs that were never active; their weights are set to 0.
        seconds: wall time.
    """

    relative_error: float
    loss: float
    damp_percent: float
    dead_columns: int
    seconds: float


@torch.no_grad()
def solve(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    settings: SolveSettings | None = None,
    cross: Tensor | None = None,
) -> tuple[QuantizedWeight, SolveReport]:
    """Quantize one weight.

    Args:
        weight: `[N, K]`, any float dtype.
        hessian: fp32 `[K, K]` on weight's device.
        spec: bits, group_size, sym, desc_act, format.
        settings: see `SolveSettings`.
        cross: fp32 `[K, K]`, see `Hessian`; None where earlier layers are dense.

    Returns:
        The codes, and a report.

    Raises:
        SolveError: weights that are not finite, or a Hessian that cannot be factorized.
    """
    settings = settings or SolveSettings()
    factor = factorize(hessian.clone(), settings.order_for(spec), settings.damp_percent)
    moved = None if cross is None else output_drift(weight.detach(), cross, factor.diagonal == 0)
    return solve_factored(weight, factor, spec, settings, drift=moved)


@torch.no_grad()
def solve_factored(
    weight: Tensor, factor: Factor, spec: QuantSpec, settings: SolveSettings,
    outputs: Sequence[Tensor] | None = None, drift: Tensor | None = None,
) -> tuple[QuantizedWeight, SolveReport]:  # fmt: skip
    """Quantize one weight whose inputs' Hessian is factorized.

    The maths, with `W` [N, K] the weight, `H` [K, K] the mean of `x xᵀ`, `Hinv` the inverse of the damped `H`: OBQ
    (Frantar & Alistarh 2022) quantizes one weight at a time and adds `-e / Hinv[i,i] · Hinv[i, :]` to the rest of its
    row, which is the exact minimiser of `Δ H Δᵀ` over the free weights. GPTQ (Frantar et al. 2022) takes the columns
    in one order for all rows; then row `i` of the upper Cholesky factor `U` of `Hinv` holds all that the step needs:

        q_i = quantize(w_i);  e = (w_i - ŵ_i) / U[i,i];  w_j -= e · U[i,j]  for j > i

    and `Σ e²` is the error `Δ H Δᵀ` of the whole row. Deviation from the paper: scales and zeros of every group are
    fixed beforehand ("static groups"), so that the solve order is free while groups stay in natural order; then scales
    are refitted to the codes and the columns solved again, and codes and scales refined in turn, see `refine`. Where
    outputs are felt by themselves rows do not depend on each other and are taken some at a time.

    Args:
        weight: `[N, K]`, any float dtype.
        factor: made for `settings.order_for(spec)`.
        spec, settings: see `solve`.
        outputs: how errors of outputs are felt together, parts of `joint.part_rows` rows, see `joint.Metric`; None for
            each by itself, all alike.
        drift: fp32 `[N, K]`, see `Hessian.drift`; None where earlier layers are dense.

    Raises:
        SolveError: weights that are not finite, outputs that are not positive definite.
    """
    start = time.perf_counter()
    home = weight.device
    # Columns wait for each other, and with `outputs` rows do: processors are made for that, accelerators are not.
    weight, factor = weight.detach().cpu(), factor.cpu()
    drift = None if drift is None else drift.cpu()
    metric, rows = None, None
    if outputs is not None:
        metric, rows = joint.by_falling_diagonal(outputs)
        weight, drift = weight[rows], None if drift is None else drift[rows]
    columns, order = weight.shape[1], factor.order
    dead = factor.diagonal == 0
    # Places are where groups lie side by side: natural order, or the solve order where groups follow it.
    places = order if spec.desc_act else torch.arange(columns)
    group_by_place = natural_groups(columns, spec.group_size)
    group = torch.empty_like(group_by_place)
    group[places] = group_by_place
    refined = bool(settings.descent or settings.refit)
    by_place = reordered(factor.damped, places) if refined and spec.desc_act else factor.damped

    codes = weight.new_empty(weight.shape, dtype=torch.uint8)
    scales, zeros, errors, energies = [], [], [], []
    at_once = _ROWS if metric is None else len(weight)
    parts = weight.split(at_once)
    drifts = [None] * len(parts) if drift is None else drift.split(at_once)
    for part, moved, part_codes in zip(parts, drifts, codes.split(at_once), strict=True):
        wanted = part.float()
        if not all_finite(wanted):
            raise SolveError("the weight is not finite (NaN or infinity); the model's file is damaged")
        wanted = wanted.masked_fill(dead, 0.0)
        if moved is not None and settings.propagation:
            wanted = propagate(wanted, moved, factor.upper, order, settings.propagation)
            wanted.masked_fill_(dead, 0.0)
        energies.append(total(row_errors(wanted, factor.damped)))
        # A dead column's weights are zero, so its importance does not matter.
        placed = wanted[:, places] if spec.desc_act else wanted
        s, z = choose_scales(placed, factor.diagonal[places], spec, settings.scale_search, settings.scales_dtype)
        problem = _Rows(placed, by_place, wanted[:, order], factor.upper, places, order, z, spec, settings, metric)
        part_codes[:, places], s, by_row = problem.solved(s)
        scales.append(s)
        zeros.append(z)
        errors.append(total(by_row))
    found_scales, found_zeros = torch.cat(scales), torch.cat(zeros)
    if rows is not None:
        back = torch.argsort(rows)
        codes, found_scales, found_zeros = codes[back], found_scales[back], found_zeros[back]
    quantized = QuantizedWeight(
        codes=codes,
        scales=found_scales.T.to(settings.scales_dtype).contiguous(),
        zeros=found_zeros.T.to(torch.int32).contiguous(),
        group=group,
        spec=spec,
    ).to(home)
    error, energy = math.fsum(errors), math.fsum(energies)
    report = SolveReport(
        relative_error=error / max(energy, torch.finfo(torch.float32).tiny),
        loss=error,
        damp_percent=factor.damp_percent,
        dead_columns=int(dead.sum()),
        seconds=time.perf_counter() - start,
    )
    return quantized, report


@dataclass(frozen=True)
class _Rows:
    """Some rows of a weight, whose columns lie where groups are side by side ("placed") or in solve order.

    Args:
        placed, hessian: fp32 `[N, K]`, and damped `[K, K]`.
        ordered, upper: fp32 `[N, K]`, and `[K, K]`, see `solve_columns`.
        places, order: natural columns `[K]` by place, and in solve order.
        zeros: fp32 `[N, G]`.
    """

    placed: Tensor
    hessian: Tensor
    ordered: Tensor
    upper: Tensor
    places: Tensor
    order: Tensor
    zeros: Tensor
    spec: QuantSpec
    settings: SolveSettings
    metric: Metric | None

    def solved(self, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From scales `[N, G]` to begin with: placed codes, scales, and the error of every row, float64 `[N]`, its
        outputs by themselves."""
        refit, descent = self.settings.refit, self.settings.descent
        codes, errors = self._column_loop(scales)
        for _ in range(self.settings.alternations if refit else 0):
            scales = self._refit(codes, scales, errors)
            codes, errors = self._column_loop(scales)
        for _ in range(max(descent, int(refit))):
            if refit:
                scales = self._refit(codes, scales, errors)
            codes, errors = self._descend(codes, scales, 1 if descent else 0)
        if not len(errors):
            delta = self.placed - values(codes.float(), scales, self.zeros, self._group)
            errors = row_errors(delta, self.hessian)
        return codes, scales, errors

    @property
    def _group(self) -> Tensor:
        return natural_groups(self.placed.shape[1], self.spec.group_size, self.placed.device)

    def _column_loop(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        group = torch.empty_like(self._group)
        group[self.places] = self._group
        group, bits = group[self.order].contiguous(), self.spec.bits
        if self.metric is None:
            blocksize = self.settings.blocksize
            solved, errors = solve_columns(self.ordered, self.upper, scales, self.zeros, group, bits, blocksize)
        else:
            solved = joint.solve_columns(self.ordered, self.upper, self.metric, scales, self.zeros, group, bits)
            errors = torch.empty(0)
        codes = torch.empty_like(solved)
        codes[:, self.order] = solved
        return codes[:, self.places], errors

    def _refit(self, codes: Tensor, scales: Tensor, errors: Tensor) -> Tensor:
        width, dtype = self.spec.width(self.placed.shape[1]), self.settings.scales_dtype
        if self.metric is None:
            return refit_scales(self.placed, self.hessian, codes, scales, self.zeros, width, dtype, errors)
        return joint.refit_scales(self.placed, self.hessian, self.metric, codes, scales, self.zeros, width, dtype)

    def _descend(self, codes: Tensor, scales: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
        grid = (scales, self.zeros, self._group, self.spec.bits)
        if self.metric is None:
            return descend(self.placed, self.hessian, codes, *grid, rounds)
        if rounds:
            return joint.descend(self.placed, self.hessian, self.metric, codes, *grid)
        return codes, torch.empty(0)


def solve_columns(
    weight: Tensor, upper: Tensor, scales: Tensor, zeros: Tensor, group: Tensor, bits: int, blocksize: int
) -> tuple[Tensor, Tensor]:
    """The column loop.

    Args:
        weight: fp32 `[N, K]` in solve order; not modified.
        upper: fp32 `[K, K]`, upper Cholesky factor of the inverse Hessian in solve order.
        scales, zeros: fp32 `[N, G]`.
        group: int32 `[K]`, group of every column in solve order.
        bits: width of a code.
        blocksize: columns per lazy batch (native library only).

    Returns:
        uint8 codes `[N, K]` in solve order, and every row's `Σ e²`, float64 `[N]`. Every weight receives its updates
        one by one in solve order with a rounding after the product and after the difference, whatever the blocksize,
        the number of threads or the implementation, so the codes are the same bits.
    """
    work = weight.float().contiguous()
    if work.data_ptr() == weight.data_ptr():
        work = work.clone()
    rows, columns = work.shape
    library = native.library()
    if library is not None and work.device.type == "cpu":
        upper, scales, zeros = upper.contiguous(), scales.contiguous(), zeros.contiguous()
        group = group.to(torch.int32).contiguous()
        codes = work.new_empty(rows, columns, dtype=torch.uint8)
        errors = work.new_empty(rows, dtype=torch.float64)
        native.check(
            library.hf_gptq_solve(
                work.data_ptr(), upper.data_ptr(), scales.data_ptr(), zeros.data_ptr(), group.data_ptr(),
                codes.data_ptr(), errors.data_ptr(), rows, columns, scales.shape[1], bits, blocksize,
            )
        )  # fmt: skip
        return codes, errors
    return _solve_columns_reference(work, upper, scales, zeros, group, bits)


def _solve_columns_reference(
    work: Tensor, upper: Tensor, scales: Tensor, zeros: Tensor, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(work, dtype=torch.uint8)
    maxq = 2**bits - 1
    errors = torch.zeros(len(work), dtype=torch.float64, device=work.device)
    for i, g in enumerate(group.tolist()):
        s, z, w = scales[:, g], zeros[:, g], work[:, i]
        q = (torch.round(w / s) + z).clamp_(0, maxq)
        codes[:, i] = q.to(torch.uint8)
        e = (w - (q - z) * s) / upper[i, i]
        work[:, i + 1 :] -= e[:, None] * upper[i, i + 1 :]
        errors += e.double() ** 2
    return codes, errors
