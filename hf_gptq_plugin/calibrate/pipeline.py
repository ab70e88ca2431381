"""Quantize a model in place: block by block, and in a block layer by layer in the order in which they run."""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..format.grid import QuantizedWeight
from ..format.spec import CheckpointConfig, QuantSpec
from ..nn.linear import QuantLinear
from ..solve.gptq import SolveReport, SolveSettings, solve
from ..solve.hessian import Hessian, SolveError
from .chains import find_chains
from .walk import Block, Chain, Resumable, WalkError, WholeModel, find_stages, linears, record_calls, twin

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer: its name, spec, the tokens its Hessian saw, and the solve."""

    name: str
    spec: QuantSpec
    tokens: int
    solve: SolveReport


@dataclass(frozen=True)
class Plan:
    """What to quantize, and how.

    Args:
        checkpoint: specs of the modules.
        settings: of the solver.
        true_sequential: let every layer see its quantized predecessors within the block.
        modules: only these names within a block, in lists as the stock config has them; None for all.
        block_name: name of the list of blocks; None to find it.
    """

    checkpoint: CheckpointConfig
    settings: SolveSettings
    true_sequential: bool = True
    modules: list[list[str]] | None = None
    block_name: str | None = None


@torch.no_grad()
def quantize_model(model: nn.Module, windows: list[Tensor], plan: Plan) -> list[LayerReport]:
    """Replace a model's linear layers by quantized ones.

    Every layer is solved on the inputs it will meet, those that the layers already quantized produce.

    Args:
        model: a Transformers model; its blocks' linear layers (and its output embedding, where asked) are replaced
            in place. On an error it is left partly quantized and must not be used.
        windows: calibration token ids, int64 `[tokens]` each.
        plan: what and how.

    Returns:
        A report per layer, in order of execution.

    Raises:
        WalkError: a structure that is not understood, or nothing to quantize.
        SolveError: a layer that cannot be solved, by name.
    """
    start = time.perf_counter()
    training = model.training
    model.eval()
    reports: list[LayerReport] = []
    try:
        chains = find_chains(model, windows[0], plan.block_name)
        specs = _specs(chains, plan)
        _warn_of_fused_weights(chains)
        layers = len(specs) + int(plan.checkpoint.lm_head)
        with tqdm(total=layers, desc="Quantizing", unit="layer", smoothing=0.05) as bar:
            for report in _quantize_chains(model, chains, windows, specs, plan):
                reports.append(report)
                bar.update()
                bar.set_postfix_str(f"{report.name}, error {report.solve.relative_error:.2%}")
            if plan.checkpoint.lm_head:
                reports.append(_quantize_head(model, windows, plan))
                bar.update()
    finally:
        model.train(training)
    logger.info("Quantized %d layers in %.0f s.", len(reports), time.perf_counter() - start)
    return reports


def _specs(chains: list[Chain], plan: Plan) -> dict[str, QuantSpec]:
    wanted = None if plan.modules is None else {m for stage in plan.modules for m in stage}
    listed = " and ".join(chain.name for chain in chains)
    specs: dict[str, QuantSpec] = {}
    known: set[str] = set()
    owners: dict[int, str] = {}
    for chain in chains:
        for block_name, block in chain.blocks.items():
            for local, layer in linears(block).items():
                full = f"{block_name}.{local}"
                known.add(local)
                spec = plan.checkpoint.for_module(full)
                if spec is None or (wanted is not None and local not in wanted):
                    continue
                owner = owners.setdefault(id(layer.weight), full)
                if owner != full:
                    raise WalkError(
                        f"{owner} and {full} share one weight and cannot be quantized apart; exclude both with "
                        'dynamic={"-:<regex>": {}}'
                    )
                specs[full] = spec
    if wanted is not None and not wanted <= known:
        raise WalkError(
            f"modules_in_block_to_quantize names {min(wanted - known)!r}; the blocks of {listed} have "
            f"{', '.join(sorted(known))}"
        )
    if not specs:
        raise WalkError(
            f"no linear layer of {listed} is left to quantize; loosen dynamic or modules_in_block_to_quantize"
        )
    return specs


def _quantize_chains(
    model: nn.Module, chains: list[Chain], windows: list[Tensor], specs: dict[str, QuantSpec], plan: Plan
) -> Iterator[LayerReport]:
    """Quantize chain after chain: what a later one is called with comes from those before it, quantized for the
    stream and dense for the exact one."""
    finished: list[tuple[Chain, list[Tensor]]] = []
    finished_exact: list[tuple[Chain, list[Tensor]]] = []
    for chain in chains:
        blocks, hiddens = record_calls(model, chain, windows, finished)
        stream = _Stream(hiddens)
        exact, twins = None, blocks
        if plan.settings.propagation:
            twins, hiddens = record_calls(model, chain, windows, finished_exact)
            exact = _Stream(hiddens)
            finished_exact.append((chain, exact.hiddens))
        for block, dense in zip(blocks, twins, strict=True):
            yield from _quantize_block(block, dense, stream, exact, specs, plan)
            block.calls.clear()
            dense.calls.clear()
        finished.append((chain, stream.hiddens))


class _Stream:
    """The calibration windows on their way through the blocks: the hidden states that enter the next one."""

    def __init__(self, hiddens: list[Tensor]) -> None:
        self.hiddens = hiddens
        self._block: Resumable | None = None

    def enter(self, block: Block, targets: Iterable[str], final: Iterable[str]) -> None:
        """Begin a block."""
        self._block = Resumable(block, targets, final)

    def settle(self, names: Iterable[str]) -> None:
        """Say that these layers of the block will not change any more."""
        assert self._block is not None
        self._block.final.update(names)

    def inputs_of(self, layer: str) -> Iterator[Tensor | None]:
        """What enters a layer of the block, window by window."""
        assert self._block is not None
        for window, hidden in enumerate(self.hiddens):
            yield self._block.input_of(layer, hidden, window)

    def leave(self) -> None:
        """Finish the block."""
        assert self._block is not None
        for window, hidden in enumerate(self.hiddens):
            self.hiddens[window] = self._block.output(hidden, window)
        self._block = None


def _quantize_block(
    block: Block, dense: Block, stream: _Stream, exact: _Stream | None, specs: dict[str, QuantSpec], plan: Plan
) -> Iterable[LayerReport]:
    """Quantize one block and send the streams through it.

    Args:
        block: with what the quantized model calls it with.
        dense: with what the dense model calls it with.
        stream: the windows as the quantized model carries them.
        exact: as the dense model does, where errors of earlier layers are to be made good.
    """
    everything = linears(block.module)
    targets = {local: layer for local, layer in everything.items() if block.full(local) in specs}
    groups = find_stages(block, stream.hiddens[0], targets) if targets else []
    stream.enter(block, everything, set(everything) - set(targets))
    if exact is not None:
        exact.enter(twin(replace(dense, repeated=block.repeated)), everything, everything)
    uncalled = sorted(set(targets) - {local for group in groups for local in group})
    if uncalled:
        raise WalkError(
            f"{block.full(uncalled[0])} is not called in the forward pass on the calibration text; exclude it with "
            f'dynamic={{"-:.*{re.escape(uncalled[0])}$": {{}}}}'
        )
    phases = [[group] for group in groups] if plan.true_sequential else [groups]
    for phase in phases:
        solved = {}
        for group in phase:
            hessian = _hessian(stream, exact, group[0])
            for local in group:
                full = block.full(local)
                solved[local] = solve_layer(full, targets[local], hessian, specs[full], plan.settings)
        for local, (quantized, report) in solved.items():
            _replace(block.module, local, targets[local], quantized)
            yield report
        stream.settle(solved)
    stream.leave()
    if exact is not None:
        exact.leave()


def _hessian(stream: _Stream, exact: _Stream | None, layer: str) -> Hessian:
    hessian: Hessian | None = None
    twins = exact.inputs_of(layer) if exact is not None else itertools.repeat(None)
    for x, dense in zip(stream.inputs_of(layer), twins, strict=False):
        if x is not None:
            hessian = hessian or Hessian(x.shape[-1], x.device)
            hessian.add(x, exact=dense)
    return hessian or Hessian(1)


def solve_layer(
    name: str, layer: nn.Module, hessian: Hessian, spec: QuantSpec, settings: SolveSettings
) -> tuple[QuantizedWeight, LayerReport]:
    """Solve one layer; errors name it."""
    weight = dense_weight(layer)
    try:
        quantized, report = solve(weight, hessian.mean(), spec, settings, hessian.mean_cross())
    except SolveError as error:
        raise SolveError(f"{name}: {error}") from None
    if report.damp_percent > settings.damp_percent:
        logger.warning(
            "%s: the Hessian was not positive definite with damp_percent=%g; solved with %g.",
            name, settings.damp_percent, report.damp_percent,
        )  # fmt: skip
    return quantized, LayerReport(name, spec, hessian.tokens, report)


def dense_weight(layer: Any) -> Tensor:
    """A layer's weight as `[N, K]`, brought back where accelerate offloaded it."""
    from accelerate.utils import align_module_device

    with align_module_device(layer):
        weight = layer.weight.detach()
        return (weight.T if isinstance(layer, Conv1D) else weight).clone()


