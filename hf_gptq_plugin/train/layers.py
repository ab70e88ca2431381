"""Layers that stand in for a `QuantLinear` while something of it learns.

All compute with exactly the weight that they export, so that a checkpoint answers as the trained model did. With
`Ŵ = s (q - z)`, `dW = gᵀ x` for the output's gradient `g`, and `Σ` over the input features of a group:

============== ==================================== ======================================================
layer          learns                               gradients
============== ==================================== ======================================================
`LearnedGrid`  α `[G, N]` of s = α s₀; shift of z   dα = Σ dW Ŵ / α; dz = -s Σ dW
`LearnedCodes` latent `[N, K]`, q = clip(round(·))  straight through: dlatent = s dW where not clipped
`LowRankCodes` A, B: latent = q₀ + u + γ B A / s    through the latent's
`PooledLora`   A `[r, G]`, B: y += γ (Σ x) Aᵀ Bᵀ    autograd's
============== ==================================== ======================================================

Sources: PEQA (Kim et al. 2023) for α; LSQ (Esser et al. 2020) for rounded zeros; L4Q (Jeon et al. 2024) for codes
under a low-rank update; QA-LoRA (Xu et al. 2023) for pooled inputs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..format import packing
from ..format.grid import QuantizedWeight
from ..nn.linear import QuantLinear
from ..nn.ops import KernelWeight, dequantize, linear, linear_transposed

ROWS = 512  # output features whose full gradient exists at a time, a multiple of 64 (`KernelWeight.outputs`)
SPREAD = 0.999  # of the latents of one code, in codes; the gap that is left must be less than one step of an optimizer
LEAST = 2.0**-6  # of α: a scale keeps its sign and stays a normal number


class _InPlaceOf(nn.Module):
    """What stands in a quantized layer's place while it learns."""

    layer: QuantLinear

    @property
    def weight(self) -> Tensor:
        """The present weight `[N, K]`, a new tensor without gradient: some models ask for their layers' (T5, for the
        dtype)."""
        made = getattr(self, "quantized", None)
        return self.layer.weight if made is None else made().dequantize(self.layer.dtype)


