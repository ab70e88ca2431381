"""The CUDA library built for the CPU: the kernels' own source, threads as fibers (`kernels/cuda/emulate`)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from torch import Tensor

from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import QuantSpec

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


def make(
    spec: QuantSpec, out_features: int, in_features: int, order: str = "natural", scales_dtype: torch.dtype = torch.half
) -> tuple[QuantizedWeight, Tensor]:
    """A random weight and what it stands for, in float64."""
    groups = spec.groups(in_features)
    low = spec.zero_offset
    zeros = torch.randint(low, spec.maxq + 1 + low, (groups, out_features), dtype=torch.int32)
    if spec.sym:
        zeros = torch.full_like(zeros, 2 ** (spec.bits - 1))
    group = natural_groups(in_features, spec.group_size)
    if order == "shuffled":
        group = group[torch.randperm(in_features)]
    elif order == "irregular":
        group = torch.randint(0, groups, (in_features,), dtype=torch.int32)
    weight = QuantizedWeight(
        codes=torch.randint(0, spec.maxq + 1, (out_features, in_features), dtype=torch.uint8),
        scales=((torch.rand(groups, out_features) + 0.1) * 0.02 * (1 - 2 * torch.randint(0, 2, ()))).to(scales_dtype),
        zeros=zeros,
        group=group,
        spec=spec,
    )
    dense = (weight.codes.double() - zeros[group.long()].T) * weight.scales[group.long()].T.double()
    return weight, dense
