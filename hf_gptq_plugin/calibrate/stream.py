"""The calibration windows on their way through the blocks, and blocks whose pass can be stopped and gone on with."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .journal import Hiddens, read_tensor, write_tensor
from .products import Attending, scaled_dot_product_attention
from .threads import in_order
from .walk import Block, forward_replaced, take_apart

# What threads may make before it is used, as layers' inputs four times as wide as hidden states: where those stay in
# memory, and where they do not.
_MADE_BYTES, _MADE_BYTES_ON_DISK = 1 << 28, 1 << 26


class _Stop(Exception):
    """Ends a forward pass once it has shown what it was run for."""


@dataclass
class Seen:
    """What a pass was run for.

    Args:
        calls: positional arguments of the module that is looked at, at every run; none where the pass does not come to
            it.
        returned: what it returned, where that is asked for.
        beside: what entered an earlier part of the block, likewise.
    """

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    returned: Tensor | None = None
    beside: Tensor | None = None


class _Pass(threading.local):
    """One window's pass through a block, in the thread that runs it."""

    kept: dict[str, Any]  # what finished submodules returned
    counts: dict[str, int]  # runs of every submodule in this pass
    attended: dict[str, int]  # runs of attention in this pass, by the submodule that holds it
    seen: Seen
    inside: list[str]  # the submodules being run, from the outermost on
    open: bool  # whether a layer has run that is not final
    most: int  # bytes that what holds no layer may return and have kept


