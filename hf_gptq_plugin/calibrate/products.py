"""What a model computes with while it is calibrated.

Tuning multiplies in bf16 where the hardware has instructions for it. Elsewhere torch's 16 bits are slow, above all
backward: there our own product, exact in 16 bits, takes the place of torch's, and attention is computed in fp32.
Forward, attention can be our own where that is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..solve.linalg import attends_faster, attention, dense_linear, multiplies_bf16
from .walk import Block, forward_replaced, linears, twin


def dense_twin(block: Block) -> Block:
    """A block's twin, whose layers multiply with our own product."""
    block = twin(block)
    for layer, forward in _products(block.module):
        layer.forward = forward  # type: ignore[assignment, method-assign]
    return block


@contextmanager
def own_products(model: nn.Module) -> Iterator[None]:
    """While the context lasts, a model's layers multiply with our own product, and take no gradient."""
    with ExitStack() as stack:
        for layer, forward in _products(model):
            stack.enter_context(forward_replaced(layer, forward))
        yield


def compute_dtype(like: Tensor) -> torch.dtype:
    """What matrices are multiplied in, for a model's hidden states: bf16 where the processor does so faster than fp32.
    Not beside fp16, which autocast to bf16 refuses to join with anything."""
    fast = like.device.type != "cpu" or multiplies_bf16()
    return torch.bfloat16 if fast and like.dtype != torch.float16 else torch.float32


@contextmanager
def computing(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """While the context lasts, in its thread, multiply matrices in a dtype; in fp32, attention is, too."""
    with (
        torch.autocast(device.type, dtype, cache_enabled=False)
        if dtype != torch.float32
        else Attending(_wide_attention)
    ):
        yield


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """PyTorch's function of this name; natively where nothing is masked but what comes later."""
    out = None
    plain = attn_mask is None and not dropout_p and (enable_gqa or query.shape[:-2] == key.shape[:-2])
    if plain and attends_faster(key.shape[-2]):
        out = attention(query, key, value, scale, is_causal)
    if out is None:
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return out


class Attending(TorchFunctionMode):
    """While the context lasts, in its thread, a function takes the place of PyTorch's `scaled_dot_product_attention`.

    Args:
        attend: takes what that takes.
    """

    def __init__(self, attend: Callable[..., Tensor] = scaled_dot_product_attention) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = func is nn.functional.scaled_dot_product_attention
        return (self._attend if own else func)(*args, **(kwargs or {}))


def _wide_attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention in fp32, rounded once. Backward, that takes a fifth of the time where the processor has no instructions
    for 16 bits."""

    def wide(value: Any) -> Any:
        narrow = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        return value.float() if narrow else value

    rest = {name: wide(value) for name, value in kwargs.items()}
    return nn.functional.scaled_dot_product_attention(wide(query), *map(wide, args), **rest).to(query.dtype)


def _products(module: nn.Module) -> Iterator[tuple[nn.Linear, Callable[[Tensor], Tensor]]]:
    for layer in linears(module).values():
        if type(layer) is nn.Linear and not hasattr(layer, "_hf_hook"):
            yield layer, _own_product(layer)


class _Product(torch.autograd.Function):
    """`x · weightᵀ`, differentiated by x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return dense_linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return dense_linear(gradients[0], ctx.weight.T), None


def _own_product(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        out = _Product.apply(x, layer.weight)
        return out if layer.bias is None else out + layer.bias

    return forward
