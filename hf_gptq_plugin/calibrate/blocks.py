"""Quantize one block: its layers in the order in which they run, each on the inputs that it will meet."""

from __future__ import annotations

import itertools
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..format.grid import QuantizedWeight
from ..format.spec import QuantSpec
from ..nn.experts import Experts
from ..nn.linear import QuantLinear
from ..solve.gptq import SolveSettings, solve_factored
from ..solve.hessian import Hessian, SolveError
from ..solve.linalg import dense_linear
from . import processes
from .experts import expert_hessians, own_memory
from .plan import Plan
from .products import dense_twin
from .report import LayerReport
from .sensitivity import Sensitivity
from .stream import Stream, entered
from .tune import TunedLayer, output_loss, tune
from .walk import LINEAR, Block, WalkError, WholeModel, find_stages, linear_shape, linears

logger = logging.getLogger(__name__)


def quantize_block(
    block: Block, dense: Block, stream: Stream, exact: Stream | None, specs: dict[str, QuantSpec], felt: Sensitivity,
    plan: Plan,
) -> Iterator[LayerReport]:  # fmt: skip
    """Quantize one block and send the streams through it.

    Args:
        block: with what the quantized model calls it with.
        dense: with what the dense model calls it with.
        stream: the windows as the quantized model carries them.
        exact: as the dense model does, where errors of earlier layers are to be made good.
        specs: of the layers to quantize, by full name.
        felt: what the model's loss feels.
        plan: how.

    Yields:
        A report per layer, as soon as it is solved.
    """
    # Names only: a dense layer is to be gone once it is replaced.
    everything = list(linears(block.module))
    targets = [local for local in everything if block.full(local) in specs]
    stops = units(block.module, targets)
    groups = find_stages(block, stream.hiddens[0], stops) if stops else []
    uncalled = sorted(stops - {local for group in groups for local in group})
    if uncalled:
        rules: dict[str, dict[str, Any]] = {f"-:.*{_pattern(local)}": {} for local in uncalled}
        raise WalkError(
            f"{block.full(uncalled[0])} is not called in the forward pass on the calibration text ({len(uncalled)} "
            f"such in its block); exclude it with dynamic={json.dumps(rules)}"
        )
    stream.enter(block, everything, set(everything) - set(targets))
    if exact is not None:
        exact.enter(dense_twin(replace(dense, repeated=block.repeated)), everything, set(everything) - set(targets))
    learning = plan.tuning.block_epochs > 0 and bool(targets) and not isinstance(block, WholeModel)
    before = {local: dense_weight(block.module.get_submodule(local)) for local in targets} if learning else {}
    counts = {local: felt.tokens[full] for local in stops if (full := block.full(local)) in felt.tokens}
    crossed = exact if plan.settings.propagation else None  # needed for what is learned afterwards, too
    phases = [[group] for group in groups] if plan.true_sequential else [groups]
    # The group after whose Hessian the dense block has served; experts have several.
    last = groups[-1] if groups and not any(isinstance(stream.submodule(n), Experts) for n in groups[-1]) else None
    for phase in phases:
        done: list[str] = []
        solved: dict[str, QuantizedWeight] = {}
        for group in phase:
            if exact is not None:  # of what is looked at later nothing may be skipped
                exact.settle(group)
            for names, hessian, note in _hessians(stream, crossed, group, targets, counts, plan):
                if exact is not None and group is last:  # before memory is needed most
                    exact.leave()
                drifts = _drifts(block, names, hessian)
                for local in names:
                    full, layer = block.full(local), block.module.get_submodule(local)
                    outputs = felt.outputs.pop(full, None)  # up to 1 GiB over all layers
                    solved[local], report = solve_layer(
                        full, layer, hessian, specs[full], plan.settings, outputs, drifts.pop(local, None)
                    )
                    del layer
                    yield replace(report, note=note)
                del hessian  # gone before the next one is gathered
                done += names
                if plan.true_sequential:
                    _replace_all(block.module, solved)
        _replace_all(block.module, solved)
        stream.settle(done)
    own_memory(block.module)
    hiddens = stream.hiddens
    if exact is not None and exact.inside:
        exact.leave()
    if learning:
        assert exact is not None
        _learn(block, hiddens, exact, before, plan)
        stream.enter(block, everything, everything)  # nothing that was kept holds any more
    stream.leave()


