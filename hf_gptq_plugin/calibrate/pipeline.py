"""Quantize a model in place, block by block, and go on where an earlier process was stopped."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..format.grid import QuantizedWeight
from ..format.spec import OVERRIDES, QuantSpec, rule_of
from ..nn.linear import QuantLinear
from ..version import __version__
from . import processes
from .blocks import layer_hessian, quantize_block, replace_layer, solve_layer, units
from .chains import find_chains
from .experts import layouts, refuse_unknown, routers, unfuse_experts
from .generate import generated_windows
from .journal import Hiddens, Journal, fingerprint, reading
from .memory import freed_at_once, map_parameters
from .offload import FileTensors, Offloaded, attach, execution_device
from .plan import Plan
from .products import dense_twin
from .report import LayerReport, from_record, to_record
from .sensitivity import Sensitivity, sensitivity
from .stream import Stream
from .threads import single_threaded
from .tune import TunedLayer, model_loss, tune, tuned_vectors
from .walk import Block, Chain, WalkError, WholeModel, input_device, linears, record_calls, rotary_by_length

logger = logging.getLogger(__name__)


@torch.no_grad()
def quantize_model(model: nn.Module, windows: list[Tensor], plan: Plan) -> list[LayerReport]:
    """Replace a model's linear layers by quantized ones.

    Every layer is solved on the inputs it will meet, those that the layers already quantized produce. Where several
    processes run this on the same model (`torch.distributed` is initialized), each reads a share of the windows, and
    all end with the same layers.

    Args:
        model: a Transformers model; its blocks' linear layers (and its output embedding, where asked) are replaced
            in place. On an error it is left partly quantized and must not be used.
        windows: calibration token ids, int64 `[tokens]` each; `plan.generated` adds some.
        plan: what and how.

    Returns:
        A report per layer, in order of execution.

    Raises:
        WalkError: a structure that is not understood, nothing to quantize, an output embedding that cannot be, or
            inference mode, whose tensors tell nobody when they are written into.
        SolveError: a layer that cannot be solved, by name.
        JournalError: the journal's folder cannot be written.
    """
    start = time.perf_counter()
    if torch.is_inference_mode_enabled():
        raise WalkError("calibration does not work in torch.inference_mode(); use torch.no_grad() instead")
    if plan.checkpoint.lm_head:
        output_embedding(model, plan)  # what it raises shows now
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        stack.enter_context(rotary_by_length(model))
        for device in {"cpu", input_device(model).type}:  # other threads do not have the caller's either
            stack.enter_context(torch.autocast(device, enabled=False))
        if plan.low_memory:
            stack.enter_context(freed_at_once())
        windows = processes.share(windows)
        chains = find_chains(model, windows[0], plan.block_name)
        with single_threaded():
            record_calls(model, chains[0], [max(windows, key=len)])  # too long a window shows now
        count, seed = round(plan.generated * len(windows)), plan.seed + (processes.rank() << 32)
        windows = [*windows, *generated_windows(model, windows, count, seed)]
        journal = make_journal(model, chains, windows, plan)
        separate_experts(model, chains, plan)
        specs = find_specs(model, chains, plan)
        felt = _sensitivity(model, chains, windows, specs, plan)
        layers = len(specs) + int(plan.checkpoint.lm_head)
        reports: list[LayerReport] = []
        with processes.progress(layers, "Quantizing", "layer") as bar:
            for report in _quantize_chains(model, chains, windows, specs, felt, plan, journal):
                reports.append(report)
                bar.update()
                bar.set_postfix_str(f"{report.name}, error {report.solve.relative_error:.2%}")
            if plan.checkpoint.lm_head:
                reports.append(_quantize_head(model, windows, felt, plan))
                bar.update()
    _warn_of_starved_experts(reports)
    logger.info("Quantized %d layers in %.0f s.", len(reports), time.perf_counter() - start)
    return reports


def make_journal(model: nn.Module, chains: list[Chain], windows: list[Tensor], plan: Plan) -> Journal | None:
    """The journal to write. Where blocks are offloaded there must be one, for as long as the model lives: its files
    are what they are read from afterwards, and in low memory what is in no block, too."""
    if processes.count() > 1 and plan.journal is not None:
        logger.warning("Several processes calibrate: they keep no journal, and cannot go on after an interruption.")
    folder = plan.journal if processes.count() == 1 else None
    if folder is None:
        offloaded = any(Offloaded(block).active for chain in chains for block in chain.blocks.values())
        if not (plan.low_memory or offloaded):
            return None
        folder = Path(tempfile.mkdtemp(prefix="hf-gptq-"))
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    job = {**asdict(replace(plan, journal=None)), "version": __version__, "torch": torch.__version__}
    job["dynamic"] = list(plan.checkpoint.dynamic.items())  # the first rule that matches holds
    journal = Journal(folder, fingerprint(model, windows, job))
    if plan.low_memory:
        map_parameters(model, journal.folder)
    return journal


def find_specs(model: nn.Module, chains: list[Chain], plan: Plan) -> dict[str, QuantSpec]:
    """What is to be quantized: layers' full names and specs. Rules of `dynamic` without effect are warned of.

    Raises:
        WalkError: nothing at all, or names that do not exist.
    """
    specs: dict[str, QuantSpec] = {}
    known: set[str] = set()
    names: list[str] = []
    owners: dict[int, str] = {}
    listed = " and ".join(chain.name for chain in chains)
    for chain in chains:
        for block_name, block in chain.blocks.items():
            dense = routers(block) if plan.modules is None else set()
            for local, layer in linears(block).items():
                full = f"{block_name}.{local}"
                known.add(local)
                names.append(full)
                spec = plan.spec_of(block_name, local)
                if spec is None or local in dense:
                    continue
                owner = owners.setdefault(id(layer.weight), full)
                if owner != full:
                    raise WalkError(
                        f"{owner} and {full} share one weight and cannot be quantized apart; exclude both with "
                        'dynamic={"-:<regex>": {}}'
                    )
                specs[full] = spec
    wanted = {m for stage in plan.modules or [] for m in stage}
    if not wanted <= known:
        raise WalkError(
            f"modules_in_block_to_quantize names {min(wanted - known)!r}; the blocks of {listed} have "
            f"{', '.join(sorted(known))}"
        )
    if processes.rank() == 0:
        _warn_of_rules(model, chains, names, plan)
    if not specs:
        raise WalkError(
            f"no linear layer of {listed} is left to quantize; loosen dynamic or modules_in_block_to_quantize"
        )
    return specs


def _warn_of_rules(model: Any, chains: list[Chain], names: list[str], plan: Plan) -> None:
    """Name the rules of `dynamic` that match nothing, and those of their fields that are not read.

    Args:
        names: of the blocks' linear layers.
    """
    if not plan.checkpoint.dynamic:
        return
    fused = {n: layout for chain in chains for block in chain.blocks for n, layout in layouts(model, block).items()}
    known = list(names)
    for name, layout in fused.items():  # which a rule may have left so
        known += [name, *(layout.layers() if layout is not None else ())]
    known += [name for name, _ in _heads(model)]
    for pattern, overrides in plan.checkpoint.dynamic.items():
        if not any(rule_of([pattern], name) for name in known):
            logger.warning(
                "dynamic[%r] has no effect: it matches no linear layer of %s, nor the output embedding. Patterns match "
                "from the beginning of a full name, such as %s.",
                pattern, " and ".join(chain.name for chain in chains), known[0] if known else "model.layers.0.x",
            )  # fmt: skip
        ignored = [] if pattern.startswith("-:") else [str(name) for name in overrides if name not in OVERRIDES]
        if ignored:
            logger.warning(
                "dynamic[%r] has fields that are ignored: %s. Read are %s; others of GPTQModel's, such as damp_percent "
                "and mse, have no effect here.",
                pattern, ", ".join(ignored), ", ".join(OVERRIDES),
            )  # fmt: skip


def separate_experts(model: nn.Module, chains: list[Chain], plan: Plan) -> None:
    """Take the blocks' fused experts apart where any of them is to be quantized."""

    def asked(full: str) -> bool:
        block = next(b for chain in chains for b in chain.blocks if full.startswith(f"{b}."))
        return plan.spec_of(block, full.removeprefix(f"{block}.")) is not None

    found = {n: layout for chain in chains for block in chain.blocks for n, layout in layouts(model, block).items()}
    refuse_unknown(found, asked)
    known = [layout for layout in found.values() if layout is not None]
    if any(asked(layer) for layout in known for layer in layout.layers()):
        unfuse_experts(model, known)


