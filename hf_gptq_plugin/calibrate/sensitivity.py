"""How much a model's loss feels an error in what a layer returns: token by token, and output by output.

A layer's squared output error counts every token alike, and tokens do not count alike: some models carry hidden states
a thousand times the usual size at a few tokens, which fill a Hessian and which the next norm divides away. One backward
pass of the dense model says what a token is worth. With `g = ∂ loss / ∂ z` for a layer's output `z [T, N]`, the loss
grows by `½ Σ_t (g_t · δ_t)²` when the output moves by `δ` (Gauss-Newton; the loss's labels are drawn from what the
model itself predicts, so that its mean is the Fisher information). With the mean over a token's outputs in place of
every output's own, the layer's error becomes `Σ_t w_t |δ_t|²`, `w_t = mean_n g_tn²`, and its Hessian
`Σ_t w_t x_t x_tᵀ`. One draw of labels says little about a single token, and a handful of tokens can outweigh all
others, so weights are drawn towards each other: their square roots are used.

Nor do outputs count alike, nor one by one: errors in two of them that the next layer adds up are felt together. The
mean of `g gᵀ`, tokens weighted by the same roots, says which. It is what the error's outputs are multiplied with in the
Kronecker-factored Hessian of the loss by a weight, `H_out ⊗ H`. Outputs are taken some at a time, errors in different
parts as though they were felt apart, and the estimate is drawn half way towards the identity.

References: Kim et al. 2025 (GuidedQuant); Kim et al. 2024 (SqueezeLLM); Tseng et al. 2025 (YAQA).
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..solve.joint import part_rows
from ..solve.linalg import add_gram, total
from . import processes
from .generate import drawn
from .memory import give_back
from .offload import is_offloaded
from .products import computing, own_products
from .threads import in_order
from .walk import forward_replaced, linear_shape, linears, text_inputs, without_caches

logger = logging.getLogger(__name__)

# What a backward pass may keep of the forward pass, over all threads; beyond, blocks are computed twice.
_KEPT_BYTES = 4 << 30
_TRIM_EVERY = 4  # windows; of what a backward pass frees glibc keeps more each time, some 80 MB with SmolLM2-135M
_COPIES = 3  # numbers that are kept per token and channel of a linear layer's wider side, about

# What the outputs' Hessians are taken from: where all windows are run for their tokens, and where for this alone.
_OUTPUT_WINDOWS, _OUTPUT_WINDOWS_ALONE = 32, 4
_OUTPUT_BYTES = 1 << 30  # what they may take over all layers; of larger models fewer outputs are felt together
_FLIGHT_BYTES = 4 << 30  # the same for all windows that are worked on at a time
_PRIOR = 1.0  # how much of the identity is added to their mean, see `_OutputSums.metric`


@dataclass(frozen=True)
class Sensitivity:
    """What a model's loss feels, by layers' names. Of a layer that is missing, all counts alike.

    Args:
        tokens: what every token counts in the layer's error: fp32 `[tokens]` per window, with a mean of 1 over all
            windows of all processes. For layers of an experts module, that module's.
        outputs: how errors of its outputs are felt together: fp32 `[n, n]` for every part of them, see
            `joint.part_rows`, positive definite, with a mean of 1 on the diagonal of all.
    """

    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)


def sensitivity(
    model: Any, blocks: Iterable[nn.Module], windows: list[Tensor], names: set[str], outputs: set[str], seed: int
) -> Sensitivity:
    """What a model's loss feels of errors in what layers return.

    Args:
        model: a dense Transformers model in eval mode, whole in memory.
        blocks: its blocks, which may be computed twice to save memory.
        windows: token ids, int64 `[tokens]` each.
        names: the layers whose tokens are asked for; for layers of an experts module, that module's name. With none,
            fewer windows are run.
        outputs: the layers whose outputs are asked for.
        seed: of the labels that are drawn.

    Returns:
        Without layers that run several times per pass, or that the loss does not depend on; tokens only of those that
        see every one.
    """
    if is_offloaded(model):
        logger.info("%s is offloaded: everything counts alike.", type(model).__name__)
        return Sensitivity()
    tokens: dict[str, list[Tensor]] = {name: [] for name in sorted(names)}  # in one order in all processes
    most = _most_rows(model, outputs)
    sums = {name: _OutputSums(model.get_submodule(name), most) for name in sorted(outputs)}
    share = -(-(_OUTPUT_WINDOWS if names else _OUTPUT_WINDOWS_ALONE) // processes.count())
    if not names:
        windows = windows[:share]
    wide = sum(max(layer.weight.shape) for layer in linears(model).values())
    at_once = torch.get_num_threads() if model.device.type == "cpu" else 1
    if sums:
        at_once = max(1, min(at_once, _FLIGHT_BYTES // sum(sum_.bytes for sum_ in sums.values())))
    kept = _COPIES * 4 * wide * max(map(len, windows)) * min(at_once, len(windows))
    try:
        with (
            _watched(model, names | outputs, most, list(blocks) if kept > _KEPT_BYTES else []) as state,
            ExitStack() as stack,
        ):
            if _dtype(model) == torch.float32:
                stack.enter_context(own_products(model))
            work = partial(_felt, model, state, outputs, share, seed)
            each = in_order(work, enumerate(windows), model.device.type == "cpu", at_once)
            bar = stack.enter_context(processes.progress(len(windows), "Weighing errors", "window", leave=False))
            for number, window in enumerate(each):
                bar.update()
                for name, parts in tokens.items():
                    parts.append(window[name].roots if name in window else torch.empty(0))
                for name in sums.keys() & window.keys():
                    sums[name].add(window[name])
                del window
                if number % _TRIM_EVERY == 0:
                    give_back()
    except (RuntimeError, NotImplementedError) as error:  # an operation that has no derivative
        reason = str(error).partition("\n")[0]  # torch explains at length
        logger.warning("%s: no backward pass (%s); everything counts alike.", type(model).__name__, reason)
        return Sensitivity()
    return Sensitivity(
        {name: made for name, parts in tokens.items() if (made := _normalized(parts, windows)) is not None},
        {name: made for name, sum_ in sums.items() if (made := sum_.metric()) is not None},
    )


def _dtype(model: Any) -> torch.dtype:
    """What gradients are computed in. On a processor fp32, also where it multiplies bf16 faster: rounding the slopes on
    their way takes SmolLM2-135M (4 bit, `balanced`) from perplexity 20.27 to 20.37 and spares no time to speak of."""
    return torch.float32 if model.device.type == "cpu" else torch.bfloat16


def _normalized(parts: list[Tensor], windows: list[Tensor]) -> list[Tensor] | None:
    """Divided by the mean over all processes; None where any of them has nothing to go by."""
    complete = all(len(part) == len(window) for part, window in zip(parts, windows, strict=True))
    summed = math.fsum(map(total, parts)) if complete else math.nan
    sums = torch.tensor([summed, sum(map(len, parts))], dtype=torch.float64, device=processes.device())
    summed, tokens = processes.sum_in_place(sums).tolist()
    mean = summed / tokens if tokens else 0.0
    if not 0 < mean < torch.inf:
        return None
    return [part / mean for part in parts]


@dataclass
class _Felt:
    """What reached a layer's output backward: its root mean square `[tokens]`, and sums of products of outputs."""

    roots: Tensor
    grams: list[Tensor]  # empty where they are not asked for


