"""Mixtures of experts: take fused weights apart, and choose what each expert is calibrated on.

Transformers keeps all experts of a layer in two tensors `[E, N, K]` and merges a checkpoint's matrices into them while
it loads. How it does so, its conversion mapping, tells which rows of a fused tensor are which matrix and what that
matrix is called on disk; nothing here goes by the name of an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from ..nn.experts import Expert, Experts
from ..solve.hessian import Hessian
from ..solve.linalg import total
from .threads import in_order
from .walk import LINEAR, WalkError, linears

ROWS = 4096  # tokens that are handed to a Hessian at once
_PART = 256  # of these, what one thread computes
SAMPLE = 16384  # tokens of all experts that one with few tokens of its own leans on
ENOUGH = 2  # times in_features: from this many tokens on an expert's layer stands alone


@dataclass(frozen=True)
class Layout:
    """How one fused experts module is stored on disk.

    Args:
        name: of the module in the model, e.g. "model.layers.3.mlp.experts".
        count: experts.
        ups: names of an expert's matrices that read the tokens, in the order in which they are fused.
        down: name of the one that writes the result.
        fused: names of the fused parameters, ups first.
    """

    name: str
    count: int
    ups: tuple[str, ...]
    down: str
    fused: tuple[str, str]

    def layers(self) -> Iterator[str]:
        """Names that the separate layers get in the model."""
        for index in range(self.count):
            for leaf in (*self.ups, self.down):
                yield f"{self.name}.{index}.{leaf}"


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of many experts itself."""
    own = [p for p in module.parameters(recurse=False) if p.dim() >= 2 and p.is_floating_point()]
    named = "expert" in type(module).__name__.lower() and not isinstance(module, (*LINEAR, Experts, Expert))
    return bool(own) and (named or hasattr(module, "is_transposed"))  # Transformers' decorator leaves that mark


def layouts(model: nn.Module, within: str = "") -> dict[str, Layout | None]:
    """The fused experts modules at and below `within`, by name; None for those whose layout is not understood."""
    names = [n for n, m in model.named_modules() if is_fused(m) and (not within or f"{n}.".startswith(f"{within}."))]
    if not names:
        return {}
    converters = _merging_converters(model)
    return {name: _layout(name, model.get_submodule(name), converters) for name in names}


def _merging_converters(model: nn.Module) -> list[WeightConverter]:
    if not isinstance(model, PreTrainedModel):
        return []
    return [c for c in get_model_conversion_mapping(model, add_legacy=False) if merges_experts(c)]


def merges_experts(transform: object) -> TypeGuard[WeightConverter]:
    """Whether a step of Transformers' loading stacks one matrix per expert into one tensor, and does nothing else."""
    if not isinstance(transform, WeightConverter):
        return False
    stack, *rest = transform.operations
    return (
        isinstance(stack, MergeModulelist)
        and stack.dim == 0
        and all(isinstance(op, Concatenate) and op.dim == 1 for op in rest)
        and len(rest) == (len(transform.source_patterns) > 1)
        and len(transform.target_patterns) == 1
    )


def merges_into(transform: object, layout: Layout) -> bool:
    """Whether a step of Transformers' loading makes one of this module's fused tensors."""
    return merges_experts(transform) and any(_matrices(layout.name, fused, [transform]) for fused in layout.fused)


def _layout(name: str, module: nn.Module, converters: list[WeightConverter]) -> Layout | None:
    parameters = dict(module.named_parameters(recurse=False))
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    fused = (first, "down_proj")
    plain = hasattr(module, "is_transposed") and not module.is_transposed and not module.has_bias
    if not plain or set(parameters) != set(fused) or any(True for _ in module.buffers()):
        return None
    if any(p.dim() != 3 for p in parameters.values()):
        return None
    ups, downs = (_matrices(name, parameter, converters) for parameter in fused)
    count = parameters[first].shape[0]
    if not ups or len(downs) != 1 or parameters["down_proj"].shape[0] != count:
        return None
    return Layout(name, count, ups, downs[0], fused)


def _matrices(name: str, parameter: str, converters: list[WeightConverter]) -> tuple[str, ...]:
    """What the matrices in one row of a fused parameter are called on disk; empty where that is not known."""
    for converter in converters:
        back = converter.reverse_transform()
        source, matched = back.rename_source_key(f"{name}.{parameter}")
        if matched is None:
            continue
        stem, _, leaf = source.partition("*.")
        leaves = tuple(p.partition("*.")[2] for p in back.target_patterns)
        if stem != f"{name}." or leaf != leaves[0] or not all(one.endswith(".weight") for one in leaves):
            return ()
        return tuple(one.removesuffix(".weight") for one in leaves)
    return ()


