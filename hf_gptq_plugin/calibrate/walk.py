"""Run a model block by block, and a block layer by layer, by structure and not by a list of names.

What each block is called with (masks, position embeddings, an encoder's output) differs from model to model and from
layer to layer, so it is recorded from the model's own forward pass, with the blocks themselves replaced by stubs that
hand their input on. Which blocks there are is found in chains.py.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from .sources import CalibrationError

LINEAR = (nn.Linear, Conv1D)


class WalkError(RuntimeError):
    """A model whose structure the walk does not understand; the message says which option helps."""


class _Recorded(Exception):
    """Ends a forward pass whose calls are all recorded."""


@dataclass
class Block:
    """One block of a chain.

    Args:
        name: its name in the model, e.g. "model.layers.3".
        module: the block.
        calls: one per calibration window: the block's arguments, without the hidden states.
        output: index of the hidden states in what the block returns; None where it returns them bare.
        repeated: its linear layers that run more than once in a pass, by name; `find_stages` fills it.
        added_to: of its linear layers whose output is added to something, by name, what that is: what enters this part
            of the block, or the block itself (""); `find_stages` fills it.
        is_twin: whether it is another's twin, see `twin`.
    """

    name: str
    module: nn.Module
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    output: int | None = None
    repeated: frozenset[str] = frozenset()
    added_to: dict[str, str] = field(default_factory=dict)
    is_twin: bool = False

    def full(self, local: str) -> str:
        """The name in the model of a module of the block."""
        return f"{self.name}.{local}" if self.name else local

    def run(self, hidden: Tensor, window: int) -> Tensor:
        """The block's hidden states `[1, tokens, width]` from those of the block before."""
        args, kwargs = self.calls[window]
        if "hidden_states" in kwargs:
            out = self.module(*args, **{**kwargs, "hidden_states": hidden})
        else:
            out = self.module(hidden, *args, **kwargs)
        return out if self.output is None else out[self.output]


class WholeModel(Block):
    """A model as its only block: its calls hold everything, and the hidden states it is handed pass it by."""

    @classmethod
    def reading(cls, model: nn.Module, windows: Iterable[Tensor]) -> WholeModel:
        """The model with what it is called with to read windows of token ids `[tokens]`."""
        return cls("", model, [((), text_inputs(model, ids)) for ids in windows])

    def run(self, hidden: Tensor, window: int) -> Tensor:
        """One forward pass of the model."""
        self.module(**self.calls[window][1])
        return hidden


@dataclass(frozen=True)
class Stub:
    """What stands in for a block while its chain is recorded.

    Args:
        output: see `Block`.
        rest: what the block returns behind the hidden states, without tensors; `Handed` where the model calls other
            blocks with them.
    """

    output: int | None = None
    rest: tuple[Any, ...] = ()

    @property
    def live(self) -> bool:
        """Whether the block must run so that others can be called."""
        return any(isinstance(item, Handed) and item.where is None for item in self.rest)


@dataclass(frozen=True)
class Handed:
    """What a block hands on to others behind its hidden states, e.g. T5's position bias.

    Args:
        where: position (behind the hidden states) or name among the block's arguments, if it has been handed it
            itself; None where it computes it.
    """

    where: int | str | None


@dataclass(frozen=True)
class Chain:
    """Blocks of which each takes the hidden states that the one before it returned.

    Args:
        name: of the list that holds them, e.g. "model.layers".
        blocks: by name, in the order in which they run. Not all of the list's need be among them.
        stubs: one per block; none where the blocks are no plain chain, so that the model runs as one piece.
    """

    name: str
    blocks: dict[str, nn.Module]
    stubs: tuple[Stub, ...] = ()


def linears(module: nn.Module) -> dict[str, Any]:
    """The layers below `module` that can be quantized, by name: `[N, K]` matrices of floats.

    Classes that return something else than the product (the routers of some mixtures of experts) are none.
    """
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, LINEAR)
        and getattr(layer, "weight", None) is not None
        and layer.weight.dim() == 2
        and _returns_product(layer)
    }