def _sensitivity(
    model: nn.Module, chains: list[Chain], windows: list[Tensor], specs: dict[str, QuantSpec], plan: Plan
) -> Sensitivity:
    """What the loss feels of the layers' errors, of tokens by what is stopped at to calibrate them."""
    names = units(model, specs) if plan.token_weights == "loss" else set()
    if names and plan.checkpoint.lm_head:
        names.add(output_embedding(model, plan)[0])
    outputs = set(specs) if plan.output_hessian == "loss" else set()
    if not names and not outputs:
        return Sensitivity()
    blocks = [b for chain in chains for b in chain.blocks.values()]
    return sensitivity(model, blocks, windows, names, outputs, plan.seed)


def _warn_of_starved_experts(reports: list[LayerReport]) -> None:
    starved = sorted({report.name.rpartition(".")[0] for report in reports if report.note})
    if starved:
        logger.warning(
            "%d experts were sent few calibration tokens and lean on all tokens of their layer (%s%s); their reports "
            "say how many. More, and more varied, calibration text gives them their own.",
            len(starved), ", ".join(starved[:3]), ", ..." if len(starved) > 3 else "",
        )  # fmt: skip


def _quantize_chains(
    model: nn.Module, chains: list[Chain], windows: list[Tensor], specs: dict[str, QuantSpec], felt: Sensitivity,
    plan: Plan, journal: Journal | None,
) -> Iterator[LayerReport]:  # fmt: skip
    """Quantize chain after chain: what a later one is called with comes from those before it, quantized for the
    stream and dense for the exact one."""
    finished: list[tuple[Chain, Hiddens]] = []
    finished_exact: list[tuple[Chain, Hiddens]] = []
    # Of hidden states that an interrupted run goes on from.
    sequences = {} if journal is None else journal.streams()
    for number, chain in enumerate(chains):
        with single_threaded():
            blocks, entries = record_calls(model, chain, windows, finished)
            twins, exact_entries = blocks, entries
            if plan.needs_exact:  # of its own: blocks may share what they put down in a mapping, see `find_chains`
                twins, exact_entries = record_calls(model, chain, windows, finished_exact)
        stream = _stream(f"quantized-{number}", entries, blocks, plan, journal)
        exact = _stream(f"dense-{number}", exact_entries, blocks, plan, journal) if plan.needs_exact else None
        if not plan.tuning.model_epochs:
            entries, exact_entries = [], []  # on disk, where that is asked for
        calls = [block.calls for block in blocks] if plan.tuning.model_epochs else []
        for block, dense in zip(blocks, twins, strict=True):
            if journal is not None and block.name in journal.blocks:
                if _shares(block):
                    _pass_through(dense, exact, quantized=False)
                yield from _restore(block.module, block.name, journal)
                if _shares(block):
                    _pass_through(block, stream, quantized=True)
            else:
                offloaded = Offloaded(block.module)
                offloaded.bring()
                reports = []
                for report in quantize_block(block, dense, stream, exact, specs, felt, plan):
                    reports.append(report)
                    yield report
                if journal is not None:
                    sequences |= {f"quantized-{number}": stream.hiddens.sequence}
                    if exact is not None:
                        sequences |= {f"dense-{number}": exact.hiddens.sequence}
                    write_block(journal, block.name, offloaded, reports, sequences)
            block.calls, dense.calls = [], []
        finished.append((chain, stream.hiddens))
        if exact is not None:
            finished_exact.append((chain, exact.hiddens))
            if number == len(chains) - 1 and plan.tuning.model_epochs:
                for block, recorded in zip(blocks, calls, strict=True):
                    block.calls = recorded
                _tune_model(model, chain, blocks, entries, exact.hiddens, windows, specs, plan)


