"""Let the scales and the rounding of a quantized weight go down a gradient. Pure tensors: where the gradient comes
from is another's business.

Rounding learns by a straight-through estimate, as in AutoRound (Cheng et al. 2023), from the dense weight on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..format.grid import QuantizedWeight
from .linalg import total


@dataclass(frozen=True)
class TuneSettings:
    """How much and how fast.

    Args:
        block_epochs: passes over the calibration windows per block, for its rounding and scales; 0 leaves it out.
        model_epochs: passes over the windows for the whole model's scales; 0 leaves it out. It holds all quantized
            blocks in memory.
        batch: windows per step.
        scale_rate: the largest step of a scale, as a fraction of the layer's mean scale.
        rounding_rate: the largest step of a weight, in units of its scale.
    """

    block_epochs: int = 0
    model_epochs: int = 0
    batch: int = 4
    scale_rate: float = 2e-3
    rounding_rate: float = 2e-2

    def __post_init__(self) -> None:
        for name in ("block_epochs", "model_epochs"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name}={value!r} must be an integer of at least 0")

    def steps(self, windows: int, epochs: int) -> int:
        """Steps in so many passes over so many windows."""
        return epochs * (windows // min(self.batch, windows))


class LearnedWeight:
    """A quantized weight `[N, K]` while it learns.

    Its weight is `(round(latent) - zero) * scale`; the gradient of `round` is taken to be 1.

    Args:
        start: the weight to begin with.
        dense: its weight before it was quantized, `[N, K]`: rounding is learned from there, as far as it stays within
            the half step that rounds to the present codes. None to keep codes.
    """

    def __init__(self, start: QuantizedWeight, dense: Tensor | None) -> None:
        self.start = start
        self.group = self.start.group.long()
        self.highest = float(2**self.start.spec.bits - 1)
        self.zeros = self.start.zeros.T.float().contiguous()
        self.scales = self.start.scales.T.float().contiguous()
        self.codes = self.start.codes
        self.latent: Tensor | None = None
        if dense is not None:
            codes = self.codes.float()
            wanted = dense.float() / self._spread(self.scales) + self._spread(self.zeros)
            self.latent = codes + (wanted - codes).clamp(-0.49, 0.49)
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._mean_scale = total(self.scales.abs()) / self.scales.numel()  # the same bits for any number of threads
        self._steps = 0

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The present weight `[N, K]`."""
        return ((self._present_codes() - self._spread(self.zeros)) * self._spread(self.scales)).to(dtype)

    def step(self, gradient: Tensor, settings: TuneSettings, decay: float) -> None:
        """Go one step down.

        Args:
            gradient: fp32 `[N, K]`, of the loss by the weight.
            settings: rates.
            decay: 0 to 1, times the rates.
        """
        self._steps += 1
        levels = self._present_codes() - self._spread(self.zeros)
        by_scale = torch.zeros_like(self.scales).index_add_(1, self.group, gradient * levels)
        by_latent = gradient * self._spread(self.scales) if self.latent is not None else None
        least = torch.finfo(self.start.scales.dtype).tiny
        moved = self.scales - self._direction("scales", by_scale) * (settings.scale_rate * decay * self._mean_scale)
        # A scale that would cross zero or become subnormal stays.
        self.scales = torch.where((moved.abs() >= least) & (moved.sign() == self.scales.sign()), moved, self.scales)
        if by_latent is not None and self.latent is not None:
            self.latent -= self._direction("latent", by_latent) * (settings.rounding_rate * decay)
            self.latent.clamp_(-0.49, self.highest + 0.49)

    def finished(self) -> QuantizedWeight:
        """What was learned: zeros and groups are those to begin with."""
        scales = self.scales.T.contiguous().to(self.start.scales.dtype)
        codes = self._present_codes().to(torch.uint8)
        return QuantizedWeight(codes, scales, self.start.zeros, self.start.group, self.start.spec)

    def _present_codes(self) -> Tensor:
        return self.codes.float() if self.latent is None else self.latent.round().clamp_(0, self.highest)

    def _spread(self, values: Tensor) -> Tensor:
        """`[N, G]` to `[N, K]`."""
        return values[:, self.group]

    def _direction(self, name: str, gradient: Tensor) -> Tensor:
        """Adam's."""
        if name not in self._moments:
            self._moments[name] = (torch.zeros_like(gradient), torch.zeros_like(gradient))
        first, second = self._moments[name]
        first.lerp_(gradient, 0.1)
        second.mul_(0.95).addcmul_(gradient, gradient, value=0.05)
        root = (second / (1 - 0.95**self._steps)).sqrt_().add_(1e-20)
        return first / (1 - 0.9**self._steps) / root
