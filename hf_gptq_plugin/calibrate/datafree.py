"""Quantize a model in place without calibration data: every linear layer by itself, without a forward pass."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import torch
from torch import nn

from ..format.spec import QuantSpec
from ..solve.hessian import SolveError
from ..solve.rtn import round_to_nearest
from .blocks import dense_weight, replace_layer
from .chains import find_chains
from .offload import Offloaded
from .pipeline import find_specs, make_journal, output_embedding, separate_experts, write_block
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
        WalkError: a structure that is not understood, nothing to quantize, or an output embedding that cannot be.
        SolveError: weights that are not finite, by name.
    """
    start = time.perf_counter()
    embedding = [output_embedding(model, plan)] if plan.checkpoint.lm_head else []
    chains = find_chains(model, torch.zeros(1, dtype=torch.int64), plan.block_name)
    separate_experts(model, chains, plan)
    specs = find_specs(model, chains, plan) | dict(embedding)
    # There is nothing to go on from: a journal is kept for what is offloaded alone.
    journal = make_journal(model, chains, [], replace(plan, journal=None))
    reports: list[LayerReport] = []
    with progress(len(specs), "Quantizing", "layer") as bar:

        def quantize(names: list[str]) -> list[LayerReport]:
            made = []
            for full in names:
                made.append(_quantize_layer(model, full, specs[full], plan, method))
                bar.update()
                bar.set_postfix_str(f"{full}, error {made[-1].solve.relative_error:.2%}")
            return made

        for name, block in ((name, block) for chain in chains for name, block in chain.blocks.items()):
            offloaded = Offloaded(block)
            offloaded.bring()
            made = quantize([full for full in specs if full.startswith(f"{name}.")])
            if journal is not None:
                write_block(journal, name, offloaded, made, {})
            reports += made
        reports += quantize([head for head, _ in embedding])
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
