"""Q-GaLore: Adam in a low-rank subspace of every matrix's gradient, its states in 8 bits, the projection in 4.

After Zhao et al. 2024 (GaLore) and Zhang et al. 2024 (Q-GaLore). For a matrix `[m, n]`, `m ≤ n`, with gradient `G`:

    P [m, r]: the first r left singular vectors of G, found anew every `gap` steps
    U = Adam(Pᵀ G)        first moment int8, second as uint8 roots, in blocks of 256, rounded by chance
    W -= rate · scale · P U

and for `m > n` the same on the transpose. A subspace that keeps still, by the mean cosine of its new vectors with the
old ones, over `patience` looks, is looked for `stretch` times less often. Bytes per matrix: `m r / 2` for P and `2 r n`
for Adam, plus 8 and 4 per block of 256. Everything that is not a matrix, or has a side of at most `rank`, gets plain
Adam in fp32. Chance depends on the parameter's place and step alone: all processes, and one that goes on after another,
round alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .blocks import BLOCK, Int4Blocks, Int8Blocks, Squares8, placed

_SEEDS = 1 << 20  # steps until a parameter draws what the next one drew at its first


class QGaLore(torch.optim.Optimizer):
    """The optimizer.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        rank: of the subspace.
        scale: of the step that comes back from it.
        betas, eps: Adam's.
        weight_decay: decoupled, as in AdamW.
        gap: steps between two looks for a subspace, at first.
        cosine: mean cosine from which on a subspace has kept still.
        stretch: what gap is multiplied by then.
        patience: looks in a row that must have found it still.

    Raises:
        ValueError: a value that cannot be.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, rank: int = 64, scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, gap: int = 200,
        cosine: float = 0.4, stretch: int = 2, patience: int = 5,
    ) -> None:  # fmt: skip
        for name, value in (("rank", rank), ("gap", gap), ("stretch", stretch), ("patience", patience)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        if not 0 <= lr < math.inf or not 0 < scale < math.inf:
            raise ValueError(f"lr={lr!r} must be at least 0 and scale={scale!r} positive, both finite")
        super().__init__(
            params,
            {
                "lr": lr, "rank": rank, "scale": scale, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                "gap": gap, "cosine": cosine, "stretch": stretch, "patience": patience,
            },
        )  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every = [(group, p) for group in self.param_groups for p in group["params"]]
        for number, (group, p) in enumerate(every):
            if p.grad is None:
                continue
            if group["weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            state = self.state[p]
            state["step"] = state.get("step", 0) + 1
            if p.dim() == 2 and min(p.shape) > group["rank"]:
                draw = torch.Generator().manual_seed(number * _SEEDS + state["step"])
                update = _subspace_step(p.grad.float(), state, group, draw)
            else:
                update = _plain_step(p.grad.float(), state, group)
            p.add_(update.to(p.dtype), alpha=-group["lr"])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of other optimizers, but for states: PyTorch would leave blocks on the device that they were read to, and
        round Adam's moments in fp32 to the parameter's dtype."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, own, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                self.state[p][key] = placed(value, p.device)

    def state_bytes(self) -> int:
        """What all states take now."""
        kept = (Int4Blocks, Int8Blocks, Squares8, Tensor)
        return sum(v.nbytes for state in self.state.values() for v in state.values() if isinstance(v, kept))


def planned_bytes(shape: Sequence[int], rank: int) -> int:
    """What `QGaLore` keeps for a parameter of a shape."""
    numel = math.prod(shape)
    if len(shape) != 2 or min(shape) <= rank:
        return 2 * 4 * numel
    blocks = -(-min(shape) * rank // BLOCK)
    low = rank * max(shape)
    return blocks * (BLOCK // 2 + 8) + 2 * (low + 4 * -(-low // BLOCK))


def _subspace_step(gradient: Tensor, state: dict[str, Any], group: dict[str, Any], draw: torch.Generator) -> Tensor:
    wide = gradient.shape[0] <= gradient.shape[1]
    g = gradient if wide else gradient.T
    if "projection" not in state or state["step"] >= state["next"]:
        _look(g, state, group)
    projection = state["projection"].dense()
    low = projection.T @ g
    first = state["first"].dense() if "first" in state else torch.zeros_like(low)
    second = state["second"].dense() if "second" in state else torch.zeros_like(low)
    direction, first, second = _adam(low, first, second, state["step"], group)
    state["first"], state["second"] = Int8Blocks.of(first, draw), Squares8.of(second, draw)
    update = projection @ direction * group["scale"]
    return update if wide else update.T


def _look(g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Find a subspace anew, and decide when to look again."""
    vectors = torch.linalg.svd(g, full_matrices=False)[0][:, : group["rank"]]
    if "projection" in state:
        old = state["projection"].dense()
        still = float((old * vectors).sum(0).abs().mean()) >= group["cosine"]
        state["still"] = state["still"] + 1 if still else 0
        if state["still"] >= group["patience"]:
            state["gap"] *= group["stretch"]
            state["still"] = 0
    else:
        state["gap"], state["still"] = group["gap"], 0
    state["projection"] = Int4Blocks.of(vectors)
    state["next"] = state["step"] + state["gap"]


def _plain_step(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    first = state.get("first", torch.zeros_like(gradient))
    second = state.get("second", torch.zeros_like(gradient))
    direction, state["first"], state["second"] = _adam(gradient, first, second, state["step"], group)
    return direction


def _adam(
    gradient: Tensor, first: Tensor, second: Tensor, step: int, group: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's direction and its new moments."""
    b1, b2 = group["betas"]
    first = first * b1 + gradient * (1 - b1)
    second = second * b2 + gradient.square() * (1 - b2)
    root = (second / (1 - b2**step)).sqrt() + group["eps"]
    return first / (1 - b1**step) / root, first, second