class LearnedGrid(_InPlaceOf):
    """A quantized layer whose scales, and if asked zeros, learn; codes stay.

    Args:
        layer: the layer. It is not changed.
        zeros: let zeros learn too. They are rounded to the integers that a checkpoint stores.
    """

    def __init__(self, layer: QuantLinear, zeros: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.alpha = nn.Parameter(torch.ones(layer.scales.shape, device=layer.scales.device))
        self.shift = nn.Parameter(torch.zeros_like(self.alpha)) if zeros else None
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("group", layer._stored_g_idx().long(), persistent=False)
        self.width = group_width(layer)
        start = packing.unpack_zeros(layer.qzeros, layer.spec.bits, layer.spec.zero_offset, layer.out_features)
        self.register_buffer("start", start, persistent=False)
        # A zero that the checkpoint already had outside of what writers choose stays possible.
        low, high = layer.spec.zero_range
        self.register_buffer("low", start.min().clamp(max=low), persistent=False)
        self.register_buffer("high", start.max().clamp(min=high), persistent=False)

    def scales(self) -> Tensor:
        """The present scales as a checkpoint stores them, `[G, N]`."""
        start, limits = self.layer.scales.float(), torch.finfo(self.layer.scales.dtype)
        size = start.abs() * self.alpha.detach().clamp_min(LEAST)
        # None becomes subnormal; what a checkpoint had below that stays as it is.
        size = size.clamp_max(limits.max).maximum(start.abs().clamp_max(limits.tiny))
        return size.copysign(start).to(self.layer.scales.dtype)

    def zeros(self) -> Tensor:
        """The present zeros, int32 `[G, N]`."""
        start: Tensor = self.start  # type: ignore[assignment]
        if self.shift is None:
            return start
        return torch.clamp(start + self.shift.detach().round(), self.low, self.high).int()  # type: ignore[arg-type]

    def kernel_weight(self) -> KernelWeight:
        """The present weight as the ops take it."""
        weight = replace(self.layer.kernel_weight, scales=self.scales())
        if self.shift is None:
            return weight
        spec = self.layer.spec
        return replace(weight, qzeros=packing.pack_stream(self.zeros() - spec.zero_offset, spec.bits))

    def forward(self, x: Tensor) -> Tensor:
        """`x @ Ŵ.T + bias`; x `[..., K]`."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = self.layer.bias
        out: Tensor = _GridProduct.apply(x, self.alpha, self.shift, self)
        return out if bias is None else out + bias.to(out.dtype)

    def quantized(self) -> QuantizedWeight:
        """The weight as it is now."""
        base = self.layer.quantized_weight()
        zeros = self.zeros()
        sym = bool((zeros == 2 ** (base.spec.bits - 1)).all())
        spec = replace(base.spec, sym=sym)
        return QuantizedWeight(base.codes, self.scales(), zeros, base.group, spec)


class _GridProduct(torch.autograd.Function):
    """`x @ Ŵ.T`, with gradients by x, α and the zeros' shift; neither a `[N, K]` gradient
    nor a dense weight exists at any time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, shift: Tensor | None, layer: LearnedGrid) -> Tensor:
        weight = layer.kernel_weight()
        ctx.save_for_backward(x, alpha, shift)
        ctx.layer, ctx.weight = layer, weight
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, alpha, shift = ctx.saved_tensors
        layer: LearnedGrid = ctx.layer
        group: Tensor = layer.group  # type: ignore[assignment]
        by_x = linear_transposed(g, ctx.weight, layer.in_features) if ctx.needs_input_grad[0] else None
        rows_x, rows_g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        by_alpha = by_shift = None
        if ctx.needs_input_grad[1]:
            by_alpha = torch.empty_like(alpha)
            for low in range(0, layer.out_features, ROWS):
                part = slice(low, low + ROWS)
                dense = dequantize(ctx.weight.outputs(low, low + ROWS), layer.in_features)
                product = (rows_g[:, part].T @ rows_x).float() * dense
                by_alpha[:, part] = group_sums(product, group, alpha.shape[0], layer.width).T
            held = alpha.clamp_min(LEAST)
            by_alpha = torch.where(alpha < LEAST, 0, by_alpha / held)
        if shift is not None and ctx.needs_input_grad[2]:
            pooled = group_sums(rows_x.float(), group, alpha.shape[0], layer.width)
            start: Tensor = layer.start  # type: ignore[assignment]
            inside = layer.zeros() == (start + shift.round()).int()
            by_shift = -(pooled.T @ rows_g.float()) * ctx.weight.scales.float() * inside
        return by_x, by_alpha, by_shift, None


def group_width(layer: QuantLinear) -> int | None:
    """Input features per group where groups lie side by side, as they do in all but act-order checkpoints."""
    return layer.spec.width(layer.in_features) if layer.kernel_weight.g_idx is None else None


def group_sums(values: Tensor, group: Tensor, groups: int, width: int | None) -> Tensor:
    """Sums of columns by group, `[R, K]` to `[R, G]`. With groups side by side in one width, without the scattered
    additions that take most of a step otherwise."""
    if width is None:
        return values.new_zeros(len(values), groups).index_add_(1, group, values)
    missing = groups * width - values.shape[1]
    padded = nn.functional.pad(values, (0, missing)) if missing else values
    return padded.view(len(values), groups, width).sum(-1)


