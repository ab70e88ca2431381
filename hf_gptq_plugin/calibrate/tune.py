"""Tune quantized layers by gradient descent on what they are for: a block's output, or the whole model's.

Two stages, after Chen et al. 2024 (EfficientQAT): block by block, scales and rounding learn to give the dense block's
output; then, over all blocks, scales and the blocks' vectors (norms' weights, biases) learn to give the dense model's
output.

Every window runs in one thread and gradients are added up in the order of the windows, so the result has the same
bits for any number of threads.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.linear import QuantLinear
from ..solve.hessian import SolveError
from ..solve.learn import LearnedVector, LearnedWeight, TuneSettings
from ..solve.linalg import all_finite
from . import processes
from .products import compute_dtype, computing, own_products
from .threads import in_order
from .walk import Block, Chain, forward_replaced, split_call, text_inputs

Loss = Callable[[Tensor, int], tuple[float, Tensor]]


class TunedLayer:
    """A quantized layer of a block while its weight learns.

    Args:
        layer: the layer.
        dense: its weight before it was quantized, see `LearnedWeight`.
    """

    def __init__(self, layer: QuantLinear, dense: Tensor | None) -> None:
        self.layer = layer
        self.learned = LearnedWeight(layer.quantized_weight(), dense)

    def finished(self) -> QuantLinear:
        """The layer that was learned."""
        made = QuantLinear.from_quantized(self.learned.finished(), self.layer.bias, self.layer.dtype)
        return made.train(self.layer.training)


@contextmanager
def tuned_vectors(blocks: Sequence[Block]) -> Iterator[list[dict[str, LearnedVector]]]:
    """The vectors of blocks by their names in them, for as long as they learn: every parameter with one dimension that
    is in memory and in one block only."""
    found = [
        {n: p for n, p in block.module.named_parameters() if p.dim() == 1 and p.is_floating_point() and not p.is_meta}
        for block in blocks
    ]
    users = Counter(id(p) for part in found for p in part.values())
    own = [{n: p for n, p in part.items() if users[id(p)] == 1} for part in found]
    before = {p: p.requires_grad for part in own for p in part.values()}
    try:
        for p in before:
            p.requires_grad_()
        yield [{n: LearnedVector(p) for n, p in part.items()} for part in own]
    finally:
        for p, flag in before.items():
            p.requires_grad_(flag)


def tune(
    blocks: Sequence[Block], layers: Sequence[Mapping[str, TunedLayer]],
    vectors: Sequence[Mapping[str, LearnedVector]], hiddens: Sequence[Tensor], loss: Loss, epochs: int,
    settings: TuneSettings, seed: int = 0, progress: Callable[[float], None] | None = None,
) -> None:  # fmt: skip
    """Let layers and vectors learn. Activations are kept at the borders of blocks; within all but the last, they are
    computed twice.

    Args:
        blocks: a chain.
        layers: per block, its layers by name. They are changed; those in the blocks are not.
        vectors: per block, its parameters by name. Those in the blocks are changed.
        hiddens: what enters the first block, per window.
        loss: of what leaves the last block for a window `[1, tokens, width]`: the value and its gradient.
        epochs: passes over the windows.
        settings: rates.
        seed: of the order of windows.
        progress: called after every step with the step's mean loss.

    Raises:
        SolveError: a gradient is not finite.
    """
    dtype = compute_dtype(hiddens[0])
    lift = _lift(hiddens[0])
    batch = min(settings.batch, len(hiddens))
    order = torch.Generator().manual_seed(seed)
    steps = settings.steps(len(hiddens), epochs)
    done = 0
    with _weights_handed_in(layers):
        for _ in range(epochs):
            for chosen in torch.randperm(len(hiddens), generator=order).split(batch):
                if len(chosen) < batch:
                    continue
                weights = [{name: t.learned.weight(dtype) for name, t in part.items()} for part in layers]
                parameters = [{name: v.parameter for name, v in part.items()} for part in vectors]
                value, gradients = _gradients(blocks, weights, parameters, hiddens, loss, chosen.tolist(), dtype, lift)
                # The first steps are small: Adam does not know the gradients' size yet.
                decay = min(1.0, (done + 1) / 4) * 0.5 * (1 + math.cos(math.pi * done / steps))
                for block, part, plain, found in zip(blocks, layers, vectors, gradients, strict=True):
                    for name, gradient in found.items():
                        mean = processes.sum_in_place(gradient).div_(batch * processes.count() * lift)
                        if not all_finite(mean):
                            raise SolveError(
                                f"{block.full(name)}: the gradient is not finite while it is tuned (NaN or infinity); "
                                "load the model in float32 or bfloat16, or set block_epochs=0 and model_epochs=0"
                            )
                        learned = plain[name] if name in plain else part[name].learned
                        learned.step(mean, settings, decay)
                done += 1
                if progress is not None:
                    progress(value / batch)


def _gradients(
    blocks: Sequence[Block], weights: list[dict[str, Tensor]], vectors: list[dict[str, Tensor]],
    hiddens: Sequence[Tensor], loss: Loss, windows: list[int], dtype: torch.dtype, lift: float = 1.0,
) -> tuple[float, list[dict[str, Tensor]]]:  # fmt: skip
    """The loss and its gradients by every weight and vector, summed over windows; these times `lift`."""

    entered: list[list[Tensor]] = []
    slopes: list[Tensor] = []
    value = 0.0

    def forward(window: int) -> tuple[list[Tensor], float, Tensor, dict[str, Tensor]]:
        hidden = [hiddens[window]]
        for block, handed in zip(blocks[:-1], weights[:-1], strict=True):
            with torch.no_grad(), _handing(handed), computing(dtype, hidden[-1].device):
                hidden.append(block.run(hidden[-1], window))
        last = _Graph(blocks[-1], weights[-1], vectors[-1], hidden.pop(), window, dtype)
        given, slope = loss(last.out.detach(), window)
        return hidden, given, *last.backward(slope * lift)

    total = _Sums()
    parallel = hiddens[windows[0]].device.type == "cpu"
    for hidden, given, slope, found in in_order(forward, windows, parallel):
        value += given
        entered.append(hidden)
        slopes.append(slope)
        total.add(found)
    sums = [total.of({**weights[-1], **vectors[-1]})]
    for block, handed, plain in reversed([*zip(blocks, weights, vectors, strict=True)][:-1]):

        def backward(
            place: int, block: Block = block, handed: dict[str, Tensor] = handed, plain: dict[str, Tensor] = plain
        ) -> tuple[Tensor, dict[str, Tensor]]:
            return _Graph(block, handed, plain, entered[place].pop(), windows[place], dtype).backward(slopes[place])

        total = _Sums()
        for place, (slope, found) in enumerate(in_order(backward, range(len(windows)), parallel)):
            slopes[place] = slope
            total.add(found)
        sums.append(total.of({**handed, **plain}))
    return value, sums[::-1]


def _lift(hidden: Tensor, size: int | None = None) -> float:
    """What gradients are multiplied with where they pass in fp16: losses are means, over so many numbers that most of
    their slopes are less than its least. A power of two; 1 for dtypes that hold any size.

    Args:
        hidden: what they are gradients by.
        size: how many numbers the mean is taken over; None for all of `hidden`.
    """
    return 2.0 ** round(math.log2(size or hidden.numel())) if hidden.dtype == torch.float16 else 1.0


class _Graph:
    """What a block gives for a window, and the way back.

    Args:
        block, entered, window: see `Block.run`.
        weights, vectors: the block's, by name.
        dtype: that of products.
    """

    def __init__(
        self, block: Block, weights: dict[str, Tensor], vectors: dict[str, Tensor], entered: Tensor, window: int,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        self._x = entered.detach().requires_grad_()
        with torch.enable_grad(), _handing(leaves), computing(dtype, entered.device):
            self.out = block.run(self._x, window)
        self._leaves = leaves | vectors

    def backward(self, slope: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """From the gradient by what the block gives those by what enters it, and by its weights and vectors, of those
        that it used. The graph is gone afterwards."""
        slope_in, *found = torch.autograd.grad(
            self.out, [self._x, *self._leaves.values()], slope.to(self.out.dtype), allow_unused=True
        )
        return slope_in, {name: g for name, g in zip(self._leaves, found, strict=True) if g is not None}


class _Sums:
    """Sums of gradients, by name."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, gradients: dict[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            self._sums[name] = self._sums[name].add_(gradient) if name in self._sums else gradient.float()

    def of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those by tensors, in one order in all processes; zeros where no window came to an expert, and the like."""
        zeros = {n: torch.zeros_like(t, dtype=torch.float32) for n, t in tensors.items() if n not in self._sums}
        return dict(sorted((self._sums | zeros).items()))


_handed = threading.local()


@contextmanager
def _handing(weights: Mapping[str, Tensor]) -> Iterator[None]:
    _handed.weights = weights
    try:
        yield
    finally:
        del _handed.weights


@contextmanager
def _weights_handed_in(layers: Iterable[Mapping[str, TunedLayer]]) -> Iterator[None]:
    """Let the blocks' layers compute with the weights that their thread was handed."""

    def forward_of(name: str, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            weight = _handed.weights[name]
            out = nn.functional.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
            return out.to(x.dtype)

        return forward

    with ExitStack() as stack:
        for part in layers:
            for name, tuned in part.items():
                stack.enter_context(forward_replaced(tuned.layer, forward_of(name, tuned.layer.bias)))
        yield


def output_loss(target: Callable[[int], Tensor]) -> Loss:
    """Squared error of hidden states, relative to the mean square of the target's window.

    Args:
        target: what the dense block gave for a window, `[1, tokens, width]`.
    """

    def loss(hidden: Tensor, window: int) -> tuple[float, Tensor]:
        wanted = target(window).float()
        difference = hidden.float() - wanted
        size = float(wanted.square().mean()) + 1e-30
        value = float(difference.square().mean()) / size
        return value, difference * (2 / (size * difference.numel()))

    return loss


def divergence(student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    """Mean `KL(teacher | student)` per token, and its gradient by the student's logits.

    Args:
        student, teacher: logits `[..., vocabulary]`.
    """
    log_student = torch.log_softmax(student.float(), -1)
    log_teacher = torch.log_softmax(teacher.float(), -1)
    tokens = student.numel() // student.shape[-1]
    probable = log_teacher.exp()
    value = float((probable * (log_teacher - log_student)).sum()) / tokens
    return value, (log_student.exp_() - probable) / tokens


@contextmanager
def model_loss(
    model: nn.Module, chain: Chain, blocks: Sequence[Block], windows: Sequence[Tensor], target: Sequence[Tensor]
) -> Iterator[Loss]:
    """The loss of the hidden states that leave a model's last chain: `divergence` of the logits that the model makes
    of them, or, where it makes none, `output_loss`.

    While the context lasts, the model's blocks can still be run by themselves.

    Args:
        model: a Transformers model.
        chain: its last chain.
        blocks: the chain's.
        windows: token ids `[tokens]`.
        target: what left the last block of the dense model, per window.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        yield output_loss(lambda window: target[window])
        return
    replayed = threading.local()

    def stub(own: Callable[..., Any], place: int) -> Callable[..., Any]:
        output, rest = chain.stubs[place].output, chain.stubs[place].rest

        def forward(*args: Any, **kwargs: Any) -> Any:
            leaving = getattr(replayed, "hidden", None)
            if leaving is None:
                return own(*args, **kwargs)
            out = leaving if place == len(blocks) - 1 else split_call(args, kwargs)[0]
            return out if output is None else (out, *rest)

        return forward

    def logits(hidden: Tensor, window: int) -> Tensor:
        replayed.hidden = hidden
        try:
            with computing(compute_dtype(hidden), hidden.device):
                return model(**text_inputs(model, windows[window])).logits
        finally:
            del replayed.hidden

    def loss(hidden: Tensor, window: int) -> tuple[float, Tensor]:
        with torch.no_grad():
            wanted = logits(target[window], window)
        with torch.enable_grad():
            entered = hidden.detach().requires_grad_()
            given = logits(entered, window)
        value, slope = divergence(given.detach(), wanted)
        lift = _lift(given, len(windows[window]))
        return value, torch.autograd.grad(given, entered, (slope * lift).to(given.dtype))[0].float() / lift

    with ExitStack() as stack:
        if compute_dtype(target[0]) == torch.float32:
            stack.enter_context(own_products(model))
        for place, block in enumerate(blocks):
            stack.enter_context(forward_replaced(block.module, stub(block.module.forward, place)))
        yield loss
