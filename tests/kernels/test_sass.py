"""What nvcc makes of the kernels on mma.sync: gates that need no GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emulated_cuda import KERNELS

# File, real architecture, tensor core instruction.
CASES = [
    ("linear_half", "sm_80", "HMMA.16816.F32"),
    ("linear_bfloat16", "sm_90a", "HMMA.16816.F32.BF16"),
]


def tool(name: str) -> str:
    """A program of the CUDA toolkit: on PATH, or the one that Triton or PyPI's nvidia packages carry."""
    found = shutil.which(name)
    carriers = (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin"), ("nvidia", "cuda_cuobjdump/bin"))
    for package, folder in carriers:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            candidate = Path(root) / folder / name
            if found is None and candidate.exists():
                found = str(candidate)
    if found is None:
        pytest.skip(f"{name} of the CUDA toolkit is neither on PATH nor installed with Triton or nvidia-cuda-{name}")
    return found


@pytest.mark.parametrize(("source", "architecture", "instruction"), CASES)
def test_machine_code(tmp_path: Path, source: str, architecture: str, instruction: str) -> None:
    nvcc, cuobjdump = tool("nvcc"), tool("cuobjdump")
    cubin = tmp_path / "kernels.cubin"
    number = architecture.removeprefix("sm_")
    done = subprocess.run(
        [nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{number},code={architecture}", "-Xptxas=-v", "-cubin",
         f"-I{KERNELS / 'include'}", f"-I{KERNELS / 'cuda'}", str(KERNELS / "cuda" / f"{source}.cu"), "-o", str(cubin)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills and set(spills) == {("0", "0", "0")}, spills
    sass = subprocess.run([cuobjdump, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels = re.split(r"Function : ", sass)[1:]
    linear = [text for text in kernels if re.match(r"\S*(narrow|wide)_kernel", text)]
    assert len(linear) == len(kernels) == len(spills)
    for text in linear:
        name = text.split()[0]
        assert instruction in text, f"{name} does not use the tensor cores by {instruction}"
        assert "LOP3" in text, name
        assert not re.search(r"\b(LDL|STL)\b", text), f"{name} keeps values in local memory"
        assert re.search(r"LDGSTS\.E\.BYPASS\.\S*128", text), f"{name} does not copy 128 bits at a time"
