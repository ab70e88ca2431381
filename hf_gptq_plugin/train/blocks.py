"""Integers of 8 and 4 bits with a scale per block of 256 values: what optimizer states and gradients are kept in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

BLOCK = 256


@dataclass
class Int8Blocks:
    """A float tensor as int8 in blocks of 256, `value = code · scale`, `scale = max |value| / 127` of the block.

    Args:
        codes: int8 `[blocks, 256]`, zero beyond the tensor's end.
        scales: fp32 `[blocks]`.
        shape: of the tensor.
    """

    codes: Tensor
    scales: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, values: Tensor, draw: torch.Generator | None = None) -> Int8Blocks:
        """Round to the nearest, or with `draw` by chance, see `_by_chance`."""
        blocks = _blocks(values)
        scales = blocks.abs().amax(1) / 127
        places = blocks / _divisor(scales)[:, None]
        # By chance, the largest value may come out one code too high: its place is 127 but for a rounding.
        codes = places.round() if draw is None else _by_chance(places, draw).clamp_(-127, 127)
        return cls(codes.to(torch.int8), scales, values.shape)

    def dense(self) -> Tensor:
        """Back, in fp32."""
        return _cut(self.codes.float() * self.scales[:, None], self.shape)

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.codes.numel() + 4 * self.scales.numel() - (self.codes.numel() - self.shape.numel())


@dataclass
class Squares8:
    """A tensor of squares as the codes of its roots, uint8 in blocks of 256: small squares keep their order of
    magnitude, which a linear code of the squares themselves would lose.

    Args:
        codes: uint8 `[blocks, 256]`.
        scales: fp32 `[blocks]`, of the roots.
        shape: of the tensor.
    """

    codes: Tensor
    scales: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, values: Tensor, draw: torch.Generator) -> Squares8:
        """Round roots by chance, see `_by_chance`: always up, none would ever decay. What is not 0 keeps at least code
        1, since steps are divided by it."""
        roots = _blocks(values).sqrt()
        scales = roots.amax(1) / 255
        codes = _by_chance(roots / _divisor(scales)[:, None], draw).clamp_(max=255)
        return cls(torch.where(roots > 0, codes.clamp_(min=1), 0).to(torch.uint8), scales, values.shape)

    def dense(self) -> Tensor:
        """Back to squares, in fp32."""
        return _cut((self.codes.float() * self.scales[:, None]).square(), self.shape)

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.shape.numel() + 4 * self.scales.numel()


@dataclass
class Int4Blocks:
    """A float tensor in 4 bits, two codes to a byte, `value = low + code · step` per block of 256.

    Args:
        codes: uint8 `[blocks, 128]`; the first 128 codes of a block are the low halves.
        low, step: fp32 `[blocks]`.
        shape: of the tensor.
    """

    codes: Tensor
    low: Tensor
    step: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, values: Tensor) -> Int4Blocks:
        """Round to the nearest."""
        blocks = _blocks(values)
        low, high = blocks.aminmax(dim=1)
        step = (high - low) / 15
        codes = ((blocks - low[:, None]) / _divisor(step)[:, None]).round().to(torch.uint8)
        return cls(codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] << 4, low, step, values.shape)

    def dense(self) -> Tensor:
        """Back, in fp32."""
        codes = torch.cat([self.codes & 15, self.codes >> 4], 1).float()
        return _cut(self.low[:, None] + codes * self.step[:, None], self.shape)

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.codes.numel() + 8 * self.step.numel()


_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Int8Blocks, Squares8, Int4Blocks)}


# What `torch.load` may make of an optimizer's state: Trainer reads its checkpoints so.
torch.serialization.add_safe_globals([*_KINDS.values()])


def flattened(value: Any) -> dict[str, Tensor]:
    """A value of an optimizer's state as plain tensors, to be saved: a tensor, a number, or blocks of integers."""
    if type(value) not in _KINDS.values():
        return {"": torch.as_tensor(value).detach().clone().contiguous()}
    found = {f"/{type(value).__name__}/{key}": part for key, part in vars(value).items() if key != "shape"}
    return {**found, f"/{type(value).__name__}/shape": torch.tensor(value.shape)}


def restored(parts: dict[str, Tensor]) -> Any:
    """Inverse of `flattened`; integers without a dimension are numbers."""
    if "" in parts:
        value = parts[""]
        return int(value) if value.dim() == 0 and not value.is_floating_point() else value
    kind = next(iter(parts)).split("/")[1]
    fields = {key.rpartition("/")[2]: value for key, value in parts.items()}
    return _KINDS[kind](**{**fields, "shape": torch.Size(fields["shape"].tolist())})


def placed(value: Any, device: torch.device) -> Any:
    """A value of an optimizer's state with its tensors on a device. Numbers, and tensors that are one, stay."""
    if isinstance(value, Tensor):
        return value.to(device) if value.dim() else value
    if type(value) not in _KINDS.values():
        return value
    return replace(value, **{key: part.to(device) for key, part in vars(value).items() if key != "shape"})


def _blocks(values: Tensor) -> Tensor:
    flat = values.detach().float().flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _divisor(scales: Tensor) -> Tensor:
    """A block of zeros is divided by 1."""
    return torch.where(scales > 0, scales, 1.0)


def _by_chance(places: Tensor, draw: torch.Generator) -> Tensor:
    """Up as often as a place lies towards the next code, else down, so that the mean over many roundings is exact.
    Rounded to the nearest, what changes by less than half a code at a time would never change."""
    chance = torch.rand(places.shape, generator=draw, device=draw.device).to(places.device)
    if hasattr(places, "device_mesh"):  # a DTensor, of FSDP: every process has drawn for the whole
        from torch.distributed.tensor import DTensor

        chance = DTensor.from_local(chance, places.device_mesh)
    return (places + chance).floor()


def _cut(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.flatten()[: shape.numel()].view(shape)
