"""A mixture's experts with one linear layer per matrix, so that each is quantized, loaded and saved by its own name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One expert: `down(combine(up(x)))`, where `up` joins what several layers make of `x`.

    Args:
        ups: the layers that read the tokens, by name, in the order in which `combine` takes their outputs.
        down: name and layer of what writes the result.
        combine: from `[T, sum of the ups' N]` to `[T, down's K]`: the activation and the gate.
    """

    def __init__(
        self, ups: Mapping[str, nn.Module], down: tuple[str, nn.Module], combine: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.ups = tuple(ups)
        self.down = down[0]
        self.combine = combine
        for name, layer in (*ups.items(), down):
            self.add_module(name, layer)

    def hidden(self, x: Tensor) -> Tensor:
        """What enters the last layer for tokens `[T, K]`."""
        outputs = [self.get_submodule(name)(x) for name in self.ups]
        return self.combine(torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0])

    def forward(self, x: Tensor) -> Tensor:
        """`[T, N]` from tokens `[T, K]`."""
        return cast(Tensor, self.get_submodule(self.down)(self.hidden(x)))


class Experts(nn.Module):
    """The experts of one layer, called as Transformers calls its fused ones.

    Its children are named "0" to "E-1", as in a checkpoint.

    Args:
        experts: one per index.
    """

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__()
        self.num_experts = len(experts)
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)

    def __iter__(self) -> Iterator[Expert]:
        return cast(Iterator[Expert], iter(self.children()))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send every token to the experts chosen for it and add up what they return, weighted.

        A token's sum is taken over its choices in their order, so that it does not depend on the other tokens.

        Args:
            hidden_states: `[T, K]`.
            top_k_index: int `[T, choices]`; an index outside of `[0, E)` stands for no expert.
            top_k_weights: `[T, choices]`.
        """
        choices = top_k_index.shape[-1]
        chosen = top_k_index.reshape(-1)
        weights = top_k_weights.reshape(-1, 1)
        dtype = torch.promote_types(hidden_states.dtype, weights.dtype)
        out = hidden_states.new_zeros(chosen.shape[0], hidden_states.shape[-1], dtype=dtype)
        experts = list(self)
        for index in chosen.unique().tolist():
            if 0 <= index < self.num_experts:
                rows = (chosen == index).nonzero().squeeze(-1)
                out[rows] = (experts[index](hidden_states[rows // choices]) * weights[rows]).to(dtype)
        return out.view(-1, choices, out.shape[-1]).sum(dim=1).to(hidden_states.dtype)