class Resumable:
    """A block whose forward pass goes on, at each call, from where the last one stopped.

    A submodule that has run to its end with all of its linear layers final is not run again: what it returned for a
    window is kept and handed out, and what its parts returned is dropped. So however often the pass is stopped to look
    at an input, every linear layer computes once, and so do attention (`scaled_dot_product_attention`) and, where what
    is kept stays in memory, submodules without any of these layers that return no more than the block (norms). Where
    modules run more than once, only their first run is kept: what enters the others changes with layers that are not
    final yet. What a module's caller writes into is not kept, either: it runs again.

    Args:
        block: the block; its forward must not depend on anything but its arguments.
        targets: names of the linear layers that will be looked at.
        final: names of those that will not change any more. Add to it as layers become final.
        folder: where what is kept goes; None to keep it in memory.
    """

    def __init__(
        self, block: Block, targets: Iterable[str], final: Iterable[str] = (), folder: Path | None = None
    ) -> None:
        self.block = block
        self.final = set(final)
        self._targets = tuple(targets)
        self._folder = folder
        self._kept: list[dict[str, Any]] = [{} for _ in block.calls]
        self._pass = _Pass()

    def seen(
        self, layer: str, hiddens: Iterable[Tensor], part: str | None = None, returned: bool = False
    ) -> Iterator[Seen]:
        """What a submodule is called with, window by window.

        Args:
            layer: the submodule.
            hiddens: what enters the block.
            part: an earlier part of the block ("" for itself), of which is noted what entered it.
            returned: whether the submodule, which runs once, is run to its end.
        """
        with self._watching(layer, part, returned):
            wide = 2 if returned else 4 + (part is not None)
            yield from self._each(partial(self._call, part=part), hiddens, wide)

    def outputs(self, hiddens: Iterable[Tensor], put: Callable[[int, Tensor], Any] | None = None) -> Iterator[Any]:
        """The block's hidden states, window by window, or what `put`, called with a window's number and them, makes of
        them in the thread that made them; forgets what was kept."""
        with self._watching(None):
            yield from self._each(partial(self._output, put=put), hiddens, 4)

    def _each(self, work: Callable[[tuple[int, Tensor]], Any], hiddens: Iterable[Tensor], wide: int) -> Iterator[Any]:
        remaining = iter(hiddens)
        if (first := next(remaining, None)) is None:
            return
        parallel = all(p.device.type == "cpu" for p in self.block.module.parameters())
        room = _MADE_BYTES if self._folder is None else _MADE_BYTES_ON_DISK
        together = room // (wide * first.nbytes) if first.nbytes else 1  # of a whole model nothing is known
        yield from in_order(work, enumerate(itertools.chain((first,), remaining)), parallel, together=together)

    @torch.no_grad()
    def _call(self, item: tuple[int, Tensor], part: str | None) -> Seen:
        window, hidden = item
        self._begin(window, hidden)
        self._pass.seen.beside = hidden if part == "" else None
        try:
            with Attending(self._attention):
                self.block.run(hidden, window)
        except _Stop:
            pass
        return self._pass.seen

    @torch.no_grad()
    def _output(self, item: tuple[int, Tensor], put: Callable[[int, Tensor], Any] | None) -> Any:
        window, hidden = item
        self._begin(window, hidden)
        with Attending(self._attention):
            out = self.block.run(hidden, window)
        self._kept[window].clear()
        return out if put is None else put(window, out)

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        """Attention, or what it returned before, where nothing but final layers stands before it: a pass that was
        stopped at the output projection comes by again on its way to what follows."""
        state = self._pass
        holder = state.inside[-1] if state.inside else ""
        run = state.attended[holder] = state.attended.get(holder, 0) + 1
        name = f"{holder}.attention {run}"  # gone with what its holder keeps of its parts
        if name in state.kept and _intact(state.kept[name]):
            return _fetched(state.kept[name])  # type: ignore[no-any-return]
        out = scaled_dot_product_attention(*args, **kwargs)
        # What holds no layer is never stopped in: it is kept itself, or runs in one piece.
        entered = not holder or bool(self.covered(holder))
        if entered and not state.open and state.counts.get(holder, 1) == 1:
            state.kept[name] = _stored(out, self._folder)
        return out

    def _begin(self, window: int, hidden: Tensor) -> None:
        self._pass.kept, self._pass.counts, self._pass.seen = self._kept[window], {}, Seen()
        self._pass.attended, self._pass.inside, self._pass.open, self._pass.most = {}, [], False, hidden.nbytes

    @contextmanager
    def _watching(self, until: str | None, part: str | None = None, behind: bool = False) -> Iterator[None]:
        """While the context lasts, submodules hand out what was kept, a pass stops before `until` or behind it, and
        what enters `part` is noted."""
        with ExitStack() as stack:
            for name, module in self._submodules(until):
                covered = self.covered(name)
                if covered or name in (until, part) or self._folder is None:
                    watched = None if name != until else behind
                    wrapper = self._wrapper(name, module.forward, covered, watched, name == part)
                    stack.enter_context(forward_replaced(module, wrapper))
            yield

    def covered(self, name: str) -> set[str]:
        """The layers that are looked at in a submodule, or it itself."""
        return {t for t in self._targets if t == name or t.startswith(f"{name}.")}

    def _submodules(self, until: str | None) -> Iterator[tuple[str, nn.Module]]:
        """All that are looked at or hold what is, and the outermost of the others."""
        holders = {""}
        for name in (*self._targets, until or ""):
            holders |= {name[: dot.start()] for dot in re.finditer(r"\.", name)}
        for name, module in self.block.module.named_modules():
            if name and name.rpartition(".")[0] in holders:
                yield name, module

    def _wrapper(
        self, name: str, own: Callable[..., Any], covered: set[str], behind: bool | None, noted: bool
    ) -> Callable[..., Any]:
        """What runs in a submodule's place; behind: None where the pass does not stop there."""
        state, finished = self._pass, self.final.issuperset(covered)

        def forward(*args: Any, **kwargs: Any) -> Any:
            kept = state.kept
            first = not state.counts.get(name)
            state.counts[name] = state.counts.get(name, 0) + 1
            if noted and first:
                state.seen.beside = args[0] if args else None
            if first and name in kept and _intact(kept[name]):
                return stop(_fetched(kept[name]))
            if behind is False:
                if name not in self.block.repeated:
                    state.seen.calls.append(args)
                    raise _Stop
                # The pass goes on, and may write into what entered.
                state.seen.calls.append(tuple(x.clone() if isinstance(x, Tensor) else x for x in args))
            opened = state.open
            state.open |= name in self._targets and not finished
            state.inside.append(name)
            out = own(*args, **kwargs)
            state.inside.pop()
            # What holds the layer that is looked at must be entered again for the next one, and what stands behind a
            # layer that will change computes something else then.
            small = self._folder is None and isinstance(out, Tensor) and out.nbytes <= state.most
            few = bool(covered) or small
            if finished and few and first and not opened and not state.seen.calls:
                for part in [k for k in kept if k.startswith(f"{name}.")]:
                    del kept[part]
                kept[name] = _stored(out, self._folder)
            return stop(out)

        def stop(out: Any) -> Any:
            if behind:
                state.seen.returned = out
                raise _Stop
            return out

        return forward


def entered(seen: Seen) -> Tensor | None:
    """What entered a module at every run in one pass; None where that did not come to it."""
    inputs = [args[0] for args in seen.calls]
    if len(inputs) < 2:
        return inputs[0] if inputs else None
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])


class _OnDisk:
    """A tensor in a file that goes away with it."""

    _numbers = itertools.count()

    def __init__(self, value: Tensor, folder: Path) -> None:
        self._path = folder / f"kept-{next(self._numbers)}.hidden"
        self._device = value.device
        write_tensor(self._path, value)

    def read(self) -> Tensor:
        return read_tensor(self._path).to(self._device)

    def __del__(self) -> None:
        self._path.unlink(missing_ok=True)