def _replace(root: nn.Module, name: str, layer: Any, quantized: QuantizedWeight) -> None:
    """Put a QuantLinear in the place of `layer`, on the same device and with the same offloading."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.utils import align_module_device

    with align_module_device(layer):
        bias = layer.bias if isinstance(layer.bias, Tensor) else None
        new = QuantLinear.from_quantized(quantized, bias, layer.weight.dtype)
    new.train(layer.training)
    hook = getattr(layer, "_hf_hook", None)
    if isinstance(hook, AlignDevicesHook) and hook.offload:
        add_hook_to_module(new, AlignDevicesHook(execution_device=hook.execution_device, offload=True))
    root.set_submodule(name, new)


@torch.no_grad()
def _quantize_head(model: Any, windows: list[Tensor], plan: Plan) -> LayerReport:
    """Quantize the output embedding on the hidden states that the quantized model gives it."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        raise WalkError(f"lm_head=True, but {type(model).__name__} has no linear output embedding")
    name = next(n for n, m in model.named_modules() if m is head)
    spec = plan.checkpoint.for_module(name) or plan.checkpoint.spec
    stream = _Stream([torch.empty(0)] * len(windows))
    stream.enter(WholeModel.reading(model, windows), [name], ())
    hessian = _hessian(stream, None, name)
    quantized, report = solve_layer(name, head, hessian, spec, plan.settings)
    _replace(model, name, head, quantized)
    return report


def _warn_of_fused_weights(chains: list[Chain]) -> None:
    blocks = [next(iter(chain.blocks.values())) for chain in chains]
    fused = [n for block in blocks for n, p in block.named_parameters() if p.dim() == 3 and p.is_floating_point()]
    if fused:
        logger.warning(
            "Expert weights that are fused into one tensor (%s) are not quantized; they stay in %s.",
            ", ".join(fused), next(blocks[0].parameters()).dtype,
        )  # fmt: skip
