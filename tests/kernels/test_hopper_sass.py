"""What nvcc makes of the Hopper kernel for sm_90a: no GPU is needed to see it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emulated_cuda import KERNELS

# Type, bits, tokens of a tile, slices of a chunk.
INSTANCES = [("Bfloat16", 4, 128, 4), ("Half", 4, 64, 1), ("Half", 8, 128, 2)]
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232  # what setmaxnreg leaves and grants


def cuobjdump() -> str | None:
    """The disassembler of the toolkit, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, list[str]]]:
    """What the assembler said, and the instructions of each kernel."""
    nvcc, dump = shutil.which("nvcc"), cuobjdump()
    if nvcc is None or dump is None:
        pytest.skip("needs nvcc and cuobjdump on the path (cuobjdump also comes with Triton)")
    folder = tmp_path_factory.mktemp("sass")
    source = folder / "kernels.cu"
    source.write_text(
        '#include "hopper_kernel.h"\nnamespace hf_gptq::hopper {\n'
        + "".join(
            f"template __global__ void linear_kernel<{', '.join(map(str, instance))}>"
            "(const __grid_constant__ TensorMap, const __grid_constant__ Problem);\n"
            for instance in INSTANCES
        )
        + "}\n"
    )
    cubin = folder / "kernels.cubin"
    said = subprocess.run(
        [
            nvcc, "-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-cubin",
            f"-I{KERNELS / 'include'}", f"-I{KERNELS / 'cuda'}", "-o", str(cubin), str(source),
        ],
        check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ).stdout  # fmt: skip
    listing = subprocess.run([dump, "--dump-sass", cubin], check=True, text=True, stdout=subprocess.PIPE).stdout
    kernels = {}
    for part in listing.split("Function : ")[1:]:
        name, text = part.split("\n", 1)
        kernels[name] = re.findall(r"/\*[0-9a-f]{4,5}\*/ +([^;]*);", text)
    return said, kernels


def test_nothing_spills_and_products_are_not_serialized(compiled: tuple[str, dict[str, list[str]]]) -> None:
    said, kernels = compiled
    assert len(kernels) == len(INSTANCES)
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said) == [("0", "0")] * len(INSTANCES)
    assert "warning" not in said.lower()
    assert "serialized" not in said
    for name, instructions in kernels.items():
        assert not [i for i in instructions if re.search(r"\b(LDL|STL)\b", i)], name


@pytest.mark.parametrize("instance", INSTANCES, ids=lambda i: "-".join(map(str, i)))
def test_instructions(compiled: tuple[str, dict[str, list[str]]], instance: tuple[str, int, int, int]) -> None:
    """Each stage is eight products of the warpgroup; copies are the engine's; weights are read 16 bytes at a time."""
    kind, bits, tokens, chunk = instance
    mangled = f"{kind}ELi{bits}ELi{tokens}ELi{chunk}E"
    (instructions,) = (listing for name, listing in compiled[1].items() if mangled in name)

    def count(pattern: str) -> int:
        return sum(bool(re.search(pattern, i)) for i in instructions)

    products = [i for i in instructions if "HGMMA" in i]
    assert len(products) == 8
    shape = f"HGMMA.64x{tokens}x16.F32" + (".BF16" if kind == "Bfloat16" else "")
    assert all(i.startswith(shape + " ") for i in products)
    # A register operand, not two descriptors.
    assert all(re.search(r" R\d+, R\d+, gdesc", i) for i in products)
    # The first product of a chunk does not add, the others do.
    assert sum("RZ, !UPT" in i for i in products) == 8 // chunk
    assert count(r"^UTMALDG\.2D") == 2  # with scales that the engine copies, and with others
    assert count("UBLKCP") >= 1
    assert count(r"^LDS\.128") >= 2 * bits // 4
    assert count(r"HMMA|LDSM") == 0


def test_registers_of_the_roles(compiled: tuple[str, dict[str, list[str]]]) -> None:
    """The producer uses no register that it has given back."""
    for name, instructions in compiled[1].items():
        (give,) = (n for n, i in enumerate(instructions) if "USETMAXREG.DEALLOC" in i)
        (take,) = (n for n, i in enumerate(instructions) if "USETMAXREG.TRY_ALLOC" in i)
        end = max(n for n, i in enumerate(instructions) if "EXIT" in i)
        assert take < give < end, name
        assert f"{CONSUMER_REGISTERS:#x}" in instructions[take], name
        assert f"{PRODUCER_REGISTERS:#x}" in instructions[give], name
        assert highest_register(instructions[give:end]) < PRODUCER_REGISTERS, name
        assert highest_register(instructions[take:give]) < CONSUMER_REGISTERS, name


def highest_register(instructions: list[str]) -> int:
    """The highest number of a register that is named. R24 of a product stands for what follows it too."""
    return max(int(n) for i in instructions for n in re.findall(r"\bR(\d+)", i))
