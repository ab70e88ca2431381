"""Find what to quantize in a model: the lists of blocks that it runs when it reads text.

Nothing here goes by names. One forward pass on a few tokens shows which lists of modules take part (a vision tower
does not), in which order (an encoder before its decoder), and how the blocks hand hidden states on. A list whose
blocks do that in a plain chain is walked block by block; where any list of a model does not (blocks that run several
times, that alternate with others, or between which the model does something of its own), the model is walked as one
piece: right all the same, but with all of its layers in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .walk import LINEAR, Chain, Handed, Stub, WalkError, linears, record_calls, split_call, text_inputs

logger = logging.getLogger(__name__)

_PROBE = 8  # tokens


@dataclass
class _Visit:
    """One run of one block in the model's own forward pass."""

    list_name: str
    name: str
    module: nn.Module
    hidden: Any
    call: tuple[tuple[Any, ...], dict[str, Any]]
    out: Any = None
    taken: int = 0  # version of the hidden states that it took; in-place changes count it up
    given: int = 0  # and of those that it returned
    untouched: bool = False  # the block took what the visit before it had returned
    overwritten: bool = False  # the block wrote into the hidden states that it took

    @property
    def returned(self) -> Any:
        """The hidden states that the block returned."""
        return self.out[0] if isinstance(self.out, (tuple, list)) else self.out


