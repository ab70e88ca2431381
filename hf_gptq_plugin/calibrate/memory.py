"""What a process holds in memory beside the tensors that are in use."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor, nn

from .journal import named_errors

_LARGE = 1 << 20  # bytes from which a parameter is worth a file, or a tensor a mapping of its own
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
_USUAL_THRESHOLD = 32 << 20  # up to which glibc raises the first by itself, and the second to twice as much


def give_back() -> None:
    """Return freed memory to the system, where the C library is glibc."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """While the context lasts, large tensors' memory goes back to the system as soon as it is free. Usually glibc keeps
    much of it, in pieces that the next block's matrices do not fit into. Afterwards its thresholds stay at the highest
    that it would have found by itself."""
    library = _glibc()
    if library is None:
        yield
        return
    library.malloc_trim(0)
    library.mallopt(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _USUAL_THRESHOLD)
        library.mallopt(_TRIM_THRESHOLD, 2 * _USUAL_THRESHOLD)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None


def map_parameters(model: nn.Module, folder: Path) -> None:
    """Keep a model's large parameters that are in the CPU's memory (embeddings, where blocks are on disk) in files
    instead, mapped: they are read where and when they are used. The files have no names, and go with the parameters.

    Args:
        model: what is changed.
        folder: where there is room.

    Raises:
        JournalError: the folder cannot be written.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.nbytes >= _LARGE:
            parameter.data = _mapped(parameter.detach(), folder)


def _mapped(value: Tensor, folder: Path) -> Tensor:
    with named_errors(folder), TemporaryFile(dir=folder) as file:
        file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        array = np.memmap(file, np.uint8, mode="c", shape=value.nbytes)  # what is written to it stays in memory
    return torch.from_numpy(array).view(value.dtype).view(value.shape)
