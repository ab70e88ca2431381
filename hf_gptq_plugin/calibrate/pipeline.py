"""Quantize a model in place: block by block, and in a block layer by layer in the order in which they run."""

from __future__ import annotations

import itertools
import logging
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
from ..nn.experts import Experts
from ..nn.linear import QuantLinear
from ..solve.gptq import SolveSettings, solve
from ..solve.hessian import Hessian, SolveError
from .experts import Call, expert_hessians, layouts, own_memory, refuse_unknown, routers, unfuse_experts
from .report import LayerReport
from .walk import Block, Resumable, WalkError, find_blocks, find_stages, linears, record_calls, twin

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What to quantize, and how.

    Args:
        checkpoint: specs of the modules.
        settings: of the solver.
        true_sequential: let every layer see its quantized predecessors within the block.
        modules: only these names within a block, in lists as the stock config has them; None for all.
        block_name: name of the list of blocks; None to find it.
        min_expert_tokens: experts that the router sends fewer tokens lean on all of their layer, see
            `expert_hessians`; None for twice a layer's in_features.
    """

    checkpoint: CheckpointConfig
    settings: SolveSettings
    true_sequential: bool = True
    modules: list[list[str]] | None = None
    block_name: str | None = None
    min_expert_tokens: int | None = None

    def spec_of(self, block: str, local: str) -> QuantSpec | None:
        """The spec of a block's layer; None where it is not to be quantized."""
        wanted = self.modules is None or any(local in stage for stage in self.modules)
        return self.checkpoint.for_module(f"{block}.{local}") if wanted else None


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
    name, blocks = find_blocks(model, plan.block_name)
    _separate_experts(model, name, plan)
    specs = _specs(name, blocks, plan)
    if not specs:
        raise WalkError(
            f"no linear layer of {name} is left to quantize; loosen dynamic or modules_in_block_to_quantize"
        )
    training = model.training
    model.eval()
    reports: list[LayerReport] = []
    try:
        chain, hiddens = record_calls(model, name, blocks, windows)
        stream = _Stream(hiddens)
        exact = _Stream(list(hiddens)) if plan.settings.propagation else None
        layers = len(specs) + int(plan.checkpoint.lm_head)
        with tqdm(total=layers, desc="Quantizing", unit="layer", smoothing=0.05) as bar:
            for block in chain:
                for report in _quantize_block(block, stream, exact, specs, plan):
                    reports.append(report)
                    bar.update()
                    bar.set_postfix_str(f"{report.name}, error {report.solve.relative_error:.2%}")
                block.calls.clear()
            if plan.checkpoint.lm_head:
                reports.append(_quantize_head(model, windows, plan))
                bar.update()
    finally:
        model.train(training)
    _warn_of_starved_experts(reports)
    logger.info("Quantized %d layers in %.0f s.", len(reports), time.perf_counter() - start)
    return reports


def _specs(name: str, blocks: nn.ModuleList, plan: Plan) -> dict[str, QuantSpec]:
    specs = {}
    for i, block in enumerate(blocks):
        dense = routers(block) if plan.modules is None else set()
        for local in linears(block):
            spec = plan.spec_of(f"{name}.{i}", local)
            if spec is not None and local not in dense:
                specs[f"{name}.{i}.{local}"] = spec
    if plan.modules is not None:
        wanted = {m for stage in plan.modules for m in stage}
        known = {local for block in blocks for local in linears(block)}
        unknown = sorted(wanted - known)
        if unknown:
            raise WalkError(
                f"modules_in_block_to_quantize names {unknown[0]!r}; the blocks of {name} have "
                f"{', '.join(sorted(known))}"
            )
    return specs


def _separate_experts(model: nn.Module, name: str, plan: Plan) -> None:
    """Take the blocks' fused experts apart where any of them is to be quantized."""

    def asked(full: str) -> bool:
        index, _, local = full.removeprefix(f"{name}.").partition(".")
        return plan.spec_of(f"{name}.{index}", local) is not None

    found = layouts(model, name)
    refuse_unknown(found, asked)
    known = [layout for layout in found.values() if layout is not None]
    if any(asked(layer) for layout in known for layer in layout.layers()):
        unfuse_experts(model, known)


def _warn_of_starved_experts(reports: list[LayerReport]) -> None:
    starved = sorted({report.name.rpartition(".")[0] for report in reports if report.note})
    if starved:
        logger.warning(
            "%d experts were sent few calibration tokens and lean on all tokens of their layer (%s%s); their reports "
            "say how many. More, and more varied, calibration text gives them their own.",
            len(starved), ", ".join(starved[:3]), ", ..." if len(starved) > 3 else "",
        )  # fmt: skip


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

    def calls_of(self, module: str) -> tuple[Any, list[Call]]:
        """A module of the block, and the arguments with which it is called, window by window."""
        assert self._block is not None
        called = self._block.block.module.get_submodule(module)
        calls: list[Call] = []
        handle = called.register_forward_pre_hook(lambda m, args: calls.append(args))
        try:
            for _ in self.inputs_of(module):
                pass
        finally:
            handle.remove()
        return called, calls

    def leave(self) -> None:
        """Finish the block."""
        assert self._block is not None
        for window, hidden in enumerate(self.hiddens):
            self.hiddens[window] = self._block.output(hidden, window)
        self._block = None


