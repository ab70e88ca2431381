"""The Hessian of a layer's squared output error, and the factor of its inverse that the solver walks along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .linalg import add_gram, all_finite, inverse_factor, matmul, total

_ROWS = 256  # taken at once where a matrix is reordered or multiplied
# Of what is added, as much is multiplied at once: the fewer times the sums are read and written, the better.
_TOKENS, _BYTES = 2048, 32 << 20
DAMP_LIMIT = 10.0  # times the mean of the diagonal; beyond it the damping would drown the data


class SolveError(RuntimeError):
    """A layer that cannot be solved with the calibration data at hand."""


class Hessian:
    """Running `H = (1/T) Σ w x xᵀ` over `T` tokens of weights `w`, and `C = (1/T) Σ w x (x* - x)ᵀ` where `x*` is what
    `x` would be had no layer before been quantized; or, in its place, `Z = (1/T) Σ w z xᵀ` where `z` is what the one
    layer that reads `x` is to return: it holds all that the layer needs, is smaller where there are few outputs, and
    takes no `x*`.

    Args:
        in_features: `K`.
        device: where the fp32 matrix `[K, K]` is kept.
        at_once: tokens that are multiplied at once. What was added is held until then, and must not be written into.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu", at_once: int = _TOKENS) -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._cross: Tensor | None = None
        self._target: Tensor | None = None
        self._added: list[tuple[Tensor, Tensor | None, Tensor | None]] = []  # not multiplied yet
        self._at_once = at_once
        self.tokens = 0
        self._borrowed = 0
        self._divided = False
        self._factor: Factor | None = None

    def add(
        self, x: Tensor, exact: Tensor | None = None, weights: Tensor | None = None, target: Tensor | None = None
    ) -> None:
        """Add inputs.

        Args:
            x: `[..., K]`. bf16 is multiplied as it is, everything else in fp32.
            exact: `x*`, `[..., K]`; at every call or at none. In bf16 `x* - x` is rounded to bf16, which changes
                nothing where the two are alike.
            weights: `[T]`, what every token counts; 1 by default. Their mean over all calls should be 1, since `H` is
                divided by the number of tokens.
            target: `z`, `[..., N]`, in place of exact. Beside `x` in bf16 it is rounded to bf16, which is little beside
                the errors that it is there for, and evens out over tokens.
        """
        self._require_open()
        rows = self._rows(x)
        off = None if exact is None else self._rows(exact) - rows
        target = None if target is None else self._rows(target).to(rows.dtype)
        if weights is not None:
            roots = weights.to(rows.device).sqrt()[:, None]
            rows = (rows * roots).to(rows.dtype)
            off = None if off is None else (off * roots).to(rows.dtype)
            target = None if target is None else (target * roots).to(rows.dtype)
        self._added.append((rows, off, target))
        self.tokens += len(rows)
        held = [part for parts in self._added for part in parts if part is not None]
        if sum(len(parts[0]) for parts in self._added) >= self._at_once or sum(part.nbytes for part in held) >= _BYTES:
            self._multiply()

    def _multiply(self) -> None:
        """Take into the sums what was added."""
        if not self._added:
            return
        rows, off, target = map(_joined, zip(*self._added, strict=True))
        self._added = []
        add_gram(self._sum, rows)
        if off is not None:
            if self._cross is None:
                self._cross = torch.zeros_like(self._sum)
            add_gram(self._cross, rows, off)
        if target is not None:
            if self._target is None:
                self._target = self._sum.new_zeros(target.shape[1], rows.shape[1])
            add_gram(self._target, target, rows)

    def lean_on(self, prior: Hessian, tokens: int) -> None:
        """Take in another's means of `H` and `C` with the weight of this many tokens; `tokens` still counts what was
        added."""
        self._require_open()
        self._multiply()
        self._sum.add_(prior.mean(), alpha=tokens)
        cross = prior.mean_cross()
        if cross is not None:
            if self._cross is None:
                self._cross = torch.zeros_like(self._sum)
            self._cross.add_(cross, alpha=tokens)
        self._borrowed += tokens

    def combine(self, sum_in_place: Callable[[Tensor], Tensor], sum_of: Callable[[int], int]) -> None:
        """Add up with what others have seen.

        Args:
            sum_in_place: turns a tensor into the sum over all.
            sum_of: the sum over all of an integer.
        """
        self._require_open()
        for made in self._made():
            sum_in_place(made)
        self.tokens, self._borrowed = sum_of(self.tokens), sum_of(self._borrowed)

    def _made(self) -> list[Tensor]:
        self._multiply()
        return [made for made in (self._sum, self._cross, self._target) if made is not None]

    def _rows(self, x: Tensor) -> Tensor:
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        return x.detach().reshape(-1, x.shape[-1]).to(self._sum.device, dtype)

    def mean(self) -> Tensor:
        """`H`, fp32 `[K, K]`. Made in place: nothing can be added afterwards.

        Raises:
            SolveError: no token was seen, or the inputs were not finite.
        """
        if not self._divided:
            weight = self.tokens + self._borrowed
            if weight == 0:
                raise SolveError("no calibration token reached this layer; use more or other calibration text")
            if not all(map(all_finite, self._made())):
                inputs = [self._sum] if self._cross is None else [self._sum, self._cross]
                what = "outputs in the dense model" if all(map(all_finite, inputs)) else "inputs"
                raise SolveError(
                    f"the layer's {what} are not finite on the calibration text (NaN or infinity); load the model in "
                    "float32 or bfloat16, and check its weights"
                )
            for made in self._made():
                made /= weight
            self._divided = True
        return self._sum

    def mean_cross(self) -> Tensor | None:
        """`C`, fp32 `[K, K]`; None where no exact inputs were given. As `mean`."""
        self.mean()
        return self._cross

    @property
    def has_target(self) -> bool:
        """Whether it holds what the layer is to return, once `combine` or `mean` was called."""
        return self._target is not None

    def drift(self, weight: Tensor) -> Tensor | None:
        """`W Cᵀ` or `Z - W H`, fp32 `[N, K]`: all that a layer needs of `C` or `Z`, the mean of `(z - W x) xᵀ`, where
        `z = W x*` if nothing else is said. Inputs that were never active count for nothing. `Z` is gone afterwards.

        Args:
            weight: `W`, `[N, K]`.

        Returns:
            None where neither exact inputs nor outputs were given.
        """
        hessian, made = self.mean(), self._factor
        if (out := self._target) is not None:
            if made is not None:
                raise RuntimeError("the Hessian is damped; ask for what its target says before its factor")
            for part, to in zip(weight.split(_ROWS), out.split(_ROWS), strict=True):
                to -= matmul(part.to(out.device, torch.float32), hessian)
            self._target = None
            return out
        diagonal = hessian.diagonal() if made is None else made.diagonal
        return None if self._cross is None else output_drift(weight, self._cross, diagonal == 0)

    def forget_cross(self) -> None:
        """Free `C`, which nothing needs any more."""
        self._cross = None

    def factor(self, order: str, damp_percent: float) -> Factor:
        """The factor, made once for all layers that read these inputs. It takes the place of `mean`'s matrix.

        Args:
            order: see `solve_order`.
            damp_percent: see `factorize`.
        """
        made = self._factor
        if made is None or made.key != (order, damp_percent):
            hessian = self.mean()
            if made is not None:
                hessian.diagonal().copy_(made.diagonal)
            self._factor = made = None  # gone before the next one is made
            self._factor = made = factorize(hessian, order, damp_percent)
        return made

    def _require_open(self) -> None:
        if self._divided:
            raise RuntimeError("the Hessian's means were taken; nothing can be added any more")


