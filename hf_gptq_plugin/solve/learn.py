"""Let the scales and the rounding of a quantized weight, and plain vectors, go down a gradient. Pure tensors: where the
gradient comes from is another's business.

Rounding learns by a straight-through estimate, as in AutoRound (Cheng et al. 2023), from the codes found on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..format.grid import QuantizedWeight
from .linalg import total

# How far from its code's centre towards the dense weight a latent begins. A solver that makes errors good elsewhere
# gives many weights a code that is not the nearest: begun at the edge (1), those flip back within a few steps, and what
# they made good comes back. At the centre (0), what the dense weight says is lost. Measured at 2 bit, as the
# divergence of a model of which 5 blocks are quantized: 0.320 untuned, 0.460 from 1, 0.262 from 1/2, 0.280 from 0.
_TOWARDS_DENSE = 0.5


@dataclass(frozen=True)
class TuneSettings:
    """How much and how fast.

    Args:
        block_epochs: passes over the calibration windows per block, for its rounding and scales; 0 leaves it out.
        model_epochs: passes over the windows for the whole model's scales and vectors; 0 leaves it out. It holds all
            quantized blocks in memory.
        batch: windows per step.
        scale_rate: the largest step of a scale, as a fraction of the layer's mean scale.
        rounding_rate: the largest step of a weight, in units of its scale.
        vector_rate: the largest step of a vector's element, as a fraction of the vector's mean magnitude.
    """

    block_epochs: int = 0
    model_epochs: int = 0
    batch: int = 4
    scale_rate: float = 2e-3
    rounding_rate: float = 2e-2
    vector_rate: float = 2e-3

    def __post_init__(self) -> None:
        for name in ("block_epochs", "model_epochs"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name}={value!r} must be an integer of at least 0")

    def steps(self, windows: int, epochs: int) -> int:
        """Steps in so many passes over so many windows."""
        return epochs * (windows // min(self.batch, windows))


class Adam:
    """The steps of one tensor: of size 1 while its gradients keep their sign."""

    def __init__(self, like: Tensor) -> None:
        self._first, self._second, self._steps = torch.zeros_like(like), torch.zeros_like(like), 0

    def direction(self, gradient: Tensor) -> Tensor:
        """Where to go, uphill. gradient: fp32, of the tensor's shape."""
        self._steps += 1
        self._first.lerp_(gradient, 0.1)
        self._second.mul_(0.95).addcmul_(gradient, gradient, value=0.05)
        root = (self._second / (1 - 0.95**self._steps)).sqrt_().add_(1e-20)
        return self._first / (1 - 0.9**self._steps) / root


class LearnedVector:
    """A parameter that is not quantized, while it learns: a norm's weight, a bias.

    Args:
        parameter: floating point, of any shape. It always holds the present values, rounded to its dtype. One that is
            all zero stays so.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self._values = parameter.detach().float().clone()
        self._size = total(self._values.abs()) / self._values.numel()
        self._adam = Adam(self._values)

    def step(self, gradient: Tensor, settings: TuneSettings, decay: float) -> None:
        """Go one step down; arguments as `LearnedWeight.step`."""
        self._values -= self._adam.direction(gradient) * (settings.vector_rate * decay * self._size)
        self.parameter.detach().copy_(self._values)


class LearnedWeight:
    """A quantized weight `[N, K]` while it learns.

    Its weight is `(round(latent) - zero) * scale`; the gradient of `round` is taken to be 1.

    Args:
        start: the weight to begin with.
        dense: its weight before it was quantized, `[N, K]`: rounding is learned from half way between the present codes
            and there, or the half step that rounds to them. None to keep codes.
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
            self.latent = codes + (wanted - codes).clamp(-0.5, 0.5) * _TOWARDS_DENSE
        self._scale_adam = Adam(self.scales)
        self._latent_adam = None if self.latent is None else Adam(self.latent)
        self._mean_scale = total(self.scales.abs()) / self.scales.numel()  # the same bits for any number of threads

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
        levels = self._present_codes() - self._spread(self.zeros)
        by_scale = torch.zeros_like(self.scales).index_add_(1, self.group, gradient * levels)
        by_latent = gradient * self._spread(self.scales)
        least = torch.finfo(self.start.scales.dtype).tiny
        moved = self.scales - self._scale_adam.direction(by_scale) * (settings.scale_rate * decay * self._mean_scale)
        # A scale that would cross zero or become subnormal stays.
        self.scales = torch.where((moved.abs() >= least) & (moved.sign() == self.scales.sign()), moved, self.scales)
        if self.latent is not None and self._latent_adam is not None:
            self.latent -= self._latent_adam.direction(by_latent) * (settings.rounding_rate * decay)
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
