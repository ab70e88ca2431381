"""The emulated CUDA library, built once, and the package running on it."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import emulated_cuda
import pytest
import torch

from hf_gptq_plugin import native_cuda

Configure = Callable[..., None]


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to build the emulated library with")
    return emulated_cuda.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def emulated(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Configure]:
    """Tensors on the CPU run through the CUDA library; yields what sets the emulator's seed and device.

    Memory that torch leaves uninitialised holds NaN, so that an output or a sum that is never written shows.
    """
    monkeypatch.setenv("HF_GPTQ_CUDA_LIBRARY", str(emulated_library))
    for cached in (native_cuda._load, native_cuda.problem):
        cached.cache_clear()
    configure = ctypes.CDLL(str(emulated_library)).hf_gptq_emulate_configure
    configure.argtypes = (ctypes.c_uint64, *[ctypes.c_int32] * 4)

    def set_emulator(
        seed: int = 0, resident: int = 3, capability: int = 80, shared_bytes: int = 160 * 1024,
        multiprocessors: int = 108,
    ) -> None:  # fmt: skip
        configure(seed, resident, capability, shared_bytes, multiprocessors)

    set_emulator()
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(1000).isnan().all())
    yield set_emulator
    torch.use_deterministic_algorithms(False)
    monkeypatch.undo()
    for cached in (native_cuda._load, native_cuda.problem):
        cached.cache_clear()