def linear_shape(layer: Any) -> tuple[int, int]:
    """in_features and out_features of a dense layer."""
    shape = layer.weight.shape
    return (shape[0], shape[1]) if isinstance(layer, Conv1D) else (shape[1], shape[0])


@torch.no_grad()
def _returns_product(layer: Any) -> bool:
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    from accelerate.utils import align_module_device

    in_features, out_features = linear_shape(layer)
    # An offloaded weight is on the meta device until it is needed.
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    device = layer.weight.device if device is None else device
    x = torch.linspace(-1.0, 1.0, in_features).to(device, layer.weight.dtype)[None]
    try:
        out = layer(x)
    except RuntimeError:  # e.g. groups of inputs
        return False
    if not isinstance(out, Tensor) or out.shape != (1, out_features):
        return False
    if out.device.type == "meta":  # a skeleton
        return True
    with align_module_device(layer):
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        product = nn.functional.linear(x, weight).float()
        product = product if layer.bias is None else product + layer.bias.float()
    largest = float(product.abs().max())
    if not math.isfinite(largest):
        return True  # whoever solves it says so, and names it
    return torch.allclose(out.float(), product, rtol=1e-2, atol=1e-2 * largest)


def text_inputs(model: Any, ids: Tensor) -> dict[str, Any]:
    """What a model is called with to read a window of text.

    An encoder-decoder model's encoder reads the window, and its decoder the same window moved right by one, behind
    its start token. This is what BART itself does with text that comes without a target.

    Args:
        model: a Transformers model.
        ids: `[tokens]`.
    """
    takes = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids[None].to(input_device(model))}
    if "use_cache" in takes:
        inputs["use_cache"] = False
    if "decoder_input_ids" in takes:
        known = [getattr(model.config, f"{kind}_token_id", None) for kind in ("decoder_start", "bos", "pad")]
        start = next((token for token in known if isinstance(token, int)), 0)
        inputs["decoder_input_ids"] = inputs["input_ids"].roll(1, 1)
        inputs["decoder_input_ids"][:, 0] = start
    return inputs


@torch.no_grad()
def record_calls(
    model: nn.Module, chain: Chain, windows: list[Tensor], finished: Sequence[tuple[Chain, Sequence[Tensor]]] = ()
) -> tuple[list[Block], list[Tensor]]:
    """Record what every block of a chain is called with, for every window.

    Args:
        model: a Transformers model.
        chain: one of `find_chains`.
        windows: token ids `[tokens]`.
        finished: the chains that run before this one, each with the hidden states that left it, per window. They do
            not run again: the last of their blocks hands these on.

    Returns:
        The blocks, and the hidden states that enter the first one, per window.
    """
    if not chain.stubs:
        return [WholeModel.reading(model, windows)], [torch.empty(0)] * len(windows)
    recorded = [
        Block(name, module, [], stub.output)
        for (name, module), stub in zip(chain.blocks.items(), chain.stubs, strict=True)
    ]
    entries: list[Tensor] = []
    with ExitStack() as stack:
        for done, hiddens in finished:
            leaving = iter(hiddens)
            for i, (module, stub) in enumerate(zip(done.blocks.values(), done.stubs, strict=True)):
                last = i == len(done.stubs) - 1
                stack.enter_context(forward_replaced(module, _replayed(stub, leaving if last else None)))
        for i, (block, stub) in enumerate(zip(recorded, chain.stubs, strict=True)):
            recorder = _recorder(block, stub, entries if i == 0 else None, last=i == len(recorded) - 1)
            stack.enter_context(forward_replaced(block.module, recorder))
        for ids in windows:
            with suppress(_Recorded), _window_fits(model, ids):
                model(**text_inputs(model, ids))
    for block in recorded:
        if len(block.calls) != len(windows):
            raise WalkError(
                f"{block.name} was called {len(block.calls)} times in {len(windows)} forward passes; blocks that run "
                "for some texts and not for others cannot be calibrated; exclude them with "
                'dynamic={"-:<regex>": {}}'
            )
    return recorded, entries