def unfuse_experts(root: nn.Module, found: Iterable[Layout], prefix: str = "") -> None:
    """Replace fused experts modules below `root` by `Experts` on the same memory.

    Args:
        root: a model, or one block of it. On the meta device, too.
        found: layouts by full name; those that are not below `prefix` are passed over.
        prefix: name of `root` in the model.
    """
    for layout in found:
        if not prefix or layout.name.startswith(f"{prefix}."):
            local = layout.name.removeprefix(f"{prefix}." if prefix else "")
            root.set_submodule(local, _unfused(root.get_submodule(local), layout))


def _unfused(module: Any, layout: Layout) -> Experts:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.utils import align_module_device

    hook = getattr(module, "_hf_hook", None)
    combine = module._apply_gate if module.has_gate else module.act_fn
    with align_module_device(module):
        above, below = (getattr(module, name) for name in layout.fused)
        experts = []
        for index in range(layout.count):
            parts = above.detach()[index].chunk(len(layout.ups))
            ups = {leaf: _linear(part, above) for leaf, part in zip(layout.ups, parts, strict=True)}
            experts.append(Expert(ups, (layout.down, _linear(below.detach()[index], below)), combine))
    for name in layout.fused:
        delattr(module, name)  # `combine` may keep the module
    new = Experts(experts).train(module.training)
    if isinstance(hook, AlignDevicesHook) and hook.offload:
        for layer in linears(new).values():
            add_hook_to_module(layer, AlignDevicesHook(execution_device=hook.execution_device, offload=True))
    return new


def _linear(weight: Tensor, fused: nn.Parameter) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=fused.requires_grad)
    return layer


def own_memory(block: nn.Module) -> None:
    """Give layers that stay dense memory of their own, so that what held all experts together is freed."""
    for module in block.modules():
        if isinstance(module, Experts):
            for layer in linears(module).values():
                weight = layer._parameters.get("weight")  # a QuantLinear has none
                if weight is not None and not weight.is_meta and weight.untyped_storage().nbytes() > weight.nbytes:
                    weight.data = weight.data.clone()


def routers(block: nn.Module) -> set[str]:
    """Linear layers of a block that choose among experts or weigh a shared one.

    They are tiny, decide for whole tokens, and readers of the format expect them dense.
    """
    found = set()
    for name, module in block.named_modules():
        if isinstance(module, Experts) or is_fused(module):
            count = getattr(module, "num_experts", None) or next(module.parameters()).shape[0]
            parent = name.rpartition(".")[0]
            for local, layer in linears(block.get_submodule(parent)).items():
                if layer.weight.shape[0] in (1, count) and any(
                    part in ("gate", "router") or part.endswith(("_gate", "_router")) for part in local.split(".")
                ):
                    found.add(f"{parent}.{local}" if parent else local)
    return found


def refuse_unknown(found: Mapping[str, Layout | None], asked: Callable[[str], bool]) -> None:
    """Refuse fused experts that are to be quantized, but whose layout is not understood.

    Raises:
        WalkError: naming the module and the rule that leaves it out.
    """
    for name, layout in found.items():
        if layout is None and asked(name):
            leaf = name.rpartition(".")[2]
            raise WalkError(
                f"{name} holds fused experts, and Transformers names no matrices per expert in this architecture's "
                f"checkpoints, so that no reader would know them; leave them dense with "
                f'dynamic={{"-:.*\\\\.{leaf}": {{}}}}'
            )


Call = tuple[Any, ...]  # hidden_states, top_k_index, top_k_weights