def _drifts(block: Block, names: list[str], hessian: Hessian) -> dict[str, Tensor | None]:
    """What layers need of `C`, which is freed, or of `Z`; nothing where that would take more memory than `C`."""
    weights = {local: dense_weight(block.module.get_submodule(local)) for local in names}
    if sum(map(len, weights.values())) > next(iter(weights.values())).shape[1] and not hessian.has_target:
        return {}
    try:
        drifts = {local: hessian.drift(weight) for local, weight in weights.items()}
    except SolveError as error:
        raise SolveError(f"{block.full(names[0])}: {error}") from None
    hessian.forget_cross()
    return drifts


def _learn(block: Block, hiddens: Sequence[Tensor], exact: Stream, dense: dict[str, Tensor], plan: Plan) -> None:
    layers = {local: TunedLayer(block.module.get_submodule(local), weight) for local, weight in dense.items()}  # type: ignore[arg-type]
    targets, settings = exact.hiddens, plan.tuning
    steps = settings.steps(len(hiddens), settings.block_epochs)
    with processes.progress(steps, f"Tuning {block.name}", "step", leave=False) as bar:
        tune(
            [block], [layers], [{}], hiddens, output_loss(lambda w: targets[w]), settings.block_epochs, settings,
            progress=lambda _: bar.update(),
        )  # fmt: skip
    for local, tuned in layers.items():
        block.module.set_submodule(local, tuned.finished())


def _pattern(local: str) -> str:
    """For the end of a layer's name, or, where it is in one of several experts, for all of them."""
    before, experts, _ = local.partition("experts.")
    return re.escape(before + experts) if experts else f"{re.escape(local)}$"


def units(root: nn.Module, targets: Iterable[str]) -> set[str]:
    """What is stopped at to calibrate layers below `root`: themselves, or the experts module that they are part of."""
    owners = [name for name, module in root.named_modules() if isinstance(module, Experts)]
    return {next((o for o in owners if local.startswith(f"{o}.")), local) for local in targets}


def _hessians(
    stream: Stream, exact: Stream | None, group: list[str], targets: Iterable[str], weights: dict[str, list[Tensor]],
    plan: Plan,
) -> Iterator[tuple[list[str], Hessian, str]]:  # fmt: skip
    """The Hessians of units that read the same tensor: names of the layers each is for, and a note for their reports.

    Experts are seen from the module that holds them: what enters it is kept for all windows, and every expert takes
    its tokens from there, so that the block does not run again for each of them.
    """
    plain = [name for name in group if not isinstance(stream.submodule(name), Experts)]
    for name in group:  # as they run: what lies before a layer that is stopped at is not entered again
        if name in plain:
            if name == plain[0]:
                # While the whole block is dense, several layers would make good what one can.
                alone = len(plain) == 1 and plan.true_sequential
                yield plain, layer_hessian(stream, exact, name, _mean_weights(weights, plain), alone), ""
            continue
        experts, calls = stream.calls_of(name)
        wanted = {local.removeprefix(f"{name}.") for local in targets if local.startswith(f"{name}.")}
        dense = None if exact is None else exact.calls_of(name)
        for parts, hessian, note in expert_hessians(
            experts, calls, dense, wanted, plan.min_expert_tokens, weights.get(name)
        ):
            hessian.combine(processes.sum_in_place, processes.sum_of)
            yield [f"{name}.{part}" for part in parts], hessian, note
            del hessian


def _mean_weights(weights: dict[str, list[Tensor]], names: list[str]) -> list[Tensor] | None:
    """What tokens count for layers that share a Hessian; None where one of them has no weights."""
    if not all(name in weights for name in names):
        return None
    windows = zip(*(weights[name] for name in names), strict=True)
    return [torch.stack(parts).mean(0) for parts in windows]


