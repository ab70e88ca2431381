"""The native library present, absent and unloadable: what works, and what is reported."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

from hf_gptq_plugin import native

# Away from the checkout, whose package has no library: Python looks into the working directory first.
INSTALLED = sys.prefix

PROBE = """
import json, torch, hf_gptq_plugin
from hf_gptq_plugin import native
from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.nn.linear import QuantLinear
torch.manual_seed(0)
spec = QuantSpec(4, 32)
weight = QuantizedWeight(torch.randint(0, 16, (16, 64), dtype=torch.uint8), torch.rand(2, 16).half(),
                         torch.full((2, 16), 8, dtype=torch.int32), natural_groups(64, 32), spec)
x = torch.randn(3, 64)
y = QuantLinear.from_quantized(weight)(x)
truth = x.double() @ weight.dequantize().double().T
error = float((y.double() - truth).norm() / truth.norm())
print(json.dumps({**vars(native.status()), "error": error}))
"""


def probe(**environment: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=INSTALLED,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["error"] < (0.012 if result["activations"] == "int8" else 1e-6)
    return result


def doctor(**environment: str) -> tuple[int, dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "-m", "hf_gptq_cli", "doctor", "--json"],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, cwd=INSTALLED,
    )  # fmt: skip
    report = json.loads(done.stdout)
    return done.returncode, next(row for row in report["checks"] if row["part"] == "native library")


needs_library = pytest.mark.skipif(
    native.library() is None, reason="the package was built without a C++ compiler: nothing to load"
)


@needs_library
def test_present() -> None:
    found = probe()
    core = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    pool = "torch" if hasattr(core, "torch_parallel_for") else "serial"  # torch 2.8 does not export it
    assert (found["state"], found["threads"]) == ("loaded", pool)
    assert found["isa"] in ("amx", "avx512bf16", "avx512f", "avx2", "portable")
    code, row = doctor()
    assert code == 0 and row["state"] == "ok" and str(found["isa"]) in row["detail"]


@needs_library
@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_forced_instruction_set(isa: str) -> None:
    found = probe(HF_GPTQ_ISA=isa)
    if isa == "avx2" and found["isa"] == "portable":
        pytest.skip("this processor has no AVX2")
    assert found["isa"] == isa


@needs_library
def test_unknown_instruction_set_is_reported() -> None:
    found = probe(HF_GPTQ_ISA="quantum")
    assert found["state"] == "loaded" and "quantum" in str(found["detail"])


@needs_library
def test_a_checkout_takes_the_installed_library(tmp_path: Path) -> None:
    """`python -m benchmarks.cpu_kernels` in a checkout imports its source, beside which there is no library."""
    package = Path(native.__file__).parent
    checkout = shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("_native"))
    try:
        installed = distribution("hf-gptq-plugin").locate_file("hf_gptq_plugin/_native/libhf_gptq.so")
    except PackageNotFoundError:
        installed = checkout / "none"
    if not Path(str(installed)).exists():
        pytest.skip("the package is on the path, but not installed")
    found = probe(PYTHONPATH=str(tmp_path))
    assert (found["state"], found["path"]) == ("loaded", str(installed))


def test_absent(tmp_path: Path) -> None:
    assert probe(HF_GPTQ_LIBRARY="none")["state"] == "absent"
    missing = str(tmp_path / "nothing.so")
    found = probe(HF_GPTQ_LIBRARY=missing)
    assert (found["state"], found["path"], found["detail"]) == ("absent", missing, "no such file")
    code, row = doctor(HF_GPTQ_LIBRARY=missing)
    assert code == 0 and row["state"] == "note" and "everything runs through PyTorch" in row["detail"]


def test_unloadable(tmp_path: Path) -> None:
    broken = tmp_path / "libhf_gptq.so"
    broken.write_bytes(b"\x7fELF not really")
    assert probe(HF_GPTQ_LIBRARY=str(broken))["state"] == "unloadable"
    code, row = doctor(HF_GPTQ_LIBRARY=str(broken))
    assert code == 3 and row["state"] == "broken" and str(broken) in row["detail"]


def test_another_library(tmp_path: Path) -> None:
    source = tmp_path / "other.c"
    source.write_text("int hf_gptq_abi_version(void) { return 99; }\n")
    other = tmp_path / "other.so"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", other, source], check=True)
    except FileNotFoundError:
        pytest.skip("no C compiler to build a library of another version with")
    found = probe(HF_GPTQ_LIBRARY=str(other))
    assert found["state"] == "unloadable" and f"ABI 99, this package needs {native.ABI_VERSION}" in str(found["detail"])


@needs_library
def test_activations_of_8_bits_are_asked_for_by_the_environment() -> None:
    assert probe()["activations"] == "exact"
    found = probe(HF_GPTQ_ACTIVATIONS="int8")
    code, row = doctor(HF_GPTQ_ACTIVATIONS="int8")
    assert code == 0
    if found["activations"] == "int8":
        assert "activations rounded to int8" in row["detail"]
    else:
        assert "HF_GPTQ_ACTIVATIONS=int8 cannot be followed: they need AVX-512 with VNNI" in row["detail"]


@needs_library
@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"HF_GPTQ_ACTIVATIONS": "fp4"}, "HF_GPTQ_ACTIVATIONS=fp4 is none of exact, int8"),
        (
            {"HF_GPTQ_ACTIVATIONS": "int8", "HF_GPTQ_ISA": "portable"},
            "HF_GPTQ_ACTIVATIONS=int8 cannot be followed: they need AVX-512 with VNNI; the instruction set in use is "
            "portable",
        ),
        (
            {"HF_GPTQ_ACTIVATIONS": "int8", "HF_GPTQ_LIBRARY": "none"},
            "HF_GPTQ_ACTIVATIONS=int8 cannot be followed: they need the native library",
        ),
    ],
)
def test_activations_that_cannot_be_had_are_reported(environment: dict[str, str], problem: str) -> None:
    found = probe(**environment)
    assert found["activations"] == "exact" and problem in str(found["detail"])
    asked = subprocess.run(
        [sys.executable, "-c", "from hf_gptq_plugin import native; native.set_activations('int8')"],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, cwd=INSTALLED,
    )  # fmt: skip
    if "HF_GPTQ_ISA" in environment or "HF_GPTQ_LIBRARY" in environment:
        assert asked.returncode == 1
        assert f"NativeError: activations 'int8': {problem.split(': ')[1]}" in asked.stderr