def _stream(name: str, entries: list[Tensor], blocks: list[Block], plan: Plan, journal: Journal | None) -> Stream:
    """A stream at the chain's first block, or where an earlier process has left it."""
    if journal is None:
        return Stream(entries)
    in_memory = not plan.low_memory
    position = sum(block.name in journal.blocks for block in blocks)
    if not position or any(map(_shares, blocks)):
        return Stream(entries, name, journal.folder, in_memory)
    left = Hiddens((), journal.folder, journal.streams()[name], in_memory, len(entries), entries[0].device)
    return Stream(left, name, journal.folder, in_memory, position)


def _shares(block: Block) -> bool:
    """Whether a block is handed a mapping, into which some models' blocks write what later ones read."""
    return any(isinstance(v, Mapping) for args, kwargs in block.calls[:1] for v in (*args, *kwargs.values()))


def _pass_through(block: Block, stream: Stream | None, quantized: bool) -> None:
    """Run a block that is done once more, for what it hands on beside hidden states."""
    if stream is None:
        return
    offloaded = Offloaded(block.module)
    offloaded.bring()
    everything = linears(block.module)
    stream.enter(block if quantized else dense_twin(block), everything, everything)
    stream.leave()
    offloaded.back()


def write_block(
    journal: Journal, name: str, offloaded: Offloaded, reports: list[LayerReport], sequences: dict[str, str]
) -> None:
    """Note a block that is done, and let the file hold its layers from now on if it was offloaded before."""
    layers = {n: m for n, m in offloaded.block.named_modules() if isinstance(m, QuantLinear)}
    prefix = f"{name}." if name else ""
    tensors = {f"{prefix}{n}.{leaf}": t for n, m in layers.items() for leaf, t in m.state_dict().items()}
    file = journal.write_block(tensors)
    journal.commit(name, file, map(to_record, reports), sequences)
    offloaded.send(file, layers, prefix)


