"""The Hessian of a layer's squared output error, and the factor of its inverse that the solver walks along."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .linalg import add_gram, inverse_factor, total

DAMP_LIMIT = 10.0  # times the mean of the diagonal; beyond it the damping would drown the data


class SolveError(RuntimeError):
    """A layer that cannot be solved with the calibration data at hand."""


class Hessian:
    """Running `H = (1/T) Σ x xᵀ` over `T` tokens, and `C = (1/T) Σ x (x* - x)ᵀ` where `x*` is what `x` would be had no
    layer before been quantized.

    Args:
        in_features: `K`.
        device: where the fp32 matrix `[K, K]` is kept.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._cross: Tensor | None = None
        self.tokens = 0
        self._borrowed = 0

    def add(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Add inputs.

        Args:
            x: `[..., K]`.
            exact: `x*`, `[..., K]`; at every call or at none.
        """
        rows = self._rows(x)
        add_gram(self._sum, rows)
        if exact is not None:
            if self._cross is None:
                self._cross = torch.zeros_like(self._sum)
            add_gram(self._cross, rows, self._rows(exact) - rows)
        self.tokens += rows.shape[0]

    def lean_on(self, prior: Hessian, tokens: int) -> None:
        """Take in another's means with the weight of this many tokens; `tokens` still counts what was added."""
        self._sum += prior._sum * (tokens / prior.tokens)
        if prior._cross is not None:
            mine = torch.zeros_like(self._sum) if self._cross is None else self._cross
            self._cross = mine + prior._cross * (tokens / prior.tokens)
        self._borrowed += tokens

    def combine(self, sum_in_place: Callable[[Tensor], Tensor], sum_of: Callable[[int], int]) -> None:
        """Add up with what others have seen.

        Args:
            sum_in_place: turns a tensor into the sum over all.
            sum_of: the sum over all of an integer.
        """
        sum_in_place(self._sum)
        if self._cross is not None:
            sum_in_place(self._cross)
        self.tokens, self._borrowed = sum_of(self.tokens), sum_of(self._borrowed)

    def _rows(self, x: Tensor) -> Tensor:
        return x.detach().reshape(-1, x.shape[-1]).to(self._sum.device, torch.float32)

    def mean(self) -> Tensor:
        """fp32 `[K, K]`.

        Raises:
            SolveError: no token was seen, or the inputs were not finite.
        """
        weight = self.tokens + self._borrowed
        if weight == 0:
            raise SolveError("no calibration token reached this layer; use more or other calibration text")
        if not bool(torch.isfinite(self._sum).all()):
            raise SolveError(
                "the layer's inputs are not finite on the calibration text (NaN or infinity); load the model in "
                "float32 or bfloat16, and check its weights"
            )
        return self._sum / weight

    def mean_cross(self) -> Tensor | None:
        """`C`, fp32 `[K, K]`; None where no exact inputs were given."""
        return None if self._cross is None else self._cross / (self.tokens + self._borrowed)


@dataclass(frozen=True)
class Factor:
    """The upper Cholesky factor of the inverse of a damped Hessian.

    Args:
        upper: fp32 `[K, K]`, `inverse(H + damping) = upperᵀ · upper`, in solve order.
        damped: fp32 `[K, K]`, the damped Hessian itself, in solve order.
        damp_percent: the damping used, as a fraction of the diagonal's mean.
    """

    upper: Tensor
    damped: Tensor
    damp_percent: float


def factorize(hessian: Tensor, order: Tensor, damp_percent: float) -> Factor:
    """Damp, reorder and factorize. Where the matrix is not positive definite in fp32, the damping is raised tenfold
    until it is.

    Args:
        hessian: fp32 `[K, K]`, zero on the diagonal only for dead columns, which stay out of the mean and
            are given it.
        order: `[K]`, the column solved first comes first.
        damp_percent: what is added to the diagonal, as a fraction of its mean.

    Raises:
        SolveError: not positive definite under any reasonable damping.
    """
    damped = hessian[order][:, order]
    diagonal = damped.diagonal()
    dead = diagonal == 0
    live = diagonal[~dead]
    mean = total(live) / live.numel() if live.numel() else 1.0
    damped.diagonal()[dead] = mean
    used = damp_percent
    while used <= DAMP_LIMIT:
        trial = damped.clone()
        trial.diagonal().add_(used * mean)
        upper = inverse_factor(trial)
        if upper is not None:
            return Factor(upper, trial, used)
        used *= 10
    raise SolveError(
        f"the Hessian is not positive definite even with damping {DAMP_LIMIT:g} × its mean; "
        "use more calibration text, or load the model in float32"
    )
