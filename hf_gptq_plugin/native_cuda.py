"""Find, load and describe the CUDA library. It is torch-free and has a C ABI (`kernels/include/hf_gptq_cuda.h`).

Absent, unloadable or without code for a device, layers on that device run through PyTorch; `status()` and
`hf-gptq doctor` say so. `HF_GPTQ_CUDA_LIBRARY` names another library file ("none" switches it off). A library that
was built to emulate a GPU, for tests, takes tensors on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, Structure, c_char_p, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch

from .native import DTYPES, NativeError, opened, packaged

ABI_VERSION = 1
DENSE = 0  # hf_gptq_cuda_regime: dequantize, then a dense product

__all__ = ["DENSE", "DTYPES", "Plan", "Status", "Weight", "check", "library", "problem", "status"]


@dataclass(frozen=True)
class Status:
    """What became of the CUDA library.

    Args:
        state: "loaded", "absent", "unloadable" or "idle" (there is no CUDA device).
        path: the file that was looked for.
        detail: why, or what it was built with.
    """

    state: str
    path: str
    detail: str


class Weight(Structure):
    """`struct hf_gptq_cuda_weight` of the C header."""

    _fields_ = (
        ("tiles", c_void_p),
        ("scales", c_void_p),
        ("qzeros", c_void_p),
        ("perm", c_void_p),
        ("group_map", c_void_p),
        ("N", c_int64),
        ("K", c_int64),
        ("rows", c_int64),
        ("G", c_int64),
        ("group_size", c_int64),
        ("bits", c_int32),
        ("scale_dtype", c_int32),
        ("zero_offset", c_int32),
        ("reserved", c_int32),
    )


class Plan(Structure):
    """`struct hf_gptq_cuda_plan_t` of the C header."""

    _fields_ = (("scratch_bytes", c_int64), ("counters", c_int32), ("regime", c_int32))


_SIGNATURES = {
    "hf_gptq_cuda_check_device": (),
    "hf_gptq_cuda_repack": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int32, c_void_p),
    "hf_gptq_cuda_unpack": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int32, c_void_p),
    "hf_gptq_cuda_plan": (POINTER(Weight), c_int32, c_int64, c_int32, c_int32, POINTER(Plan)),
    "hf_gptq_cuda_linear": (
        POINTER(Weight), c_void_p, c_int32, c_int64, c_int64, c_void_p, c_void_p, c_int32, c_void_p, c_int64,
        c_void_p, c_void_p,
    ),
    "hf_gptq_cuda_dequantize": (POINTER(Weight), c_void_p, c_int32, c_int64, c_void_p),
}  # fmt: skip


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, Status]:
    name = os.environ.get("HF_GPTQ_CUDA_LIBRARY", "")
    if name == "none":
        return None, Status("absent", "", "switched off by HF_GPTQ_CUDA_LIBRARY=none")
    path = Path(name) if name else packaged("libhf_gptq_cuda.so")
    if not path.exists():
        return None, Status(
            "absent",
            str(path),
            "no such file" if name else "the package was built without CUDA: no nvcc, or no GPU in sight",
        )
    if not name and not torch.cuda.is_available():
        return None, Status("idle", str(path), "no CUDA device, or this torch was built without CUDA")
    try:
        library = opened(path, "hf_gptq_cuda_abi_version", ABI_VERSION, _SIGNATURES)
        library.hf_gptq_cuda_tile_words.argtypes = (c_int64, c_int64, c_int32)
        library.hf_gptq_cuda_tile_words.restype = c_int64
        library.hf_gptq_cuda_error_string.argtypes = (c_int,)
        for function in ("hf_gptq_cuda_build_info", "hf_gptq_cuda_error_string", "hf_gptq_cuda_last_error"):
            getattr(library, function).restype = c_char_p
    except (OSError, AttributeError) as error:
        return None, Status("unloadable", str(path), str(error))
    return library, Status("loaded", str(path), library.hf_gptq_cuda_build_info().decode())


def status() -> Status:
    """Whether the library is loaded, and why not."""
    return _load()[1]


@functools.cache
def problem(device: torch.device) -> str | None:
    """Why the library cannot run on `device`, or None where it does. The first call loads its kernels there."""
    loaded, found = _load()
    if loaded is None:
        return found.detail
    emulated = "cuda=emulated" in found.detail
    if device.type != ("cpu" if emulated else "cuda"):
        return f"the library is not for tensors on {device.type}"
    if emulated:
        return None
    with torch.cuda.device(device):
        try:
            check(loaded.hf_gptq_cuda_check_device())
        except NativeError as error:
            return str(error)
    return None


def library(device: torch.device) -> ctypes.CDLL | None:
    """The library, where it runs on `device`."""
    return _load()[0] if problem(device) is None else None


def check(code: int) -> None:
    """Raise `NativeError` for a nonzero return code."""
    loaded = _load()[0]
    if not code or loaded is None:
        return
    text = loaded.hf_gptq_cuda_error_string(code).decode()
    if code in (2, 3):
        text += f": {loaded.hf_gptq_cuda_last_error().decode()}"
    raise NativeError(f"CUDA kernel: {text} (code {code})")