class _Round(torch.autograd.Function):
    """Codes from latents, `clip(round(latent), 0, highest)`; the gradient passes where nothing is clipped."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, highest: int) -> Tensor:
        ctx.save_for_backward(latent)
        ctx.highest = highest
        return latent.round().clamp(0, highest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (latent,) = ctx.saved_tensors
        inside = (latent > -0.5) & (latent < ctx.highest + 0.5)
        return gradients[0] * inside, None


def _places(codes: Tensor) -> Tensor:
    """Where latents begin within what rounds to their codes, in steps of 1/256, uint8 `[N, K]`: spread evenly. Begun in
    the middle, none would reach another code before half a step is done, and then all at once."""
    draw = torch.Generator().manual_seed(codes.numel())
    return torch.randint(0, 256, codes.shape, generator=draw, dtype=torch.uint8).to(codes.device)


def _placed(places: Tensor) -> Tensor:
    """As fp32, within half of `SPREAD` on both sides of 0."""
    return (places.float() - 127.5) * (SPREAD / 255)


def _as_of_old(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """States of earlier versions do not say how many steps there were: a layer keeps its own number, 0 at first."""
    state.setdefault(f"{prefix}_extra_state", module.get_extra_state())


class LearnedCodes(_InPlaceOf):
    """A quantized layer whose codes learn, on its own grid.

    Args:
        layer: the layer. It is not changed.
        every: training steps between two roundings of the latents, see `advance`. With 1, codes follow straight
            through; with more, the latents are shadow weights.
        cap: largest share of a layer's codes that one rounding may change; those that moved furthest go first.
        decay: share of a latent's distance to its code that every rounding takes away, so that what does not lead to
            another code is forgotten.
    """

    def __init__(self, layer: QuantLinear, every: int = 1, cap: float = 1.0, decay: float = 0.0) -> None:
        super().__init__()
        if type(every) is not int or every < 1:
            raise ValueError(f"every={every!r} must be an integer of at least 1")
        for name, value in (("cap", cap), ("decay", decay)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} must be between 0 and 1")
        self.layer, self.every, self.cap, self.decay = layer, every, cap, decay
        self.in_features, self.out_features = layer.in_features, layer.out_features
        base = layer.quantized_weight()
        self.latent = nn.Parameter(base.codes.float() + _placed(_places(base.codes)))
        self.register_buffer("codes", base.codes, persistent=True)
        self.register_buffer("group", base.group.long(), persistent=False)
        self.register_buffer("zeros", base.zeros, persistent=False)
        self.steps = 0
        self.register_load_state_dict_pre_hook(_as_of_old)

    def get_extra_state(self) -> Tensor:
        """What `state_dict` keeps beside tensors: the steps, for the place between two roundings."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of `get_extra_state`."""
        self.steps = int(state)

    def spread(self, values: Tensor) -> Tensor:
        """`[G, N]` to `[N, K]` in fp32."""
        group: Tensor = self.group  # type: ignore[assignment]
        return values.T.float()[:, group]

    def present(self) -> Tensor:
        """The codes that the weight is made of, as a function of the latents; fp32 `[N, K]`."""
        rounded: Tensor = _Round.apply(self.latent, self.layer.spec.maxq)
        codes: Tensor = self.codes  # type: ignore[assignment]
        return rounded + (codes.float() - rounded).detach()

    def forward(self, x: Tensor) -> Tensor:
        """`x @ Ŵ.T + bias`; x `[..., K]`."""
        zeros: Tensor = self.zeros  # type: ignore[assignment]
        weight = (self.present() - self.spread(zeros)) * self.spread(self.layer.scales)
        bias = self.layer.bias
        return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @torch.no_grad()
    def advance(self) -> int:
        """Note that an optimizer has stepped; round the latents if it is time. Returns how many codes changed."""
        self.steps += 1
        if self.steps % self.every:
            return 0
        codes: Tensor = self.codes  # type: ignore[assignment]
        wanted = self.latent.round().clamp_(0, self.layer.spec.maxq).to(torch.uint8)
        changed = wanted != codes
        allowed = int(self.cap * codes.numel())
        if int(changed.sum()) > allowed:
            distance = torch.where(changed, (self.latent - codes.float()).abs(), -1.0).flatten()
            keep = torch.zeros_like(changed).flatten()
            keep[distance.topk(allowed).indices] = True
            changed &= keep.view_as(changed)
        codes[changed] = wanted[changed]
        self.latent.clamp_(-0.49, self.layer.spec.maxq + 0.49)  # beyond, no gradient would bring it back
        if self.decay:
            self.latent.lerp_(codes.float(), self.decay)
        return int(changed.sum())

    def quantized(self) -> QuantizedWeight:
        """The weight as it is now."""
        base = self.layer.quantized_weight()
        codes: Tensor = self.codes  # type: ignore[assignment]
        return replace(base, codes=codes.clone())


