"""Find, load and describe the native library. It is torch-free and has a C ABI (`kernels/include/hf_gptq.h`).

Absent or unloadable, everything still works through PyTorch; `status()` and `hf-gptq doctor` say so. Three
environment variables: `HF_GPTQ_LIBRARY` names another library file ("none" switches it off), `HF_GPTQ_ISA` forces
one of its instruction sets, `HF_GPTQ_ACTIVATIONS=int8` is `set_activations("int8")` from the start.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI_VERSION = 9
ACTIVATIONS = {"exact": 0, "int8": 1}
_switching = threading.RLock()
_exact_blocks = 0  # that are open, in all threads
_afterwards = "exact"  # what is set when the last of them ends
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class NativeError(RuntimeError):
    """The native library refused a call; the message is the library's own."""


@dataclass(frozen=True)
class Status:
    """What became of the native library.

    Args:
        state: "loaded", "absent" or "unloadable".
        path: the file that was looked for.
        detail: why, or what it was built with.
        isa: the instruction set in use, "" when not loaded.
        threads: "torch" when loops run on torch's own pool, "serial" otherwise.
        activations: "exact", or "int8" where products round them, see `set_activations`.
    """

    state: str
    path: str
    detail: str
    isa: str = ""
    threads: str = "serial"
    activations: str = "exact"


class Weight(Structure):
    """`struct hf_gptq_weight` of the C header: one quantized weight as the kernels see it."""

    _fields_ = (
        ("qweight", c_void_p),
        ("block_stride", c_int64),
        ("row_stride", c_int64),
        ("scales", c_void_p),
        ("qzeros", c_void_p),
        ("g_idx", c_void_p),
        ("perm", c_void_p),
        ("K", c_int64),
        ("N", c_int64),
        ("G", c_int64),
        ("group_size", c_int64),
        ("bits", c_int32),
        ("scale_dtype", c_int32),
        ("zero_offset", c_int32),
        ("reserved", c_int32),
    )


_LOOKUP = CFUNCTYPE(c_void_p, c_char_p)
_SIGNATURES = {
    "hf_gptq_register_torch_op": (_LOOKUP,),
    "hf_gptq_set_activations": (c_int32,),
    "hf_gptq_activations": (),
    "hf_gptq_linear": (POINTER(Weight), c_void_p, c_int32, c_int64, c_int64, c_void_p, c_void_p),
    "hf_gptq_dequantize": (POINTER(Weight), c_void_p, c_int32, c_int64),
    "hf_gptq_linear_transposed": (POINTER(Weight), c_void_p, c_int32, c_int64, c_int64, c_void_p),
    "hf_gptq_repack": (
        c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int32,
    ),
    "hf_gptq_solve": (
        *(c_void_p,) * 7, c_int64, c_int64, c_int64, c_int32, c_int64,
    ),
    "hf_gptq_matmul": (
        c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64, c_int32, c_void_p, c_int64,
        c_int32,
    ),
    "hf_gptq_attention": (*(c_void_p, c_int64, c_int64) * 4, *(c_int64,) * 5, c_float, c_int32),
    "hf_gptq_factorize": (c_void_p, c_int64, c_void_p),
    "hf_gptq_solve_symmetric": (c_void_p, c_void_p, c_int64, c_int64),
    "hf_gptq_descend": (*(c_void_p,) * 7, c_int64, c_int64, c_int64, c_int32, c_int64),
    "hf_gptq_joint_solve": (c_void_p, c_void_p, c_int64, *(c_void_p,) * 5, *(c_int64,) * 4, c_int32),
    "hf_gptq_joint_descend": (c_void_p, c_void_p, c_int64, *(c_void_p,) * 6, *(c_int64,) * 4, c_int32),
    "hf_gptq_scale_search": (
        *(c_void_p,) * 3, c_int64, c_int64, c_int64, c_int32, c_int32, c_void_p, c_int64, c_int32,
        c_void_p, c_void_p, c_int32,
    ),
}  # fmt: skip


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, Status]:
    library, status = _find()
    return library, _with_activations(library, status)


def _find() -> tuple[ctypes.CDLL | None, Status]:
    name = os.environ.get("HF_GPTQ_LIBRARY", "")
    if name == "none":
        return None, Status("absent", "", "switched off by HF_GPTQ_LIBRARY=none")
    path = Path(name) if name else packaged("libhf_gptq.so")
    if not path.exists():
        why = "no such file" if name else "the package was built without a C++ compiler, or is a checkout"
        return None, Status("absent", str(path), why)
    try:
        library = opened(path, "hf_gptq_abi_version", ABI_VERSION, _SIGNATURES)
        for function in ("hf_gptq_build_info", "hf_gptq_cpu_isa", "hf_gptq_cpu_isa_error", "hf_gptq_error_string"):
            getattr(library, function).restype = c_char_p
    except (OSError, AttributeError) as error:
        return None, Status("unloadable", str(path), str(error))
    threads = _share_thread_pool(library)
    detail = library.hf_gptq_build_info().decode()
    problem = library.hf_gptq_cpu_isa_error()
    if problem:
        detail += f"; {problem.decode()}"
    return library, Status("loaded", str(path), detail, library.hf_gptq_cpu_isa().decode(), threads)


def _with_activations(library: ctypes.CDLL | None, status: Status) -> Status:
    """The status after `HF_GPTQ_ACTIVATIONS` has been followed; it says so where it was not."""
    name = os.environ.get("HF_GPTQ_ACTIVATIONS") or "exact"
    if name not in ACTIVATIONS:
        wrong = f"is none of {', '.join(ACTIVATIONS)}"
    elif name == "exact" or (library is not None and library.hf_gptq_set_activations(ACTIVATIONS[name]) == 0):
        return status
    else:
        wrong = f"cannot be followed: {_why_not(library, status)}"
    return replace(status, detail=f"{status.detail}; HF_GPTQ_ACTIVATIONS={name} {wrong}")