def _quantize_block(
    block: Block, stream: _Stream, exact: _Stream | None, specs: dict[str, QuantSpec], plan: Plan
) -> Iterable[LayerReport]:
    """Quantize one block and send the streams through it.

    Args:
        stream: the windows as the quantized model carries them.
        exact: as the dense model does, where errors of earlier layers are to be made good.
    """
    layers = linears(block.module)
    targets = {local: layer for local, layer in layers.items() if f"{block.name}.{local}" in specs}
    everything, units = _units(block.module, layers), _units(block.module, targets)
    stream.enter(block, everything, set(everything) - set(units))
    if exact is not None:
        exact.enter(twin(block), everything, everything)
    groups = find_stages(block, stream.hiddens[0], units) if units else []
    uncalled = sorted(set(units) - {local for group in groups for local in group})
    if uncalled:
        raise WalkError(
            f"{block.name}.{uncalled[0]} takes no part in the forward pass on the calibration text; exclude it with "
            'dynamic={"-:<regex>": {}}'
        )
    phases = [[group] for group in groups] if plan.true_sequential else [groups]
    for phase in phases:
        solved: dict[str, QuantizedWeight] = {}
        for group in phase:
            for names, hessian, note in _hessians(stream, exact, units, group, targets, plan):
                for local in names:
                    full = f"{block.name}.{local}"
                    solved[local], report = solve_layer(full, targets[local], hessian, specs[full], plan.settings)
                    yield replace(report, note=note)
                if plan.true_sequential:
                    _replace_all(block.module, targets, solved)
        _replace_all(block.module, targets, solved)
        stream.settle(unit for group in phase for unit in group)
    own_memory(block.module)
    stream.leave()
    if exact is not None:
        exact.leave()


def _units(block: nn.Module, targets: Iterable[str]) -> dict[str, nn.Module]:
    """What is stopped at to calibrate layers: themselves, or the experts module that they are part of."""
    owners = [name for name, module in block.named_modules() if isinstance(module, Experts)]
    names = [next((o for o in owners if local.startswith(f"{o}.")), local) for local in targets]
    return {name: block.get_submodule(name) for name in names}


def _hessians(
    stream: _Stream, exact: _Stream | None, units: dict[str, nn.Module], group: list[str], targets: Iterable[str],
    plan: Plan,
) -> Iterator[tuple[list[str], Hessian, str]]:  # fmt: skip
    """The Hessians of units that read the same tensor: names of the layers each is for, and a note for their reports.

    Experts are seen from the module that holds them: what enters it is kept for all windows, and every expert takes
    its tokens from there, so that the block does not run again for each of them.
    """
    mixtures = [name for name in group if isinstance(units[name], Experts)]
    plain = [name for name in group if name not in mixtures]
    if plain:
        yield plain, _hessian(stream, exact, plain[0]), ""
    for name in mixtures:
        experts, calls = stream.calls_of(name)
        wanted = {local.removeprefix(f"{name}.") for local in targets if local.startswith(f"{name}.")}
        dense = None if exact is None else exact.calls_of(name)
        for parts, hessian, note in expert_hessians(experts, calls, dense, wanted, plan.min_expert_tokens):
            yield [f"{name}.{part}" for part in parts], hessian, note


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
    out_features, in_features = weight.shape
    return quantized, LayerReport(name, spec, hessian.tokens, report, in_features, out_features)


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


def _replace_all(root: nn.Module, layers: dict[str, Any], solved: dict[str, QuantizedWeight]) -> None:
    while solved:
        name, quantized = solved.popitem()
        _replace(root, name, layers[name], quantized)


def output_embedding(model: Any, plan: Plan) -> tuple[str, QuantSpec]:
    """Name and spec of a model's output embedding.

    Raises:
        WalkError: it has none that is linear.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        raise WalkError(f"lm_head=True, but {type(model).__name__} has no linear output embedding")
    name = next(n for n, m in model.named_modules() if m is head)
    return name, plan.checkpoint.for_module(name) or plan.checkpoint.spec


@torch.no_grad()
def _quantize_head(model: Any, windows: list[Tensor], plan: Plan) -> LayerReport:
    """Quantize the output embedding on the hidden states that the quantized model gives it."""
    name, spec = output_embedding(model, plan)
    head = model.get_submodule(name)
    calls = [((), {"input_ids": ids[None].to(head.weight.device), "use_cache": False}) for ids in windows]
    stream = _Stream([torch.empty(0)] * len(windows))
    stream.enter(Block("", _Whole(model), calls), [f"model.{name}"], ())
    hessian = _hessian(stream, None, f"model.{name}")
    quantized, report = solve_layer(name, head, hessian, spec, plan.settings)
    _replace(model, name, head, quantized)
    return report


class _Whole(nn.Module):
    """A model as a block that ignores the hidden states it is handed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor, **kwargs: object) -> object:
        return self.model(**kwargs)