def _restore(module: nn.Module, name: str, journal: Journal) -> list[LayerReport]:
    """Put the layers that an earlier process has solved into a block."""
    reports = [from_record(record) for record in journal.records(name)]
    prefix = f"{name}." if name else ""
    offloaded = Offloaded(module)
    for report in reports:
        local = report.name.removeprefix(prefix)
        layer: Any = module.get_submodule(local)
        if offloaded.active:
            spec_layer = QuantLinear(report.in_features, report.out_features, report.spec, dtype=layer.weight.dtype)
            attach(
                module,
                local,
                spec_layer.train(layer.training),
                journal.file(name),
                report.name,
                execution_device(layer),
            )
        else:
            with reading(journal.file(name)):
                stored = dict(FileTensors(journal.file(name), report.name))
            stored.pop("bias", None)  # the dense layer has it, too
            quantized = QuantizedWeight.unpack(**stored, spec=report.spec)
            replace_layer(module, local, quantized.to(layer.weight.device))
    return reports


def _tune_model(
    model: nn.Module, chain: Chain, blocks: list[Block], entries: list[Tensor], target: Hiddens, windows: list[Tensor],
    specs: dict[str, QuantSpec], plan: Plan,
) -> None:  # fmt: skip
    """Let all scales and vectors of the last chain learn to give the dense model's output."""
    if isinstance(blocks[0], WholeModel):
        logger.warning("model_epochs has no effect: %s is walked as one piece.", chain.name)
        return
    layers = []
    for block in blocks:
        names = [local for local in linears(block.module) if block.full(local) in specs]
        layers.append({local: TunedLayer(block.module.get_submodule(local), None) for local in names})  # type: ignore[arg-type]
    steps = plan.tuning.steps(len(windows), plan.tuning.model_epochs)
    with (
        processes.progress(steps, "Tuning the model", "step") as bar,
        model_loss(model, chain, blocks, windows, target) as loss,
        tuned_vectors(blocks) as vectors,
    ):

        def progress(value: float) -> None:
            bar.update()
            bar.set_postfix_str(f"loss {value:.4f}")

        tune(blocks, layers, vectors, entries, loss, plan.tuning.model_epochs, plan.tuning, progress=progress)
    for block, part in zip(blocks, layers, strict=True):
        for local, tuned in part.items():
            block.module.set_submodule(local, tuned.finished())


def _heads(model: Any) -> Iterator[tuple[str, Any]]:
    """The output embedding with its name, where there is one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return ((name, module) for name, module in model.named_modules() if module is head)


def output_embedding(model: Any, plan: Plan) -> tuple[str, QuantSpec]:
    """Name and spec of a model's output embedding.

    Raises:
        WalkError: it has none that is linear, or a rule of `dynamic` excludes it.
    """
    name, head = next(_heads(model), ("", None))
    if not isinstance(head, nn.Linear):
        raise WalkError(f"lm_head=True, but {type(model).__name__} has no linear output embedding")
    if getattr(model.config, "is_encoder_decoder", False):
        raise WalkError(
            f"lm_head=True: the output embedding of an encoder-decoder ({type(model).__name__}) is tied to its input "
            "embeddings in ways that a checkpoint cannot undo; leave lm_head=False"
        )
    spec = plan.checkpoint.for_module(name)
    if spec is None:
        rule = rule_of(plan.checkpoint.dynamic, name)
        raise WalkError(f"lm_head=True and dynamic[{rule!r}], which excludes {name}, contradict each other; drop one")
    return name, spec


@torch.no_grad()
def _quantize_head(model: Any, windows: list[Tensor], felt: Sensitivity, plan: Plan) -> LayerReport:
    """Quantize the output embedding on the hidden states that the quantized model gives it."""
    name, spec = output_embedding(model, plan)
    head = model.get_submodule(name)
    stream = Stream([torch.empty(0)] * len(windows))
    stream.enter(WholeModel.reading(model, windows), [name], ())
    quantized, report = solve_layer(
        name, head, layer_hessian(stream, None, name, felt.tokens.get(name)), spec, plan.settings
    )
    replace_layer(model, name, quantized)
    return report