def layer_hessian(
    stream: Stream, exact: Stream | None, layer: str, weights: Sequence[Tensor] | None = None, alone: bool = False
) -> Hessian:
    """The Hessian of what enters a layer of the block that the streams are in, over all processes.

    Args:
        stream, exact: see `quantize_block`.
        layer: its name in the block.
        weights: what the tokens of every window count, `[tokens]`; None for alike.
        alone: whether no other layer reads the same tensor: then what it is to return is gathered, where that is less
            than what would enter it, or where errors of what its output is added to are to be made good, too.
    """
    module = stream.submodule(layer)
    part = stream.added_to(layer) if alone and exact is not None else None
    by_output = part is not None
    if alone and exact is not None and isinstance(module, LINEAR):
        in_features, out_features = linear_shape(module)
        by_output |= out_features < in_features and stream.runs_once(layer)
    # A bias would be rounded with what the layer returns in 16 bits, and the product in fp32 is not.
    weight = dense_weight(module).float() if by_output and module.bias is not None else None
    hessian: Hessian | None = None
    twins = itertools.repeat(None) if exact is None else exact.seen(layer, part, by_output and weight is None)
    counted = weights if weights is not None else itertools.repeat(None)
    for ours, dense, counts in zip(stream.seen(layer, part), twins, counted, strict=False):
        if (x := entered(ours)) is None:
            continue
        hessian = hessian or Hessian(x.shape[-1], x.device)
        if dense is None:
            hessian.add(x, None, counts)
            continue
        other = entered(dense) if dense.returned is None else dense.returned
        if other is None or other.shape[:-1] != x.shape[:-1]:
            raise WalkError(
                f"the dense model sends other tokens to {stream.full(layer)} than the quantized one, as where a "
                "router chooses among modules; exclude such layers with dynamic, or set propagation=0"
            )
        if by_output:
            target = other.float() if weight is None else dense_linear(other.float(), weight)
            if ours.beside is not None and dense.beside is not None:
                target = target + (dense.beside - ours.beside).to(target.device)
            hessian.add(x, None, counts, target)
        else:
            hessian.add(x, other, counts)
    hessian = hessian or Hessian(1)
    hessian.combine(processes.sum_in_place, processes.sum_of)
    return hessian


def solve_layer(
    name: str, layer: nn.Module, hessian: Hessian, spec: QuantSpec, settings: SolveSettings,
    outputs: list[Tensor] | None = None, drift: Tensor | None = None,
) -> tuple[QuantizedWeight, LayerReport]:  # fmt: skip
    """Solve one layer; errors name it. outputs, drift: see `solve_factored`; without drift it is made of the Hessian's
    `C`."""
    start = time.perf_counter()
    weight = dense_weight(layer)
    try:
        factor = hessian.factor(settings.order_for(spec), settings.damp_percent)
        drift = hessian.drift(weight) if drift is None else drift
        quantized, report = solve_factored(weight, factor, spec, settings, outputs, drift)
    except SolveError as error:
        raise SolveError(f"{name}: {error}") from None
    if report.damp_percent > settings.damp_percent:
        logger.warning(
            "%s: the Hessian was not positive definite with damp_percent=%g; solved with %g.",
            name, settings.damp_percent, report.damp_percent,
        )  # fmt: skip
    out_features, in_features = weight.shape
    report = replace(report, seconds=time.perf_counter() - start)  # the factor's, too, for the first that needs it
    return quantized, LayerReport(name, spec, hessian.tokens, report, in_features, out_features)


def dense_weight(layer: Any) -> Tensor:
    """A layer's weight as `[N, K]`, not to be modified; read where accelerate offloaded it."""
    from accelerate.utils import align_module_device

    with align_module_device(layer):
        weight = layer.weight.detach()
        return weight.T if isinstance(layer, Conv1D) else weight


def replace_layer(root: nn.Module, name: str, quantized: QuantizedWeight) -> None:
    """Put a QuantLinear in a layer's place, on the same device and with the same offloading."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.utils import align_module_device

    layer: Any = root.get_submodule(name)
    with align_module_device(layer):
        bias = layer.bias if isinstance(layer.bias, Tensor) else None
        new = QuantLinear.from_quantized(quantized, bias, layer.weight.dtype)
    new.train(layer.training)
    hook = getattr(layer, "_hf_hook", None)
    if isinstance(hook, AlignDevicesHook) and hook.offload:
        add_hook_to_module(new, AlignDevicesHook(execution_device=hook.execution_device, offload=True))
    root.set_submodule(name, new)


def _replace_all(root: nn.Module, solved: dict[str, QuantizedWeight]) -> None:
    while solved:
        replace_layer(root, *solved.popitem())
