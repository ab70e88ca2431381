"""The CUDA library absent, unloadable and of another version: what is reported, and that layers still run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from emulated_cuda import make

from hf_gptq_plugin import native_cuda
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.nn.linear import QuantLinear

CPU = torch.device("cpu")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], native_cuda.Status]]:
    """Sets HF_GPTQ_CUDA_LIBRARY and says what becomes of it."""

    def use(name: str) -> native_cuda.Status:
        monkeypatch.setenv("HF_GPTQ_CUDA_LIBRARY", name)
        for cached in (native_cuda._load, native_cuda.problem):
            cached.cache_clear()
        return native_cuda.status()

    yield use
    monkeypatch.undo()
    for cached in (native_cuda._load, native_cuda.problem):
        cached.cache_clear()


def runs() -> bool:
    weight, dense = make(QuantSpec(4, 32), 24, 64)
    x = torch.randn(3, 64)
    return torch.allclose(QuantLinear.from_quantized(weight)(x).double(), x.double() @ dense.T, rtol=1e-5, atol=1e-6)


def test_absent(library: Callable[[str], native_cuda.Status], tmp_path: Path) -> None:
    assert library("none").state == "absent"
    found = library(str(tmp_path / "nothing.so"))
    assert (found.state, found.detail) == ("absent", "no such file")
    assert native_cuda.problem(CPU) == "no such file"
    assert native_cuda.library(CPU) is None
    assert runs()


def test_unloadable(library: Callable[[str], native_cuda.Status], tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF not really")
    assert library(str(broken)).state == "unloadable"
    assert runs()


def test_another_version(library: Callable[[str], native_cuda.Status], tmp_path: Path) -> None:
    source = tmp_path / "other.c"
    source.write_text("int hf_gptq_cuda_abi_version(void) { return 99; }\n")
    other = tmp_path / "other.so"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", other, source], check=True)
    except FileNotFoundError:
        pytest.skip("no C compiler to build a library of another version with")
    found = library(str(other))
    assert found.state == "unloadable" and f"ABI 99, this package needs {native_cuda.ABI_VERSION}" in found.detail
    assert runs()


def test_emulated(library: Callable[[str], native_cuda.Status], emulated_library: Path) -> None:
    found = library(str(emulated_library))
    assert found.state == "loaded" and "cuda=emulated" in found.detail
    assert native_cuda.problem(CPU) is None
    assert native_cuda.problem(torch.device("cuda", 0)) == "the library is not for tensors on cuda"
    assert runs()
