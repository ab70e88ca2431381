"""Experts made of separate layers do what the sum over chosen experts says."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_gptq_plugin.nn.experts import Expert, Experts


def gate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.tanh(first) * second


def make(count: int = 3, dtype: torch.dtype = torch.float64) -> Experts:
    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False, dtype=dtype)

    return Experts([Expert({"w1": linear(8, 5), "w3": linear(8, 5)}, ("w2", linear(5, 8)), gate) for _ in range(count)])


def test_every_token_gets_the_weighted_sum_of_its_experts() -> None:
    experts = make()
    x = torch.randn(7, 8, dtype=torch.float64)
    index = torch.tensor([[0, 1], [2, 1], [0, 3], [3, -1], [1, 0], [0, 2], [2, 0]])  # 3 and -1 stand for none
    weights = torch.rand(7, 2, dtype=torch.float64)
    out = experts(x, index, weights)
    state = experts.state_dict()
    assert sorted(state) == sorted(f"{e}.{w}.weight" for e in range(3) for w in ("w1", "w2", "w3"))
    for t in range(7):
        expected = torch.zeros(8, dtype=torch.float64)
        for choice in range(2):
            e = int(index[t, choice])
            if 0 <= e < 3:
                w1, w2, w3 = (state[f"{e}.{w}.weight"] for w in ("w1", "w2", "w3"))
                expected += weights[t, choice] * (w2 @ (torch.tanh(w1 @ x[t]) * (w3 @ x[t])))
        torch.testing.assert_close(out[t], expected, rtol=1e-12, atol=1e-12)


def test_one_matrix_before_the_activation() -> None:
    up, down = nn.Linear(8, 5, bias=False), nn.Linear(5, 8, bias=False)
    experts = Experts([Expert({"up_proj": up}, ("down_proj", down), torch.relu)])
    x = torch.randn(3, 8)
    out = experts(x, torch.zeros(3, 1, dtype=torch.int64), torch.full((3, 1), 0.5))
    torch.testing.assert_close(out, 0.5 * torch.relu(x @ up.weight.T) @ down.weight.T)


def test_weights_of_a_wider_type_are_summed_in_it() -> None:
    experts = make(2, torch.bfloat16)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    weights = torch.rand(4, 2)
    out = experts(x, torch.tensor([[0, 1]] * 4), weights)
    first, second = (expert(x).float() for expert in experts)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, (first * weights[:, :1] + second * weights[:, 1:]).bfloat16())


def test_gradients_reach_tokens_weights_and_layers() -> None:
    experts = make(2)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1], [1, 0], [1, 2], [0, 2]])
    assert torch.autograd.gradcheck(lambda a, b: experts(a, index, b), (x, weights))
    experts(x, index, weights).sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in experts.parameters())
