"""Quantize a model in place without calibration data: every linear layer by itself, without a forward pass."""

from __future__ import annotations

import logging
import time

import torch
from torch import nn

from ..format.spec import QuantSpec
from ..solve.hessian import SolveError
from ..solve.rtn import round_to_nearest
from .blocks import dense_weight, replace_layer
from .chains import find_chains
from .pipeline import find_specs, output_embedding, separate_experts
from .plan import Plan
from .processes import progress
from .report import LayerReport

logger = logging.getLogger(__name__)


@torch.no_grad()
def quantize_without_data(model: nn.Module, plan: Plan, method: str) -> list[LayerReport]:
    """Replace a model's linear layers by quantized ones.

    Args:
        model: a Transformers model; its blocks' linear layers (and its output embedding, where asked) are replaced
            in place. On an error it is left partly quantized and must not be used.
        plan: what and how; of the settings, those of the scales.
        method: "rtn", or "hqq", which refines the grids by `solve.hqq.half_quadratic`.

    Returns:
        A report per layer, in the order in which the model lists them. `tokens` is 0.

    Raises:
        WalkError: a structure that is not understood, or nothing to quantize.
        SolveError: weights that are not finite, by name.
    """
    start = time.perf_counter()
    chains = find_chains(model, torch.zeros(1, dtype=torch.int64), plan.block_name)
    separate_experts(model, chains, plan)
    specs = find_specs(chains, plan)
    if plan.checkpoint.lm_head:
        head, spec = output_embedding(model, plan)
        specs[head] = spec
    reports = []
    with progress(len(specs), "Quantizing", "layer") as bar:
        for full, spec in specs.items():
            report = _quantize_layer(model, full, spec, plan, method)
            reports.append(report)
            bar.update()
            bar.set_postfix_str(f"{report.name}, error {report.solve.relative_error:.2%}")
    logger.info("Quantized %d layers in %.0f s.", len(reports), time.perf_counter() - start)
    return reports


def _quantize_layer(model: nn.Module, name: str, spec: QuantSpec, plan: Plan, method: str) -> LayerReport:
    layer = model.get_submodule(name)
    weight = dense_weight(layer)
    try:
        quantized, report = round_to_nearest(weight, spec, plan.settings, refine=method == "hqq")
    except SolveError as error:
        raise SolveError(f"{name}: {error}") from None
    replace_layer(model, name, quantized)
    out_features, in_features = weight.shape
    return LayerReport(name, spec, 0, report, in_features, out_features)
