"""Find what to quantize in a model, and run it piece by piece, by structure and not by a list of names.

A model is a chain of blocks: the largest list of modules that holds linear layers. What each block is called with
(masks, position embeddings) differs from model to model and from layer to layer, so it is recorded from the model's
own forward pass, with the blocks themselves replaced by stubs that hand their input on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)


class WalkError(RuntimeError):
    """A model whose structure the walk does not understand; the message says which option helps."""


class _Stop(Exception):
    """Ends a forward pass once it has shown what it was run for."""


@dataclass
class Block:
    """One block of the chain.

    Args:
        name: its name in the model, e.g. "model.layers.3".
        module: the block.
        calls: one per calibration window: the block's arguments, without the hidden states.
        output: index of the hidden states in what the block returns; None where it returns them bare.
    """

    name: str
    module: nn.Module
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    output: int | None = None

    def run(self, hidden: Tensor, window: int) -> Tensor:
        """The block's hidden states `[1, tokens, width]` from those of the block before."""
        args, kwargs = self.calls[window]
        if "hidden_states" in kwargs:
            out = self.module(*args, **{**kwargs, "hidden_states": hidden})
        else:
            out = self.module(hidden, *args, **kwargs)
        return out if self.output is None else out[self.output]


def linears(module: nn.Module) -> dict[str, Any]:
    """The layers below `module` that can be quantized, by name: `[N, K]` matrices of floats."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, LINEAR) and getattr(layer, "weight", None) is not None and layer.weight.dim() == 2
    }


def find_blocks(model: nn.Module, name: str | None = None) -> tuple[str, nn.ModuleList]:
    """The list of blocks to quantize: `name`, or the one that holds the most weights in linear layers.

    Raises:
        WalkError: no such list, naming those there are.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if name is not None:
        if name not in lists:
            raise WalkError(
                f"block_name_to_quantize={name!r} is not a list of modules; this model has {', '.join(lists)}"
            )
        return name, lists[name]
    outermost = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists if other != n)}
    sizes = {n: sum(int(layer.weight.numel()) for layer in linears(m).values()) for n, m in outermost.items()}
    best = max(sizes, key=lambda n: sizes[n], default="")
    if not sizes.get(best):
        raise WalkError(
            f"{type(model).__name__} has no list of blocks with linear layers; name one with block_name_to_quantize"
        )
    return best, lists[best]


@torch.no_grad()
def record_calls(
    model: nn.Module, name: str, blocks: nn.ModuleList, windows: list[Tensor]
) -> tuple[list[Block], list[Tensor]]:
    """Record what every block is called with, for every window.

    Args:
        model: takes `input_ids` `[1, tokens]`.
        name: the list's name in the model.
        blocks: the list.
        windows: token ids `[tokens]`.

    Returns:
        The blocks, and the hidden states that enter the first one, per window.
    """
    recorded = [Block(f"{name}.{i}", module, []) for i, module in enumerate(blocks)]
    device = input_device(model)

    def forward(ids: Tensor) -> None:
        model(input_ids=ids[None].to(device), use_cache=False)

    rest = _record_outputs(recorded, lambda: forward(windows[0][:8]))
    entries: list[Tensor] = []
    with ExitStack() as stack:
        for i, block in enumerate(recorded):
            stack.enter_context(_stubbed(block, rest[i], entries if i == 0 else None))
        for ids in windows:
            forward(ids)
    for block in recorded:
        if len(block.calls) != len(windows):
            raise WalkError(
                f"{block.name} was called {len(block.calls)} times in {len(windows)} forward passes; blocks that the "
                "model skips or shares cannot be walked yet"
            )
    return recorded, entries


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its token ids."""
    hook = getattr(model, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def _record_outputs(blocks: list[Block], forward: Callable[[], None]) -> list[tuple[Any, ...]]:
    """Learn where each block's output holds the hidden states; returns what else stands behind them."""
    rest: list[tuple[Any, ...]] = [()] * len(blocks)
    seen: set[int] = set()

    def remember(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.add(i)
            if isinstance(output, tuple):
                blocks[i].output = 0
                rest[i] = output[1:]

        return hook

    handles = [block.module.register_forward_hook(remember(i)) for i, block in enumerate(blocks)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) != len(blocks):
        missing = next(block.name for i, block in enumerate(blocks) if i not in seen)
        raise WalkError(f"{missing} takes no part in the model's forward pass on text")
    return rest


@contextmanager
def _stubbed(block: Block, rest: tuple[Any, ...], entries: list[Tensor] | None) -> Iterator[None]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            hidden = kwargs["hidden_states"]
            kept = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            block.calls.append((args, {**kept, "hidden_states": None}))
        else:
            hidden = args[0]
            block.calls.append((args[1:], kwargs))
        if entries is not None:
            entries.append(hidden)
        return hidden if block.output is None else (hidden, *rest)

    with _forward_replaced(block.module, forward):
        yield


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")  # accelerate puts one there, too
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


@torch.no_grad()
def find_stages(block: Block, hidden: Tensor, targets: dict[str, nn.Module]) -> list[list[str]]:
    """The order in which a block's linear layers run; those that read the same tensor form one stage.

    Args:
        block: the block.
        hidden: hidden states of the first window.
        targets: its linear layers by name.

    Returns:
        Lists of names, in order of execution. Layers that were not called are missing.
    """
    stages: list[list[str]] = []
    inputs: list[Tensor] = []  # kept alive, so that identity means sameness

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if any(name in stage for stage in stages):
                return
            for stage, x in zip(stages, inputs, strict=True):
                if x is args[0]:
                    stage.append(name)
                    return
            stages.append([name])
            inputs.append(args[0])

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in targets.items()]
    try:
        block.run(hidden, 0)
    finally:
        for handle in handles:
            handle.remove()
    return stages


