"""Quantize a weight by itself: no Hessian, every weight rounded to the nearest value of its group's grid."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..format.grid import QuantizedWeight, natural_groups, quantize
from ..format.spec import QuantSpec
from .gptq import SolveReport, SolveSettings
from .hessian import SolveError
from .hqq import half_quadratic
from .linalg import all_finite
from .scales import choose_scales


@torch.no_grad()
def round_to_nearest(
    weight: Tensor, spec: QuantSpec, settings: SolveSettings, refine: bool = False
) -> tuple[QuantizedWeight, SolveReport]:
    """Choose grids with every weight as important as any other, then round.

    Args:
        weight: `[N, K]`, any float dtype.
        spec: bits, group_size, sym, format; not desc_act, since there is no solve order for groups to follow.
        settings: `scale_search` and `scales_dtype` are used.
        refine: refine the grids by `half_quadratic` first.

    Returns:
        The codes, and a report whose relative_error is `Σ (w - ŵ)² / Σ w²`: a solve's with the identity as Hessian,
        and no damping.

    Raises:
        SolveError: weights that are not finite.
        ValueError: desc_act.
    """
    if spec.desc_act:
        raise ValueError("desc_act=True needs a solve order, and without calibration data there is none")
    start = time.perf_counter()
    original = weight.detach().cpu().float()  # one group after the other: nothing for an accelerator
    if not all_finite(original):
        raise SolveError("the weight is not finite (NaN or infinity); the model's file is damaged")
    columns = original.shape[1]
    scales, zeros = choose_scales(
        original, original.new_ones(columns), spec, settings.scale_search, settings.scales_dtype
    )
    if refine:
        scales, zeros = half_quadratic(original, scales, zeros, spec, settings.scales_dtype)
    group = natural_groups(columns, spec.group_size, original.device)
    quantized = QuantizedWeight(
        codes=quantize(original, scales.T, zeros.T, group, spec.bits),
        scales=scales.T.to(settings.scales_dtype).contiguous(),
        zeros=zeros.T.to(torch.int32).contiguous(),
        group=group,
        spec=spec,
    )
    energy = (original.double() ** 2).sum()
    error = ((original - quantized.dequantize()).double() ** 2).sum()
    relative = float(error) / max(float(energy), torch.finfo(torch.float32).tiny)
    return quantized.to(weight.device), SolveReport(relative, float(error), 0.0, 0, time.perf_counter() - start)
