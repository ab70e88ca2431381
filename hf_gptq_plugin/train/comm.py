"""Gradients in int8: between the processes of DistributedDataParallel, and of chosen parameters by themselves."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .blocks import BLOCK, Int8Blocks

WARMUP = 500  # steps in which gradients stay as they are


class Int8AllReduce:
    """A communication hook for DDP that sends int8 with a scale per 256 values, whatever the number of processes.

    Every process owns a part of each bucket: it receives that part of all others in int8, adds up in fp32, and sends
    the mean back in int8. What the rounding takes away is kept and added to the next gradient (error feedback), so that
    nothing is lost over time. Use: `model.register_comm_hook(None, Int8AllReduce())`.

    Args:
        group: of processes; all by default.
        feedback: keep what rounding takes away.
    """

    def __init__(self, group: Any = None, feedback: bool = True) -> None:
        self.__name__ = self.__qualname__ = "int8_all_reduce"  # DDP asks every hook for its names
        self.group, self.feedback = group, feedback
        self.sent = 0  # bytes that this process has sent
        self.plain = 0  # that a ring all-reduce in fp32 would have sent
        self._left: dict[int, Tensor] = {}
        self._orders: dict[int, tuple[int, ...]] = {}

    # DDP compares these annotations with the types themselves: this module does not postpone theirs.
    def __call__(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """What DDP calls for every bucket of gradients."""
        gradient = bucket.buffer()
        # DDP lays its buckets out anew after the first backward: what rounding took belongs to parameters, not places.
        order = tuple(map(id, bucket.parameters()))
        if self._orders.get(bucket.index(), order) != order:
            self._left.clear()
            self._orders.clear()
        self._orders[bucket.index()] = order
        reduced = self.reduce(gradient.float(), bucket.index()).to(gradient.dtype)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(reduced)
        return future

    def reduce(self, values: Tensor, key: int = 0) -> Tensor:
        """The mean over processes of fp32 values of one shape."""
        processes = dist.get_world_size(self.group)
        flat = values.flatten()
        left = self._left.get(key)
        if self.feedback and left is not None and left.shape == flat.shape:
            flat = flat + left
        part = -(-flat.numel() // (processes * BLOCK)) * BLOCK  # values per process, whole blocks
        padded = torch.nn.functional.pad(flat, (0, part * processes - flat.numel()))
        packed = Int8Blocks.of(padded)
        if self.feedback:
            self._left[key] = (padded - packed.dense())[: flat.numel()]
        codes = self._exchanged(packed.codes.view(processes, -1))
        scales = self._exchanged(packed.scales.view(processes, -1))
        own = (codes.view(processes, -1, BLOCK).float() * scales[:, :, None]).mean(0)
        back = Int8Blocks.of(own)
        all_codes = [torch.empty_like(back.codes) for _ in range(processes)]
        all_scales = [torch.empty_like(back.scales) for _ in range(processes)]
        dist.all_gather(all_codes, back.codes, group=self.group)
        dist.all_gather(all_scales, back.scales, group=self.group)
        self.sent += (processes - 1) * (back.codes.numel() + 4 * back.scales.numel())
        self.plain += 2 * (processes - 1) * 4 * flat.numel() // processes
        dense = torch.cat(all_codes).float() * torch.cat(all_scales)[:, None]
        return dense.flatten()[: flat.numel()].view_as(values)

    def _exchanged(self, parts: Tensor) -> Tensor:
        """Row `i` to process `i`; rows `[processes, ...]` that came for this one."""
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts.contiguous(), group=self.group)
        self.sent += (len(parts) - 1) * parts[0].numel() * parts.element_size()
        return received


def process() -> int:
    """Which process this is; 0 where there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class Exchange:
    """How the processes of one training share a step's windows and add up what they found; one process alone does it
    all.

    Args:
        parameters: what learns, in the same order in all processes.
        int8: send gradients in int8, see `Int8AllReduce`.
    """

    def __init__(self, parameters: list[nn.Parameter], int8: bool = False) -> None:
        self.alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
        self._parameters = parameters
        self._int8 = Int8AllReduce() if int8 and not self.alone else None

    def share(self, windows: list[Tensor]) -> list[Tensor]:
        """Those of this process."""
        return windows if self.alone else windows[dist.get_rank() :: dist.get_world_size()]

    def added(self, loss: float) -> float:
        """Replace gradients by their sum over processes. Returns the sum of their losses."""
        if self.alone:
            return loss
        for key, p in enumerate(self._parameters):
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            if self._int8 is None:
                dist.all_reduce(gradient)
            else:
                mean = self._int8.reduce(gradient.float(), key)
                gradient = (mean * dist.get_world_size()).to(gradient.dtype)
            p.grad = gradient
        total = torch.tensor(loss, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)


class Int8Gradients:
    """Round the gradients of chosen parameters to int8 in blocks of 256, from a step on.

    The relative error is about 0.02 for normal values. Nothing is saved by it while a framework keeps `grad` in its own
    dtype; it shows what training in int8 gradients does.

    Args:
        parameters: whose gradients.
        warmup: steps in which they stay as they are.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], warmup: int = WARMUP) -> None:
        if type(warmup) is not int or warmup < 0:
            raise ValueError(f"warmup={warmup!r} must be an integer of at least 0")
        self.warmup, self.steps = warmup, 0
        self._parameters = list(parameters)

    def advance(self) -> None:
        """Call between backward and the optimizer's step."""
        self.steps += 1
        if self.steps <= self.warmup:
            return
        for p in self._parameters:
            if p.grad is not None:
                p.grad.copy_(Int8Blocks.of(p.grad).dense())
