"""Several processes that calibrate one model together (torchrun, accelerate launch): each reads a share of the text."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm


def join() -> None:
    """Join the other processes, where a launcher has started several; harmless to repeat. On GPUs each takes its own,
    or shares one where fewer are in sight, which all machines must have as many of; models on the CPU are shared there,
    too."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available() and not dist.is_initialized():
        gpus = torch.cuda.device_count()
        if gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % gpus)
        # NCCL takes one process per GPU.
        crowded = gpus < int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        dist.init_process_group("gloo" if crowded else "cpu:gloo,cuda:nccl")


def own_device(name: str) -> str:
    """A device by its name, "cuda" being the GPU that `join` gave this process. Transformers takes that of its number,
    which there may not be."""
    return f"cuda:{torch.cuda.current_device()}" if name == "cuda" and torch.cuda.is_available() else name


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is; 0 for the only one."""
    return dist.get_rank() if count() > 1 else 0


def wait() -> None:
    """Until all processes have come here."""
    if count() > 1:
        dist.barrier()


def progress(total: int, title: str, unit: str, leave: bool = True) -> Any:
    """A progress bar, which the first process shows; TQDM_DISABLE hides it there, too.

    Args:
        total: how many units there are.
        title: what is done.
        unit: what is counted.
        leave: False removes it when it is done.
    """
    quiet = {"disable": True} if rank() else {}
    return tqdm(total=total, desc=title, unit=unit, smoothing=0.05, leave=leave, **quiet)


def share(windows: list[Tensor]) -> list[Tensor]:
    """This process's windows. Every process gets as many; a remainder is left out.

    Raises:
        ValueError: fewer windows than processes.
    """
    processes = count()
    if len(windows) < processes:
        raise ValueError(f"{len(windows)} calibration windows are too few for {processes} processes; use more samples")
    return windows[rank() : len(windows) - len(windows) % processes : processes]


def sum_in_place(tensor: Tensor) -> Tensor:
    """The sum over all processes, the same bits in each."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_of(number: int) -> int:
    """The sum over all processes of an integer."""
    return number if count() == 1 else int(sum_in_place(torch.tensor([number], dtype=torch.int64, device=device())))


def device() -> str:
    """Where tensors that are to be summed must lie."""
    return "cuda" if count() > 1 and "cpu:" not in dist.get_backend_config() else "cpu"