class _InMemory:
    """A tensor that others hold, too: of no use any more once one of them has written into it. In inference mode, where
    PyTorch does not count what is written, a copy of it."""

    def __init__(self, value: Tensor) -> None:
        self._counted = not value.is_inference()
        self._value = value if self._counted else value.clone()
        self._version = value._version if self._counted else 0

    @property
    def intact(self) -> bool:
        """Whether it is what it was."""
        return not self._counted or self._value._version == self._version

    def read(self) -> Tensor:
        return self._value if self._counted else self._value.clone()


def _stored(value: Any, folder: Path | None) -> Any:
    """What a module returned, kept."""
    if isinstance(value, Tensor):
        return _InMemory(value) if folder is None else _OnDisk(value, folder)
    if isinstance(value, (tuple, list)):
        return _like(value, [_stored(item, folder) for item in value])
    return value


def _intact(value: Any) -> bool:
    """Whether what was kept is still what the module returned: its caller may have written into it."""
    if isinstance(value, (tuple, list)):
        return all(map(_intact, value))
    return not isinstance(value, _InMemory) or value.intact


def _fetched(value: Any) -> Any:
    if isinstance(value, (_InMemory, _OnDisk)):
        return value.read()
    if isinstance(value, (tuple, list)):
        return _like(value, [_fetched(item) for item in value])
    return value


def _like(value: Any, items: list[Any]) -> Any:
    """A tuple, named tuple or list as `value`, of other items."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


class Stream:
    """The windows as one model, dense or quantized, carries them: the hidden states that enter its next block.

    Args:
        hiddens: what enters the first block, per window.
        name: of the stream's files; letters, digits and dashes.
        folder: where hidden states are written after every block; None for nowhere.
        in_memory: whether they (and what blocks keep) stay in memory, too.
        position: blocks that were left before.
    """

    def __init__(
        self, hiddens: Iterable[Tensor], name: str = "", folder: Path | None = None, in_memory: bool = True,
        position: int = 0,
    ) -> None:  # fmt: skip
        self._name = name
        self._folder = folder
        self._in_memory = in_memory or folder is None
        self._position = position
        self._block: Resumable | None = None
        self.hiddens: Hiddens = hiddens if isinstance(hiddens, Hiddens) else self._new(list(hiddens))

    def enter(self, block: Block, targets: Iterable[str], final: Iterable[str]) -> None:
        """Begin a block."""
        folder = None if self._in_memory else self._folder
        self._block = Resumable(block, targets, final, folder)

    def settle(self, names: Iterable[str]) -> None:
        """Say that these layers of the block, and those in these modules, will not change any more."""
        for name in names:
            self._entered.final.update(self._entered.covered(name))

    def seen(self, layer: str, part: str | None = None, returned: bool = False) -> Iterator[Seen]:
        """What a layer of the block is called with, window by window; see `Resumable.seen`."""
        return self._entered.seen(layer, self.hiddens, part, returned)

    def added_to(self, layer: str) -> str | None:
        """What the output of a layer of the block is added to, see `Block.added_to`."""
        return self._entered.block.added_to.get(layer)

    def runs_once(self, layer: str) -> bool:
        """Whether a layer of the block runs no more than once in a pass."""
        return layer not in self._entered.block.repeated

    def calls_of(self, module: str) -> tuple[Any, list[tuple[Any, ...]]]:
        """A module of the block, and the arguments with which it is called, window by window."""
        return self.submodule(module), [call for seen in self.seen(module) for call in seen.calls]

    def full(self, local: str) -> str:
        """The name in the model of a module of the block."""
        return self._entered.block.full(local)

    def submodule(self, name: str) -> Any:
        """A module of the block, as it is now."""
        return self._entered.block.module.get_submodule(name)

    def leave(self) -> None:
        """Finish the block, and let go of it if it is a twin. What entered it stays on disk, for a journal to drop."""
        self._position += 1
        left = self._new([], len(self.hiddens))
        for _ in self._entered.outputs(self.hiddens, left.put):
            pass
        self.hiddens = left
        if self._entered.block.is_twin:
            take_apart(self._entered.block)
        self._block = None

    @property
    def inside(self) -> bool:
        """Whether a block was entered and not left."""
        return self._block is not None

    @property
    def _entered(self) -> Resumable:
        if self._block is None:
            raise RuntimeError("the stream is in no block")
        return self._block

    def _new(self, values: list[Tensor], count: int = 0) -> Hiddens:
        return Hiddens(values, self._folder, f"{self._name}-{self._position}", self._in_memory, count)