def packaged(name: str) -> Path:
    """A library that came with the package: beside it, or, where it is imported from a checkout, whose source has no
    library (`python -m` looks into the working directory first), beside the installed one."""
    beside = Path(__file__).parent / "_native" / name
    if not beside.exists():
        with suppress(PackageNotFoundError):
            installed = Path(str(distribution("hf-gptq-plugin").locate_file(f"hf_gptq_plugin/_native/{name}")))
            if installed.exists():
                return installed
    return beside


def opened(path: Path, version_of: str, needed: int, signatures: Mapping[str, Sequence[Any]]) -> ctypes.CDLL:
    """A library of ours, whose functions know their arguments and return an error code.

    Args:
        path: the file.
        version_of: name of the function that tells its ABI.
        needed: the ABI that this package was written for.
        signatures: types of arguments by function.

    Raises:
        OSError: it cannot be loaded, or has another ABI.
        AttributeError: a function is missing.
    """
    library = ctypes.CDLL(str(path))
    getattr(library, version_of).restype = c_int32
    version = getattr(library, version_of)()
    if version != needed:
        raise OSError(f"it has ABI {version}, this package needs {needed}")
    for function, arguments in signatures.items():
        getattr(library, function).argtypes = arguments
        getattr(library, function).restype = c_int
    return library


def _libtorch() -> ctypes.CDLL | None:
    """The library whose C functions ours uses, if it lies where PyTorch puts it."""
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None


def _share_thread_pool(library: ctypes.CDLL) -> str:
    """Let the library's loops run on torch's own threads, through a C function that libtorch exports."""
    parallel_for = getattr(_libtorch(), "torch_parallel_for", None)
    if parallel_for is None:
        return "serial"
    library.hf_gptq_set_parallel_for.argtypes = (c_void_p,)
    library.hf_gptq_set_parallel_for.restype = None
    library.hf_gptq_set_parallel_for(ctypes.cast(parallel_for, c_void_p))
    return "torch"


def library() -> ctypes.CDLL | None:
    """The loaded library, or None."""
    return _load()[0]


def register_linear() -> bool:
    """Let the library itself be `hf_gptq::linear` on the CPU. To be called once, after the op is defined.

    Returns:
        False without the library, or with a torch older than 2.13: the op is still without an implementation then.
    """
    loaded, libtorch = library(), _libtorch()
    if loaded is None:
        return False

    def address(name: bytes) -> int | None:
        function = getattr(libtorch, name.decode(), None)
        return None if function is None else ctypes.cast(function, c_void_p).value

    return loaded.hf_gptq_register_torch_op(_LOOKUP(address)) == 0


def status() -> Status:
    """Whether the library is loaded, and why not."""
    loaded, found = _load()
    if loaded is None:
        return found
    used = loaded.hf_gptq_activations()
    return replace(found, activations=next(name for name, value in ACTIVATIONS.items() if value == used))


def set_activations(name: str) -> None:
    """What quantized layers on the CPU do with activations, from now on, in this process.

    `"exact"`, the default, takes them as they are. `"int8"` rounds them, in every part of up to 256 that meets one
    scale, to integers of 8 bits times the largest magnitude over 127 ("W4A8"): faster where many rows are computed
    together, as in reading a prompt, at an error of about 0.6 % per product. The backward pass stays exact; tangents
    of forward mode and gradients of gradients are products, and rounded. Calibration computes exactly, whatever is
    set. A row's result still does not depend on the batch or on threads. vLLM's engine is a process of its own:
    `HF_GPTQ_ACTIVATIONS=int8` in the environment reaches it.

    Raises:
        ValueError: another name.
        NativeError: `"int8"` without the native library, or where the instruction set in use is not AVX-512 with VNNI,
            or while a calibration runs.
    """
    global _afterwards
    if name not in ACTIVATIONS:
        raise ValueError(f"activations {name!r}: accepted are {', '.join(map(repr, ACTIVATIONS))}")
    loaded, found = _load()
    with _switching:
        if _exact_blocks:
            if name != "exact":
                raise NativeError(f"activations {name!r}: a calibration is running; set them before or after it")
            _afterwards = name
        elif loaded is not None and loaded.hf_gptq_set_activations(ACTIVATIONS[name]) == 0:
            return
        elif name != "exact":
            raise NativeError(f"activations {name!r}: {_why_not(loaded, found)}")


def _why_not(loaded: ctypes.CDLL | None, found: Status) -> str:
    """Why activations cannot be rounded to 8 bits here."""
    if loaded is None:
        return f"they need the native library ({found.detail})"
    return f"they need AVX-512 with VNNI; the instruction set in use is {found.isa}"


@contextmanager
def exact_activations() -> Iterator[None]:
    """Exact products for the length of a block; of several that overlap in time, in whatever threads, the last one to
    end sets what was set before the first."""
    global _exact_blocks, _afterwards
    with _switching:
        if not _exact_blocks:
            _afterwards = status().activations
            set_activations("exact")
        _exact_blocks += 1
    try:
        yield
    finally:
        with _switching:
            _exact_blocks -= 1
            if not _exact_blocks:
                set_activations(_afterwards)


def check(code: int) -> None:
    """Raise `NativeError` for a nonzero return code."""
    if code:
        loaded = library()
        text = loaded.hf_gptq_error_string(code).decode() if loaded is not None else "no library"
        raise NativeError(f"native kernel: {text} (code {code})")


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's data for a C call; the caller keeps the tensor alive."""
    return None if tensor is None else tensor.data_ptr()