@torch.no_grad()
def find_chains(model: nn.Module, ids: Tensor, name: str | None = None) -> list[Chain]:
    """The chains of blocks that a model runs when it reads text, in order of execution.

    Args:
        model: a Transformers model, in eval mode. Runs once, on the first few tokens.
        ids: token ids `[tokens]`.
        name: take only this list.

    Raises:
        WalkError: no such list, naming those there are; none that holds linear layers and takes part; or a model
            that does not run on token ids alone.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if name is not None and name not in lists:
        raise WalkError(f"block_name_to_quantize={name!r} is not a list of modules; this model has {', '.join(lists)}")
    places = {
        module: (list_name, f"{list_name}.{i}")
        for list_name, modules in lists.items()
        for i, module in enumerate(modules)
        if name in (None, list_name) and not isinstance(module, LINEAR) and linears(module) and _runs(module)
    }
    if not places:
        raise WalkError(
            f"{name or type(model).__name__} has no list of blocks with linear layers; nothing in it can be quantized"
        )
    visits = _visits(model, places, ids[:_PROBE])
    used = {visit.list_name for visit in visits}
    visits = [v for v in visits if not any(v.list_name.startswith(f"{other}.") for other in used)]
    if not visits:
        raise WalkError(
            f"{name or ', '.join(lists)} takes no part in the forward pass of {type(model).__name__} on text; "
            "only blocks that read text can be calibrated"
        )
    chains = _chains(visits)
    _warn_of_idle_blocks(chains, lists)
    problem = _problem(visits) or next(
        filter(None, (_difference(model, chain, visits, ids[:_PROBE]) for chain in chains)), None
    )
    if problem is None:
        return chains
    logger.warning(
        "%s is walked as one piece, since %s. It needs memory for the outputs of all of its blocks.",
        type(model).__name__, problem,
    )  # fmt: skip
    return [Chain(" and ".join(c.name for c in chains), {n: b for c in chains for n, b in c.blocks.items()})]


def _runs(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _visits(model: nn.Module, places: dict[nn.Module, tuple[str, str]], ids: Tensor) -> list[_Visit]:
    visits: list[_Visit] = []
    running: list[_Visit] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, others, named = split_call(args, kwargs)
        visit = _Visit(*places[module], module, hidden, (others, named), taken=_version(hidden))
        before = next((v for v in reversed(visits) if v.list_name == visit.list_name), None)
        if before is not None:
            touched = before.given != _version(before.returned)
            visit.untouched = not touched and (hidden is before.returned or _equal(hidden, before.returned))
        visits.append(visit)
        running.append(visit)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        visit = running.pop()
        visit.out = output
        visit.given = _version(visit.returned)
        visit.overwritten = visit.taken != _version(visit.hidden)

    handles = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in places]
    handles += [m.register_forward_hook(leave) for m in places]
    try:
        model(**text_inputs(model, ids))
    except Exception as error:
        raise WalkError(
            f"{type(model).__name__} does not run on token ids alone ({type(error).__name__}: {error}); only models "
            "that do can be calibrated: load the part that reads text with a class of its own"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return visits


def _chains(visits: list[_Visit]) -> list[Chain]:
    by_list: dict[str, list[_Visit]] = {}
    for visit in visits:
        by_list.setdefault(visit.list_name, []).append(visit)
    chains = []
    for list_name, own in by_list.items():
        fed = {id(x) for v in own for x in _tensors(v.call)}
        stubs = tuple(_stub(visit, fed) for visit in own)
        chains.append(Chain(list_name, {v.name: v.module for v in own}, stubs))
    return chains


def _stub(visit: _Visit, fed: set[int]) -> Stub:
    """A block's stub.

    Args:
        visit: a run of the block.
        fed: ids of the tensors that blocks of its chain are called with.
    """
    if not isinstance(visit.out, (tuple, list)):
        return Stub()
    args, kwargs = visit.call
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    own = {id(x): Handed(where) for where, x in places if isinstance(x, Tensor)}
    rest = []
    for item in visit.out[1:]:
        wanted = any(id(x) in fed for x in _tensors(item))
        holds = next(_tensors(item), None) is not None
        rest.append(own.get(id(item), Handed(None)) if wanted else None if holds else item)
    return Stub(0, tuple(rest))


def _problem(visits: list[_Visit]) -> str | None:
    """What keeps the lists from being plain chains, in words; None if nothing does."""
    seen: set[str] = set()
    current = ""
    for visit in visits:
        if visit.name in seen:
            return f"{visit.name} runs more than once"
        if visit.list_name != current and any(n.startswith(f"{visit.list_name}.") for n in seen):
            return f"the blocks of {visit.list_name} alternate with others"
        if not isinstance(visit.hidden, Tensor) or not isinstance(visit.returned, Tensor):
            return f"{visit.name} does not take and return hidden states in the usual places"
        if visit.overwritten:
            return f"{visit.name} writes into the hidden states that it takes"
        if visit.list_name == current and not visit.untouched:
            return f"the model changes the hidden states on their way to {visit.name}"
        seen.add(visit.name)
        current = visit.list_name
    return None


def _difference(model: nn.Module, chain: Chain, visits: list[_Visit], ids: Tensor) -> str | None:
    """What blocks are called with must not depend on what other blocks of the chain have computed from the text."""
    try:
        blocks, entries = record_calls(model, chain, [ids])
    except Exception as error:
        return f"its blocks do not come apart ({type(error).__name__}: {error})"
    own = [visit for visit in visits if visit.list_name == chain.name]
    if not _equal(entries[0], own[0].hidden):
        return f"{chain.name} is not fed alike in every forward pass"
    for block, visit in zip(blocks, own, strict=True):
        if not _equal(block.calls[0], visit.call):
            return f"{block.name} is called with what other blocks have computed"
    return None


def _equal(one: Any, other: Any) -> bool:
    """Whether two arguments are the same as far as tensors go.

    Mappings are taken for equal: blocks write into them what later ones read, in a walk as in the model's own pass.
    """
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return True


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _warn_of_idle_blocks(chains: list[Chain], lists: dict[str, nn.ModuleList]) -> None:
    for chain in chains:
        idle = [f"{chain.name}.{i}" for i in range(len(lists[chain.name])) if f"{chain.name}.{i}" not in chain.blocks]
        if idle:
            logger.warning("%s take no part in the forward pass on text and stay as they are.", ", ".join(idle))
