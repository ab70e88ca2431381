"""How much a model's loss feels an error in what a layer returns, token by token.

A layer's squared output error counts every token alike, and tokens do not count alike: some models carry hidden states
a thousand times the usual size at a few tokens, which fill a Hessian and which the next norm divides away. One backward
pass of the dense model says what a token is worth. With `g = ∂ loss / ∂ z` for a layer's output `z [T, N]`, the loss
grows by `½ Σ_t (g_t · δ_t)²` when the output moves by `δ` (Gauss-Newton; the loss's labels are drawn from what the
model itself predicts, so that its mean is the Fisher information). With the mean over a token's outputs in place of
every output's own, the layer's error becomes `Σ_t w_t |δ_t|²`, `w_t = mean_n g_tn²`, and its Hessian
`Σ_t w_t x_t x_tᵀ`. One draw of labels says little about a single token, and a handful of tokens can outweigh all
others, so weights are drawn towards each other: their square roots are used.

References: Kim et al. 2025 (GuidedQuant); Kim et al. 2024 (SqueezeLLM).
"""

from __future__ import annotations

import ctypes
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..solve.linalg import total
from . import processes
from .products import own_products
from .threads import in_order
from .tune import compute_dtype, computing
from .walk import forward_replaced, linears, text_inputs

logger = logging.getLogger(__name__)

# What a backward pass may keep of the forward pass, over all threads; beyond, blocks are computed twice.
_KEPT_BYTES = 4 << 30
_TRIM_EVERY = 4  # windows
_COPIES = 3  # numbers that are kept per token and channel of a linear layer's wider side, about

Weights = dict[str, list[Tensor]]


def token_weights(
    model: Any, blocks: Iterable[nn.Module], windows: list[Tensor], names: set[str], seed: int
) -> Weights:
    """What every token counts in a layer's error.

    Args:
        model: a dense Transformers model in eval mode, whole in memory.
        blocks: its blocks, which may be computed twice to save memory.
        windows: token ids, int64 `[tokens]` each.
        names: the layers asked for; for layers of an experts module, that module's name.
        seed: of the labels that are drawn.

    Returns:
        By name, fp32 `[tokens]` per window, with a mean of 1 over all windows of all processes. Layers that do not see
        every token once per pass, or that the loss does not depend on, are missing.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        logger.info("%s is offloaded: all tokens count alike.", type(model).__name__)
        return {}
    found: Weights = {name: [] for name in sorted(names)}  # in one order in all processes
    wide = sum(max(layer.weight.shape) for layer in linears(model).values())
    at_once = torch.get_num_threads() if model.device.type == "cpu" else 1
    kept = _COPIES * 4 * wide * max(map(len, windows)) * min(at_once, len(windows))
    try:
        with _watched(model, names, list(blocks) if kept > _KEPT_BYTES else []) as state, ExitStack() as stack:
            if compute_dtype(model.device) == torch.float32:
                stack.enter_context(own_products(model))
            work = partial(_roots, model, state, seed)
            for number, window in enumerate(in_order(work, enumerate(windows), model.device.type == "cpu")):
                for name, parts in found.items():
                    parts.append(window.get(name, torch.empty(0)))
                if number % _TRIM_EVERY == 0:
                    _give_back()
    except (RuntimeError, NotImplementedError) as error:  # an operation that has no derivative
        logger.warning("%s: no backward pass (%s); all tokens count alike.", type(model).__name__, error)
        return {}
    return {name: made for name, parts in found.items() if (made := _normalized(parts, windows)) is not None}


def _give_back() -> None:
    """Return freed memory to the system. Of what a backward pass frees glibc keeps more each time: some 80 MB per
    window of SmolLM2-135M."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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


class _Pass(threading.local):
    """One window's forward pass, in the thread that runs it."""

    found: dict[str, list[Tensor | None]] | None = None  # per layer and run; None while blocks are computed again


@contextmanager
def _watched(model: nn.Module, names: set[str], twice: list[nn.Module]) -> Iterator[_Pass]:
    """While the context lasts, layers note what reaches their outputs backward, weights take no gradient, and some
    blocks keep nothing but their input."""
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

            def note(gradient: Tensor) -> None:
                runs[place] = gradient.detach().float().square().flatten(0, -2).mean(-1).sqrt()

            out.register_hook(note)
            return out

        return hook

    before = {p: p.requires_grad for p in model.parameters()}
    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in sorted(names)]
    try:
        with ExitStack() as stack:
            for block in twice:
                again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
                stack.enter_context(forward_replaced(block, again))
            for parameter in before:
                parameter.requires_grad_(False)
            yield state
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def _roots(model: Any, state: _Pass, seed: int, item: tuple[int, Tensor]) -> dict[str, Tensor]:
    """Root mean squared gradients `[tokens]` of a window, by layer; none of layers that run several times."""
    window, ids = item
    # By the window's place among those of all processes, see `processes.share`.
    draw = torch.Generator().manual_seed(seed + window * processes.count() + processes.rank())
    state.found = {}
    try:
        with torch.enable_grad(), computing(compute_dtype(model.device), model.device):
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
    uniform = torch.rand(*end.shape[:-1], 1, generator=draw).to(end.device)
    labels = torch.searchsorted(probable.cumsum(-1), uniform).clamp_(max=end.shape[-1] - 1)
    return probable.scatter_add_(-1, labels, torch.full_like(uniform, -1.0)).to(end.dtype)