def _joined(parts: Sequence[Any]) -> Any:
    """What several calls were given, in one tensor; None where they were given none."""
    return parts[0] if parts[0] is None or len(parts) == 1 else torch.cat(list(parts))


def output_drift(weight: Tensor, cross: Tensor, dead: Tensor) -> Tensor:
    """`W Cᵀ`, see `Hessian.drift`.

    Args:
        weight: `W`, `[N, K]`, any float dtype.
        cross: `C`, fp32 `[K, K]`.
        dead: bool `[K]`, inputs that were never active.
    """
    out = torch.empty(weight.shape, dtype=torch.float32, device=cross.device)
    for part, to in zip(weight.split(_ROWS), out.split(_ROWS), strict=True):
        live = part.to(cross.device, torch.float32).masked_fill(dead.to(cross.device), 0.0)
        to.copy_(matmul(live, cross.T))
    return out


@dataclass(frozen=True)
class Factor:
    """The upper Cholesky factor of the inverse of a damped Hessian.

    Args:
        upper: fp32 `[K, K]`, `inverse(H + damping) = upperᵀ · upper`, in solve order.
        order: `[K]`, the column solved first comes first.
        damped: fp32 `[K, K]`, the damped Hessian itself, in natural order.
        diagonal: fp32 `[K]`, of the Hessian before it was damped.
        damp_percent: the damping used, as a fraction of the diagonal's mean.
        key: what was asked for: the order's name and the damping.
    """

    upper: Tensor
    order: Tensor
    damped: Tensor
    diagonal: Tensor
    damp_percent: float
    key: tuple[str, float]

    def cpu(self) -> Factor:
        """The same on the CPU."""
        tensors = {name: getattr(self, name).cpu() for name in ("upper", "order", "damped", "diagonal")}
        return replace(self, **tensors)


def solve_order(diagonal: Tensor, order: str) -> Tensor:
    """The order `[K]` in which columns are solved: "hessian" is by falling diagonal, "natural" from left to right."""
    if order == "natural":
        return torch.arange(diagonal.numel(), device=diagonal.device)
    return torch.argsort(diagonal, descending=True, stable=True)


def factorize(hessian: Tensor, order: str, damp_percent: float) -> Factor:
    """Damp, reorder and factorize. Where the matrix is not positive definite in fp32, the damping is raised tenfold
    until it is.

    Args:
        hessian: fp32 `[K, K]`, zero on the diagonal only for dead columns, which stay out of the mean and
            are given it. It is damped in place.
        order: see `solve_order`.
        damp_percent: what is added to the diagonal, as a fraction of its mean.

    Raises:
        SolveError: not positive definite under any reasonable damping.
    """
    diagonal = hessian.diagonal().clone()
    places = solve_order(diagonal, order)
    dead = diagonal == 0
    live = diagonal[~dead]
    mean = total(live) / live.numel() if live.numel() else 1.0
    filled = diagonal.masked_fill(dead, mean)
    used = damp_percent
    while used <= DAMP_LIMIT:
        hessian.diagonal().copy_(filled + used * mean)
        upper = inverse_factor(reordered(hessian, places), overwrite=True)
        if upper is not None:
            return Factor(upper, places, hessian, diagonal, used, (order, damp_percent))
        used *= 10
    raise SolveError(
        f"the Hessian is not positive definite even with damping {DAMP_LIMIT:g} × its mean; "
        "use more calibration text, or load the model in float32"
    )


def reordered(matrix: Tensor, order: Tensor) -> Tensor:
    """`matrix[order][:, order]`, with one more matrix in memory instead of two."""
    out = torch.empty_like(matrix)
    for rows, to in zip(order.split(_ROWS), out.split(_ROWS), strict=True):
        torch.index_select(matrix[rows], 1, order, out=to)
    return out
