"""The op `hf_gptq::moe`: the quantized experts of a mixture, chosen, run and added up inside one call.

How many tokens an expert gets is known only when the op runs, so all of it lies inside: a traced graph sees one
call whose shape is that of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import WEIGHT_TENSORS, KernelWeight, check_weight, linear

_ARGUMENTS = (
    "Tensor {0}_qweight, Tensor {0}_scales, Tensor? {0}_qzeros, Tensor? {0}_g_idx, Tensor? {0}_perm, "
    "int {0}_bits, int {0}_group_size, int {0}_zero_offset"
)
_LIBRARY = torch.library.Library("hf_gptq", "FRAGMENT")
_LIBRARY.define(
    "moe(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, str activation, bool gated, "
    f"{_ARGUMENTS.format('up')}, {_ARGUMENTS.format('down')}) -> Tensor"
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


def stack(weights: Sequence[KernelWeight]) -> KernelWeight:
    """One `KernelWeight` whose tensors hold those of all experts along a new first dimension.

    Args:
        weights: one per expert; alike in bits, group size, zero offset, shapes, and in which tensors are None.

    Raises:
        ValueError: weights that are not alike.
    """
    first = weights[0]
    numbers = first.arguments[len(WEIGHT_TENSORS) :]
    stacked: dict[str, Any] = {}
    for name in WEIGHT_TENSORS:
        tensors = [getattr(weight, name) for weight in weights]
        absent = [tensor is None for tensor in tensors]
        if any(weight.arguments[len(WEIGHT_TENSORS) :] != numbers for weight in weights) or len(set(absent)) > 1:
            raise ValueError(f"the experts' weights are not alike ({name}); stack only weights of one description")
        stacked[name] = None if absent[0] else torch.stack(tensors)
    return replace(first, **stacked)


def moe(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    up: KernelWeight,
    down: KernelWeight,
    activation: str = "silu",
    gated: bool = True,
    expert_map: Tensor | None = None,
) -> Tensor:
    """Send every token through the experts chosen for it and add up what they return, weighted; no gradient.

    Args:
        x: tokens in fp32, bf16 or fp16, `[T, K]`.
        topk_weights: `[T, choices]`, float.
        topk_ids: int `[T, choices]`; an id outside of `[0, E)` stands for no expert.
        up: stacked weights `[E, N, K]`; where gated, `N = 2 * H`, the gate's outputs first.
        down: stacked weights `[E, K', H]`.
        activation: a name of `ACTIVATIONS`.
        gated: the activation is taken of the first half and multiplied with the second.
        expert_map: int `[ids]`, from the ids of `topk_ids` to rows of `up` and `down`, -1 for none; or None.

    Returns:
        `[T, K']` in x's dtype. A token's sum is taken over its choices in their order; on the CPU kernel its bits
        depend on that token alone.

    Raises:
        ValueError: shapes that do not belong together.
    """
    hidden = up.scales.shape[-1] // (2 if gated else 1)
    for what, features, weight in (("x", x.shape[-1], up), ("what up returns", hidden, down)):
        if weight.in_features and features != weight.in_features:
            raise ValueError(f"{what} has {features} features; the next weights have in_features={weight.in_features}")
    return torch.ops.hf_gptq.moe(
        x, topk_weights, topk_ids, expert_map, activation, gated, *up.arguments, *down.arguments
    )


def _moe(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None, activation: str, gated: bool,
    *weights: Any,
) -> Tensor:  # fmt: skip
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not supported; use one of {', '.join(ACTIVATIONS)}")
    if topk_ids.shape != topk_weights.shape or topk_ids.dim() != 2 or len(topk_ids) != len(x):
        raise ValueError(
            f"topk_ids {tuple(topk_ids.shape)} and topk_weights {tuple(topk_weights.shape)} must both be [T, choices] "
            f"for x {tuple(x.shape)}"
        )
    count = len(weights) // 2
    experts = [_Expert(weights[:count], weights[count:], index, activation, gated) for index in range(len(weights[0]))]
    ids = topk_ids
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.numel())
        ids = torch.where(known, expert_map[torch.where(known, ids, 0).long()].to(ids.dtype), -1)
    dtype = torch.promote_types(x.dtype, topk_weights.dtype)
    out = x.new_zeros(*ids.shape, experts[0].out_features, dtype=dtype)
    fill = _fill_everywhere if x.is_cuda and torch.cuda.is_current_stream_capturing() else _fill_chosen
    fill(out, x, topk_weights, ids, experts)
    return out.sum(dim=1).to(x.dtype)


class _Expert:
    """One expert of stacked weights: `[T, K]` to `[T, K']`."""

    def __init__(self, up: Sequence[Any], down: Sequence[Any], index: int, activation: str, gated: bool) -> None:
        self._weights = up, down
        self._index = index
        self._activation = ACTIVATIONS[activation]
        self._gated = gated
        self.out_features = down[1].shape[-1]

    def __call__(self, x: Tensor) -> Tensor:
        up, down = (self._weight(weight) for weight in self._weights)
        hidden = linear(x, up)
        if self._gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = self._activation(gate) * value
        else:
            hidden = self._activation(hidden)
        return linear(hidden, down)

    def _weight(self, stacked: Sequence[Any]) -> KernelWeight:
        tensors = (None if t is None else t[self._index] for t in stacked[: len(WEIGHT_TENSORS)])
        arguments: list[Any] = [*tensors, *stacked[len(WEIGHT_TENSORS) :]]
        return KernelWeight(*arguments)


def _fill_chosen(out: Tensor, x: Tensor, topk_weights: Tensor, ids: Tensor, experts: Sequence[_Expert]) -> None:
    """Run each expert that was chosen on its own tokens; asks the device which those are."""
    choices = ids.shape[1]
    chosen, weights, rows_out = ids.reshape(-1), topk_weights.reshape(-1, 1), out.view(-1, out.shape[-1])
    for index in chosen.unique().tolist():
        if 0 <= index < len(experts):
            rows = (chosen == index).nonzero().squeeze(-1)
            rows_out[rows] = (experts[index](x[rows // choices]) * weights[rows]).to(out.dtype)


def _fill_everywhere(out: Tensor, x: Tensor, topk_weights: Tensor, ids: Tensor, experts: Sequence[_Expert]) -> None:
    """Run every expert on every token and keep what was asked for: no sizes that depend on values, so that a CUDA
    graph can be captured; reads all weights."""
    for index, expert in enumerate(experts):
        said = (expert(x).unsqueeze(1) * topk_weights.unsqueeze(-1)).to(out.dtype)
        out.copy_(torch.where((ids == index).unsqueeze(-1), said, out))


def _moe_fake(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None, activation: str, gated: bool,
    *weights: Any,
) -> Tensor:  # fmt: skip
    count = len(weights) // 2
    for weight in (weights[:count], weights[count:]):
        check_weight(x, weight)
    return x.new_empty((*x.shape[:-1], weights[count + 1].shape[-1]))


_LIBRARY.impl("moe", _moe, "CompositeExplicitAutograd")
torch.library.register_fake("hf_gptq::moe", _moe_fake, lib=_LIBRARY)