def _most_rows(model: nn.Module, names: Iterable[str]) -> int:
    """How many outputs of these layers are felt together at most."""
    rows = sum(linear_shape(model.get_submodule(name))[1] for name in names)
    return max(1, _OUTPUT_BYTES // (4 * max(rows, 1)))


class _OutputSums:
    """Sums of products of a layer's outputs over windows, in parts of at most so many outputs."""

    def __init__(self, layer: Any, most: int) -> None:
        rows = linear_shape(layer)[1]
        size = part_rows(rows, most)
        widths = [min(size, rows - a) for a in range(0, rows, size)]
        self.parts = [torch.zeros(n, n, device=layer.weight.device) for n in widths]
        self.tokens = 0

    @property
    def bytes(self) -> int:
        """What they take."""
        return sum(part.nbytes for part in self.parts)

    def add(self, felt: _Felt) -> None:
        """Add a window."""
        for summed, gram in zip(self.parts, felt.grams, strict=False):
            summed += gram
        self.tokens += len(felt.roots) if felt.grams else 0

    def metric(self) -> list[Tensor] | None:
        """The mean over all processes, scaled to 1 and drawn towards the identity, the more the fewer tokens there are
        to so many outputs. None where nothing was felt."""
        for part in self.parts:
            processes.sum_in_place(part)
        tokens = processes.sum_of(self.tokens)
        rows = sum(map(len, self.parts))
        mean = math.fsum(total(part.diagonal()) for part in self.parts) / rows
        if not 0 < mean < torch.inf:
            return None
        prior = _PRIOR * (1 + rows / tokens)
        for part in self.parts:
            part /= mean * (1 + prior)
            part.diagonal().add_(prior / (1 + prior))
        return self.parts


class _Pass(threading.local):
    """One window's forward pass, in the thread that runs it."""

    found: dict[str, list[_Felt | None]] | None = None  # per layer and run; None while blocks are computed again
    outputs: frozenset[str] = frozenset()  # the layers whose outputs are asked for in this window


@contextmanager
def _watched(model: Any, names: set[str], most: int, twice: list[nn.Module]) -> Iterator[_Pass]:
    """While the context lasts, layers note what reaches their outputs backward, `most` outputs together, weights take
    no gradient, and some blocks keep nothing but their input."""
    state = _Pass()

    def watch(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            if not isinstance(out, Tensor):
                return None
            # Nothing before the first layers asks for a gradient. Not a leaf: the model may write into it.
            out = out if out.requires_grad else out.detach().requires_grad_().clone()
            if state.found is None:
                return out
            runs = state.found.setdefault(name, [])
            place = len(runs)
            runs.append(None)

            wanted = name in state.outputs

            def note(gradient: Tensor) -> None:
                rows = gradient.detach().float().flatten(0, -2)
                roots = rows.square().mean(-1).sqrt()
                runs[place] = _Felt(roots, _grams(rows, roots, most) if wanted else [])

            out.register_hook(note)
            return out

        return hook

    before = {p: p.requires_grad for p in model.parameters()}
    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in sorted(names)]

    def contexts() -> tuple[Any, Any]:
        """Of a block's two computations. Function modes are off within backward passes."""
        return nullcontext(), computing(_dtype(model), model.device)

    try:
        with ExitStack() as stack:
            for block in twice:
                stack.enter_context(forward_replaced(block, _twice(block.forward, contexts)))
            for parameter in before:
                parameter.requires_grad_(False)
            yield state
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def _twice(forward: Callable[..., Any], contexts: Callable[[], tuple[Any, Any]]) -> Callable[..., Any]:
    """A block's forward pass that keeps nothing but what enters it, and computes again what a backward pass needs."""

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = without_caches(args, kwargs)
        options: Any = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
        return checkpoint(forward, *args, **options, **kwargs)

    return run


def _grams(rows: Tensor, roots: Tensor, most: int) -> list[Tensor]:
    """`Σ_t g gᵀ / |g|` of gradients `g`, for every part of the outputs."""
    rows = rows / roots.clamp(min=torch.finfo(torch.float32).tiny).sqrt()[:, None]
    grams = []
    for part in rows.split(part_rows(rows.shape[1], most), 1):
        grams.append(rows.new_zeros(part.shape[1], part.shape[1]))
        add_gram(grams[-1], part)
    return grams


def _felt(
    model: Any, state: _Pass, outputs: set[str], share: int, seed: int, item: tuple[int, Tensor]
) -> dict[str, _Felt]:
    """What is felt of a window, by layer; none of layers that run several times."""
    window, ids = item
    # By the window's place among those of all processes, see `processes.share`.
    draw = torch.Generator().manual_seed(seed + window * processes.count() + processes.rank())
    state.outputs = frozenset(outputs if window < share else ())
    state.found = {}
    try:
        with torch.enable_grad(), computing(_dtype(model), model.device):
            out = model(**text_inputs(model, ids))
            found, state.found = state.found, None  # what is computed a second time is not noted again
            logits = getattr(out, "logits", None)
            end = logits if isinstance(logits, Tensor) else out[0]
            if end.requires_grad:
                end.backward(_slope(end.detach(), logits is end, draw))
    finally:
        state.found = None
    return {name: runs[0] for name, runs in found.items() if len(runs) == 1 and runs[0] is not None}


def _slope(end: Tensor, predicts: bool, draw: torch.Generator) -> Tensor:
    """The gradient of the loss by what the model returns.

    Args:
        end: logits, whose loss is the cross-entropy with labels drawn from them; else hidden states, whose loss is half
            their squared error: by ±1 at random, products of Jacobians come out right in the mean.
        predicts: whether they are logits.
        draw: of the labels or signs.
    """
    if not predicts:
        signs = torch.randint(2, end.shape, generator=draw) * 2 - 1
        return signs.to(end.device, end.dtype)
    probable = torch.softmax(end.float(), -1)
    labels = drawn(probable, draw)
    return probable.scatter_add_(-1, labels, torch.full_like(labels, -1.0, dtype=torch.float32)).to(end.dtype)
