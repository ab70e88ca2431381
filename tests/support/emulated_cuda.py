"""The CUDA library built for the CPU: the kernels' own source, threads as fibers (`kernels/cuda/emulate`)."""

from __future__ import annotations

import subprocess
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"
FLAGS = (
    "-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-DHF_GPTQ_EMULATE", "-Wall", "-Wextra", "-Werror",
    "-Wno-clobbered", "-Wno-unknown-pragmas", f"-I{KERNELS / 'include'}", f"-I{KERNELS / 'cuda'}",
)  # fmt: skip


def build(folder: Path, *flags: str) -> Path:
    """Compile the emulated library into `folder`; two files at a time."""
    sources = [*sorted((KERNELS / "cuda").glob("*.cu")), *sorted((KERNELS / "cuda" / "emulate").glob("*.cpp"))]
    objects = [folder / f"{source.stem}.o" for source in sources]
    waiting = [
        ["g++", "-x", "c++", *FLAGS, *flags, "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < 2:
            running.append(subprocess.Popen(waiting.pop(0)))
        if running.pop(0).wait():
            raise RuntimeError("the emulated library does not compile")
    library = folder / "libhf_gptq_cuda_emulated.so"
    subprocess.run(["g++", "-shared", *flags, "-o", library, *objects], check=True)
    return library