@contextmanager
def _window_fits(model: nn.Module, ids: Tensor) -> Iterator[None]:
    """Raises CalibrationError where the model fails on a window that is longer than its positions."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        config = getattr(model, "config", None)
        most = getattr(config, "max_position_embeddings", None)
        if isinstance(error, WalkError) or type(most) is not int or len(ids) <= most:
            raise
        raise CalibrationError(
            f"{type(model).__name__} has {most} positions, and a window of calibration text {len(ids)} tokens; set "
            f"seqlen to {most} at most"
        ) from error


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its token ids."""
    hook = getattr(model, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A block's arguments as its hidden states and the others, without caches: a block runs many times."""
    args, kwargs = without_caches(args, kwargs)
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"], args, {**kwargs, "hidden_states": None}
    return (args[0] if args else None), args[1:], kwargs


def without_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments for a pass that is not the only one: a cache would hold what earlier ones put there."""
    kept = tuple(None if isinstance(value, Cache) else value for value in args)
    return kept, {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}


def _recorder(block: Block, stub: Stub, entries: list[Tensor] | None, last: bool) -> Callable[..., Any]:
    own = block.module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden, others, named = split_call(args, kwargs)
        block.calls.append((others, named))
        if entries is not None:
            entries.append(hidden)
        if last:
            raise _Recorded
        if stub.output is None:
            return hidden
        computed: Any = ()
        if stub.live:
            # On zeros: `find_chains` has made sure that what others need of it does not depend on the text.
            nothing = torch.zeros_like(hidden)
            if "hidden_states" in named:
                computed = own(*others, **{**named, "hidden_states": nothing})[1:]
            else:
                computed = own(nothing, *others, **named)[1:]
        rest = list(stub.rest)
        for i, item in enumerate(rest):
            if isinstance(item, Handed):
                where = item.where
                rest[i] = computed[i] if where is None else others[where] if isinstance(where, int) else named[where]
        return (hidden, *rest)

    return forward


def _replayed(stub: Stub, leaving: Iterator[Tensor] | None) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = split_call(args, kwargs)[0]
        out = hidden if leaving is None else next(leaving).to(hidden.device)
        rest = (None if isinstance(item, Handed) else item for item in stub.rest)
        return out if stub.output is None else (out, *rest)

    return forward


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another function while the context lasts."""
    own = vars(module).get("forward")  # accelerate puts one there, too
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


@contextmanager
def rotary_by_length(model: nn.Module) -> Iterator[None]:
    """While the context lasts, rotary embeddings whose frequencies follow a text's length ("dynamic", "longrope") begin
    anew with every call. Left alone they write these into themselves, where passes in other threads read them, and
    "dynamic" keeps those of the longest text so far."""

    def anew(module: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            one = copy.copy(module)
            one._buffers = dict(module._buffers)
            return type(module).forward(one, *args, **kwargs)

        return forward

    with ExitStack() as stack:
        for module in model.modules():
            kinds = getattr(module, "rope_type", None)
            kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
            if any("dynamic" in str(kind) or kind == "longrope" for kind in kinds) and not hasattr(module, "_hf_hook"):
                stack.enter_context(forward_replaced(module, anew(module)))
        yield


@torch.no_grad()
def find_stages(block: Block, hidden: Tensor, targets: Iterable[str]) -> list[list[str]]:
    """The order in which a block's linear layers run; those that read the same tensors form one stage.

    Args:
        block: the block.
        hidden: hidden states of the first window.
        targets: names of its linear layers.

    Returns:
        Lists of names, in order of execution. Layers that were not called are missing; those that were called more
        than once stand where they ran first, and are noted in the block.
    """
    trace = _Trace(hidden)
    with trace.watching(block.module, targets):
        block.run(hidden, 0)
    stages: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for name, read in trace.inputs.items():
        stages.setdefault(tuple((id(x), version) for x, version in read), []).append(name)
    block.repeated = frozenset(name for name, read in trace.inputs.items() if len(read) > 1)
    once = [name for name in trace.inputs if name not in block.repeated]
    block.added_to = {name: part for name in once if (part := trace.added_to(name)) is not None}
    return list(stages.values())


class _Trace(TorchFunctionMode):
    """One pass through a block: what its layers read and return, what its parts are called with, and what is added to
    what. All is kept alive, so that identity means sameness.

    Args:
        hidden: what enters the block.
    """

    _SUMS = frozenset((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__))

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        # Values with what had been written into them by then.
        self.inputs: dict[str, list[tuple[Any, int]]] = {}  # of layers, at every run
        self._outputs: dict[str, tuple[Any, int]] = {}  # of their first runs
        self._entered = {"": _stamped(hidden)}  # the parts of the block that were called so far, first
        self._before: dict[str, dict[str, tuple[Any, int]]] = {}  # the same when a layer ran first
        self._sums: list[list[tuple[Any, int]]] = []

    @contextmanager
    def watching(self, module: nn.Module, layers: Iterable[str]) -> Iterator[None]:
        """While the context lasts, note what these layers of a block and its parts do."""
        with ExitStack() as stack:
            for name, part in module.named_children():
                stack.callback(part.register_forward_pre_hook(partial(self._enter, name)).remove)
            for name in layers:
                layer = module.get_submodule(name)
                stack.callback(layer.register_forward_pre_hook(partial(self._read, name)).remove)
                stack.callback(layer.register_forward_hook(partial(self._return, name)).remove)
            stack.enter_context(self)
            yield

    def added_to(self, layer: str) -> str | None:
        """What the layer's output is added to: what entered this part of the block before, or the block itself ("");
        None for nothing of that kind, for several, and for another layer's output, to which more is added."""
        out = self._outputs[layer]
        others = [pair[1 - side] for pair in self._sums for side in (0, 1) if _same(pair[side], out)]
        if len(others) != 1 or any(_same(others[0], other) for other in self._outputs.values()):
            return None
        return next((part for part, value in self._before[layer].items() if _same(value, others[0])), None)

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self._entered.setdefault(name, _stamped(args[0] if args else None))

    def _read(self, name: str, module: nn.Module, args: Any) -> None:
        self.inputs.setdefault(name, []).append(_stamped(args[0]))
        self._before.setdefault(name, dict(self._entered))

    def _return(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        self._outputs.setdefault(name, _stamped(out))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._SUMS and not kwargs and all(isinstance(value, Tensor) for value in args):
            if args[0].shape == args[1].shape:
                self._sums.append([_stamped(value) for value in args])
        return func(*args, **(kwargs or {}))


def _stamped(value: Any) -> tuple[Any, int]:
    """A value, and how often it was written into; -1 in inference mode, where nobody counts."""
    return value, value._version if isinstance(value, Tensor) and not value.is_inference() else -1


def _same(left: tuple[Any, int], right: tuple[Any, int]) -> bool:
    """Whether two are one, with nothing written into it between."""
    return left[0] is right[0] and left[1] == right[1] >= 0


def twin(block: Block) -> Block:
    """The block as it is now: layers that are replaced later stay in the twin. Weights are shared."""
    shared = {id(t): t for t in (*block.module.parameters(), *block.module.buffers())}
    return replace(block, module=copy.deepcopy(block.module, shared), is_twin=True)


def take_apart(block: Block) -> None:
    """Let go of a twin that has served: a module that holds a method of its own (our product, accelerate's hooks) is a
    cycle, which would keep the dense weights in memory until garbage is collected."""
    for module in block.module.modules():
        for name in ("forward", "_old_forward"):
            vars(module).pop(name, None)