def expert_hessians(
    experts: Experts,
    calls: list[Call],
    exact: tuple[Experts, list[Call]] | None,
    wanted: set[str],
    least: int | None = None,
    weights: list[Tensor] | None = None,
) -> Iterator[tuple[list[str], Hessian, str]]:
    """The Hessians of an experts module's layers, one expert after the other.

    An expert's last layer is asked for after the others; what they have been replaced by by then makes its inputs.
    Both streams take the tokens that the quantized model's router chose, so that rows correspond token by token.

    A layer that saw few tokens also leans on a sample of all that entered the module, as though they had been sent to
    it, with the weight of `in_features` tokens: `H = (T H_own + K H_all) / (T + K)`. On the MLP inputs of a real model
    that beat its own tokens up to `T = 3 K`, and all tokens alike (`H_all`) for every `T`; beyond, nothing is gained.

    Args:
        experts: the module of the quantized stream.
        calls: what it is called with, per window.
        exact: the module and the calls of the dense stream; None for no cross term.
        wanted: names below the module, e.g. "3.down_proj".
        least: tokens below which a layer leans on others; None for twice its in_features.
        weights: what the tokens of every window `[T]` count in the module's output; None for alike. In an expert's
            output they count by the square of what the router multiplies it with, too.

    Yields:
        Names of layers that share an input, its Hessian, and a note for their reports.
    """
    dense = list(exact[0]) if exact is not None else []
    everyone = _sampled(calls)
    shared: Hessian | None = None
    counts = None if weights is None else list(torch.cat(weights).split([len(call[0]) for call in calls]))
    for index, expert in enumerate(experts):
        own = [(call[1] == index).any(dim=-1).nonzero().squeeze(-1) for call in calls]
        seen = sum(map(len, own))
        streams = [(calls, expert)] + ([(exact[1], dense[index])] if exact is not None else [])
        for leaves, last in ((expert.ups, False), ((expert.down,), True)):
            names = [f"{index}.{leaf}" for leaf in leaves if f"{index}.{leaf}" in wanted]
            if not names:
                continue
            width = int(cast(nn.Linear, expert.get_submodule(leaves[0])).in_features)
            hessian, note = _hessian(streams, own, width, last, _routed(counts, calls, own, index)), ""
            if seen < (least or ENOUGH * width):
                if last or shared is None:
                    prior = _hessian(streams, everyone, width, last, _chosen(counts, everyone))
                    shared = shared if last else prior
                else:
                    prior = shared
                hessian.lean_on(prior, width)
                note = f"the router sent {seen} tokens here; leans on {prior.tokens} of all that entered the layer"
                del prior
            yield names, hessian, note
            del hessian  # gone before the next one is gathered


def _sampled(calls: list[Call]) -> list[Tensor]:
    """Tokens of every window at equal distances, about `SAMPLE` in all."""
    step = max(1, sum(len(call[0]) for call in calls) // SAMPLE)
    rows, before = [], 0
    for call in calls:
        rows.append(torch.arange(-before % step, len(call[0]), step, device=call[0].device))
        before += len(call[0])
    return rows


def _chosen(counts: list[Tensor] | None, rows: list[Tensor]) -> Tensor | None:
    """What the chosen tokens of all windows count, `[T]` with a mean of 1."""
    if counts is None:
        return None
    return _with_mean_1(torch.cat([count[r.to(count.device)] for count, r in zip(counts, rows, strict=True)]))


def _routed(counts: list[Tensor] | None, calls: list[Call], rows: list[Tensor], index: int) -> Tensor | None:
    """What the tokens sent to an expert count in its output."""
    if counts is None:
        return None
    shares = [((call[1] == index) * call[2]).sum(-1).float().square() for call in calls]
    return _chosen([count * share.to(count.device) for count, share in zip(counts, shares, strict=True)], rows)


def _with_mean_1(values: Tensor) -> Tensor | None:
    mean = total(values) / max(values.numel(), 1)
    return values / mean if mean > 0 else None


def _hessian(
    streams: list[tuple[list[Call], Expert]], rows: list[Tensor], width: int, last: bool, weights: Tensor | None
) -> Hessian:
    """Of an expert's first layers or of its last one, on the chosen tokens of each window."""
    hessian = Hessian(width, streams[0][0][0][0].device)
    gathered = [_gathered(calls, rows) for calls, _ in streams]
    if last:
        gathered = [_hidden(expert, batches) for (_, expert), batches in zip(streams, gathered, strict=True)]
    seen = 0
    for x, *dense in zip(*gathered, strict=True):
        counts = None if weights is None else weights[seen : seen + len(x)]
        hessian.add(x, dense[0] if dense else None, counts)
        seen += len(x)
    return hessian


def _hidden(expert: Expert, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """What enters an expert's last layer, `[T, K]` per batch, with the same bits for any number of threads."""
    for x in batches:
        parallel = x.device.type == "cpu"
        parts = in_order(torch.no_grad()(expert.hidden), x.split(_PART) if parallel else [x], parallel)
        yield torch.cat(list(parts))


def _gathered(calls: list[Call], rows: list[Tensor]) -> Iterator[Tensor]:
    """The chosen tokens of all windows `[T, K]`, in batches of about `ROWS`."""
    held: list[Tensor] = []
    for call, chosen in zip(calls, rows, strict=True):
        held.append(call[0][chosen.to(call[0].device)])
        if sum(map(len, held)) >= ROWS:
            yield torch.cat(held)
            held = []
    if sum(map(len, held)):
        yield torch.cat(held)