class Resumable:
    """A block whose forward pass goes on, at each call, from where the last one stopped.

    A submodule that has run to its end with all of its linear layers final is not run again: what it returned for a
    window is kept and handed out, and what its parts returned is dropped. So however often the pass is stopped to look
    at an input, every linear layer computes once.

    Args:
        block: the block; its forward must not depend on anything but its arguments.
        targets: names of the linear layers that will be looked at.
        final: names of those that will not change any more. Add to it as layers become final.
    """

    def __init__(self, block: Block, targets: Iterable[str], final: Iterable[str] = ()) -> None:
        self.block = block
        self.final = set(final)
        self._targets = tuple(targets)
        self._kept: list[dict[tuple[str, int], Any]] = [{} for _ in block.calls]

    def input_of(self, layer: str, hidden: Tensor, window: int) -> Tensor | None:
        """What enters `layer` for a window; None where the pass does not come to it."""
        try:
            self._run(hidden, window, layer)
        except _Stop as stop:
            return stop.args[0]
        return None

    def output(self, hidden: Tensor, window: int) -> Tensor:
        """The block's hidden states for a window; forgets what was kept for it."""
        out = self._run(hidden, window, None)
        self._kept[window].clear()
        return out

    @torch.no_grad()
    def _run(self, hidden: Tensor, window: int, until: str | None) -> Tensor:
        counts: dict[str, int] = {}
        with ExitStack() as stack:
            for name, module in self.block.module.named_modules():
                covered = [t for t in self._targets if t == name or t.startswith(f"{name}.")]
                if name and covered:
                    finished = self.final.issuperset(covered)
                    wrapper = self._wrapper(name, module.forward, finished, self._kept[window], counts, until)
                    stack.enter_context(_forward_replaced(module, wrapper))
            return self.block.run(hidden, window)

    @staticmethod
    def _wrapper(
        name: str, own: Callable[..., Any], finished: bool, kept: dict[tuple[str, int], Any],
        counts: dict[str, int], until: str | None,
    ) -> Callable[..., Any]:  # fmt: skip
        def forward(*args: Any, **kwargs: Any) -> Any:
            key = (name, counts.setdefault(name, 0))
            counts[name] += 1
            if key in kept:
                return _copied(kept[key])
            if name == until:
                raise _Stop(args[0])
            out = own(*args, **kwargs)
            if finished:
                for part in [k for k in kept if k[0].startswith(f"{name}.")]:
                    del kept[part]
                kept[key] = _copied(out)
            return out

        return forward


def _copied(value: Any) -> Any:
    """A copy of what a module returned: its caller may write into it."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        return type(value)(map(_copied, value))
    return value


def twin(block: Block) -> Block:
    """The block as it is now: layers that are replaced later stay in the twin. Weights are shared."""
    shared = {id(t): t for t in (*block.module.parameters(), *block.module.buffers())}
    return replace(block, module=copy.deepcopy(block.module, shared))