class LowRankCodes(_InPlaceOf):
    """A quantized layer whose codes follow a low-rank update of the weight, `q = clip(round(q₀ + u + γ B A / s))`, with
    a fixed u that is spread evenly over what rounds to 0.

    Args:
        layer: the layer. It is not changed.
        rank: of the update.
        gamma: its factor.
    """

    def __init__(self, layer: QuantLinear, rank: int = 16, gamma: float = 2.0) -> None:
        super().__init__()
        require_rank(rank, layer)
        require_gamma(gamma)
        self.layer, self.gamma = layer, gamma
        self.in_features, self.out_features = layer.in_features, layer.out_features
        base = layer.quantized_weight()
        device = layer.scales.device
        self.A = nn.Parameter(_uniform(rank, layer.in_features).to(device))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        self.register_buffer("codes", base.codes, persistent=False)
        self.register_buffer("places", _places(base.codes), persistent=False)
        self.register_buffer("group", base.group.long(), persistent=False)
        self.register_buffer("zeros", base.zeros, persistent=False)

    def present(self) -> tuple[Tensor, Tensor]:
        """Codes and scales, both fp32 `[N, K]`."""
        group: Tensor = self.group  # type: ignore[assignment]
        codes: Tensor = self.codes  # type: ignore[assignment]
        scales = self.layer.scales.T.float()[:, group]
        places: Tensor = self.places  # type: ignore[assignment]
        steps = scales.masked_fill(scales == 0, math.inf)  # a group of scale 0 is 0 with any codes, and keeps them
        latent = codes.float() + _placed(places) + self.gamma * (self.B @ self.A) / steps
        rounded: Tensor = _Round.apply(latent, self.layer.spec.maxq)
        return rounded, scales

    def forward(self, x: Tensor) -> Tensor:
        """`x @ Ŵ.T + bias`; x `[..., K]`."""
        rounded, scales = self.present()
        group: Tensor = self.group  # type: ignore[assignment]
        zeros: Tensor = self.zeros  # type: ignore[assignment]
        weight = (rounded - zeros.T.float()[:, group]) * scales
        bias = self.layer.bias
        return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def quantized(self) -> QuantizedWeight:
        """The weight as it is now."""
        with torch.no_grad():
            codes = self.present()[0].to(torch.uint8)
        return replace(self.layer.quantized_weight(), codes=codes)


class PooledLora(_InPlaceOf):
    """A quantized layer with an adapter on inputs summed by group. It is an ordinary LoRA adapter whose A repeats
    within a group, and is exported as that.

    Args:
        layer: the layer. It is not changed.
        rank: of the adapter.
        gamma: its factor, PEFT's `lora_alpha / r`.
    """

    def __init__(self, layer: QuantLinear, rank: int = 16, gamma: float = 2.0) -> None:
        super().__init__()
        require_rank(rank, layer)
        require_gamma(gamma)
        self.layer, self.rank, self.gamma = layer, rank, gamma
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("group", layer._stored_g_idx().long(), persistent=False)
        self.width = group_width(layer)
        groups, device = layer.scales.shape[0], layer.scales.device
        self.A = nn.Parameter((_uniform(rank, groups) * (groups / layer.in_features) ** 0.5).to(device))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """`layer(x) + γ pool(x) Aᵀ Bᵀ`; x `[..., K]`."""
        group: Tensor = self.group  # type: ignore[assignment]
        base = self.layer(x)
        pooled = group_sums(x.reshape(-1, x.shape[-1]).float(), group, self.A.shape[1], self.width)
        update = (self.gamma * (pooled @ self.A.T) @ self.B.T).view(base.shape)
        return base + update.to(base.dtype)

    def adapter(self) -> dict[str, Tensor]:
        """The matrices of the ordinary adapter: lora_A `[r, K]`, lora_B `[N, r]`."""
        group: Tensor = self.group  # type: ignore[assignment]
        return {"lora_A": self.A.detach()[:, group].contiguous(), "lora_B": self.B.detach().clone()}


def require_rank(rank: int, layer: QuantLinear) -> None:
    """Check an adapter's rank.

    Raises:
        ValueError: it is no rank of this layer.
    """
    most = min(layer.in_features, layer.out_features)
    if type(rank) is not int or not 1 <= rank <= most:
        raise ValueError(
            f"rank={rank!r} must be an integer from 1 to {most}, the smaller side of a layer "
            f"[{layer.out_features}, {layer.in_features}]; target_modules can leave such layers out"
        )


def require_gamma(gamma: float) -> None:
    """Check an adapter's factor.

    Raises:
        ValueError: it is not finite.
    """
    if not math.isfinite(gamma):
        raise ValueError(f"gamma={gamma!r} must be finite")


def _uniform(rows: int, columns: int) -> Tensor:
    """As `nn.Linear` begins: uniform within `1 / sqrt(columns)`."""
    return (torch.rand(rows, columns) * 2 - 1) / columns**0.5
