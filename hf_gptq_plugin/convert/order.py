"""From act-order to natural groups without a change of any weight, where the model lets channels change places.

A module's groups are natural when `g_idx[k] = k // group_size`: readers then need no gather, and layouts without g_idx
(AWQ, GGUF) can hold it. Two exact ways lead there:

- Groups that are contiguous but numbered otherwise get other numbers: scales and zeros change places.
- Input channels change places, if whatever computes them can deliver them in another order. Between the two halves of
  an MLP it can: `down(act(gate x) * (up x))` is the same for any order of the channels in between, as long as the rows
  of gate and up and the columns of down are in the same one. Between the value and the output projection of an
  attention layer it can within a head (all heads that share a value head in the same order).

Everything else reads the residual stream, whose order all blocks share; each module wants another one, so those stay in
act-order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..format.checkpoint import TensorInfo, check_values
from ..format.grid import QuantizedWeight, natural_groups
from ..format.spec import CheckpointError, QuantSpec
from .gguf_meta import head_width, number
from .source import Move, Source, load

_RESIDUAL = "inputs come from the residual stream, whose order all blocks share"
_HEADS = "groups take channels of several attention heads, and channels can change places within a head only"
_UNEQUAL = "groups have other sizes than group_size"


@dataclass(frozen=True)
class _Feed:
    """A module whose inputs are the outputs of others, channel by channel.

    Args:
        consumer: last part of its name.
        producers: names beside it; their last outputs are its inputs.
        copies: how many times over, as in a gate and up projection that are one module.
        heads: its inputs come from an attention layer, whose value projection the producer is.
        axis: see `Move`.
    """

    consumer: str
    producers: tuple[str, ...]
    copies: int = 1
    heads: bool = False
    axis: int = 0


_GATED = _Feed("down_proj", ("gate_proj", "up_proj"))
_LLAMA = (_GATED, _Feed("o_proj", ("v_proj",), heads=True))
# Where nothing stands between producer and consumer that mixes channels: activations and gates act on each alone.
FEEDS: dict[str, tuple[_Feed, ...]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "Qwen3MoeForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _LLAMA,
    "Gemma3ForCausalLM": _LLAMA,
    "MixtralForCausalLM": (_Feed("w2", ("w1", "w3")), _LLAMA[1]),
    "Phi3ForCausalLM": (
        _Feed("down_proj", ("gate_up_proj",), copies=2),
        _Feed("o_proj", ("qkv_proj",), heads=True),
    ),
    "OPTForCausalLM": (_Feed("fc2", ("fc1",)), _Feed("out_proj", ("v_proj",), heads=True)),
    "GPT2LMHeadModel": (
        _Feed("mlp.c_proj", ("c_fc",), axis=1),
        _Feed("attn.c_proj", ("c_attn",), heads=True, axis=1),
    ),
}


@dataclass(frozen=True)
class Reordering:
    """What `natural_order` found.

    Args:
        source: the checkpoint, its modules read in the new order.
        natural: modules in act-order that become natural.
        kept: those that stay, and why.
    """

    source: Source
    natural: list[str]
    kept: dict[str, str]


def natural_order(source: Source) -> Reordering:
    """Find how modules in act-order become natural. Reads their g_idx, and no weights.

    Adapters that were trained on the source do not fit modules whose channels have changed places.

    Raises:
        CheckpointError: an architecture of which it is not known what its modules feed, with a module that needs it.
    """
    moves: dict[str, Move] = {}
    natural: list[str] = []
    kept: dict[str, str] = {}
    for module, tensors in source.modules.items():
        leaf = next((name for name in ("g_idx", "weight_g_idx") if name in tensors), None)
        if leaf is None:
            continue
        group, spec = load(tensors[leaf], f"{module}.{leaf}"), source.specs[module]
        check_values(module, _scales(module, tensors), group)
        if torch.equal(group, natural_groups(group.numel(), spec.group_size).to(group.dtype)):
            continue
        if renumbered(group, spec) is not None:
            moves[module] = replace(moves.get(module, Move()))
            natural.append(module)
            continue
        feed = _feed(source, module)
        if feed is None:
            kept[module] = _RESIDUAL
            continue
        order = _within_heads(source.config, group) if feed.heads else _sorted(group, spec)
        if renumbered(group[order], spec) is None:
            kept[module] = _HEADS if feed.heads else _UNEQUAL
            continue
        rows = _value_rows(source.config, order) if feed.heads else order
        beside = module.rpartition(".")[0]
        for name in feed.producers:
            moves[f"{beside}.{name}"] = _with_rows(source, f"{beside}.{name}", rows, feed, moves)
        moves[module] = replace(moves.get(module, Move()), columns=order)
        natural.append(module)
    return Reordering(replace(source, moves=moves), natural, kept)


def moved(weight: QuantizedWeight, move: Move) -> QuantizedWeight:
    """The weight with its channels in other places, and its groups natural where they can be numbered so.

    Args:
        weight: `[N, K]`.
        move: which old output and input stands in each new place.
    """
    codes, scales, zeros, group = weight.codes, weight.scales, weight.zeros, weight.group
    if move.rows is not None:
        codes, scales, zeros = codes[move.rows], scales[:, move.rows], zeros[:, move.rows]
    if move.columns is not None:
        codes, group = codes[:, move.columns], group[move.columns]
    numbers = renumbered(group, weight.spec)
    if numbers is not None:
        scales, zeros = scales[numbers], zeros[numbers]
        group = natural_groups(group.numel(), weight.spec.group_size)
    return QuantizedWeight(codes, scales, zeros, group, weight.spec)


def renumbered(group: Tensor, spec: QuantSpec) -> Tensor | None:
    """For every natural group, the group that its inputs belong to now; None where they belong to several.

    Args:
        group: g_idx `[K]`.
        spec: of the module.

    Returns:
        int64 `[G]`, or None.
    """
    width = spec.width(group.numel())
    numbers = group[::width].long()
    return numbers if torch.equal(numbers.repeat_interleave(width)[: group.numel()], group.long()) else None


def _scales(module: str, tensors: Mapping[str, TensorInfo]) -> Tensor:
    """`[G, N]`."""
    if "scales" in tensors:
        return load(tensors["scales"], f"{module}.scales")
    return load(tensors["weight_scale"], f"{module}.weight_scale").T


def _sorted(group: Tensor, spec: QuantSpec) -> Tensor:
    """Inputs group by group, a group that is not full at the end."""
    sizes = torch.bincount(group.long())
    partial = (sizes != spec.width(group.numel()))[group.long()]
    return torch.argsort(partial.long() * sizes.numel() + group.long(), stable=True)


def _within_heads(config: Mapping[str, Any], group: Tensor) -> Tensor:
    """Inputs of an output projection in an order that makes groups contiguous if one does.

    Heads that share a value head share the order of its channels.
    """
    heads, shared, width = _attention(config, group.numel())
    # Channels by their groups in the first of the heads, then in the second, and so on.
    order = torch.arange(width).repeat(heads // shared, 1)
    keys = group.long().view(-1, shared, width)
    for head in reversed(range(shared)):
        order = order.gather(1, keys[:, head].gather(1, order).argsort(stable=True))
    places = torch.arange(heads).view(-1, shared, 1) * width + order[:, None]
    return places.flatten()


def _value_rows(config: Mapping[str, Any], order: Tensor) -> Tensor:
    """Order of the value projection's outputs for one of the output projection's inputs."""
    heads, shared, width = _attention(config, order.numel())
    within = order.view(-1, shared, width)[:, 0] % width
    return (torch.arange(heads // shared)[:, None] * width + within).flatten()


def _attention(config: Mapping[str, Any], channels: int) -> tuple[int, int, int]:
    """Attention heads, how many of them share a value head, and channels of each.

    Raises:
        CheckpointError: config.json says something that the weights do not bear out.
    """
    named = {**config, "num_attention_heads": config.get("num_attention_heads", config.get("n_head"))}
    named |= {"hidden_size": config.get("hidden_size", config.get("n_embd"))}
    heads = int(number(named, "num_attention_heads"))
    values = int(number(named, "num_key_value_heads", heads))
    width = head_width(named)
    if heads % values or heads * width != channels:
        raise CheckpointError(
            f"config.json: num_attention_heads={heads}, num_key_value_heads={values} and heads of {width} channels do "
            f"not fit an output projection of {channels} inputs"
        )
    return heads, heads // values, width


def _feed(source: Source, module: str) -> _Feed | None:
    """What computes a module's inputs.

    Raises:
        CheckpointError: the architecture is not known.
    """
    names = source.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in FEEDS:
        raise CheckpointError(
            f"{module} is in act-order, and which of the channels of {name or 'this model'} may change places is not "
            f"known; known are {', '.join(FEEDS)}"
        )
    found = (feed for feed in FEEDS[name] if f".{module}".endswith(f".{feed.consumer}"))
    return next(found, None)


def _with_rows(source: Source, name: str, rows: Tensor, feed: _Feed, moves: Mapping[str, Move]) -> Move:
    """A producer's outputs in the order of its consumer's inputs; those before the last `copies` times as many stay.

    Raises:
        CheckpointError: it is missing, or its outputs are not so many.
    """
    if name in source.modules:
        leaves = source.modules[name]
        outputs = leaves["weight_scale"].shape[0] if "weight_scale" in leaves else leaves["scales"].shape[-1]
    elif f"{name}.weight" in source.headers:
        outputs = source.headers[f"{name}.weight"].shape[feed.axis]
    else:
        raise CheckpointError(f"{name}.weight is missing from the checkpoint: fetch it again")
    first = outputs - feed.copies * rows.numel()
    if first < 0:
        raise CheckpointError(f"{name} has {outputs} outputs, and what reads them {rows.numel()} inputs")
    pieces = [torch.arange(first)] + [first + copy * rows.numel() + rows for copy in range(feed.copies)]
    return replace(moves.get(name, Move()), rows=torch.cat(pieces), axis=feed.axis)
