"""One quantized layer against torch's dense product, on the CPU, in one run.

    python benchmarks/cpu_linear.py [--size 4096] [--threads 1] [--bits 4] [--group-size 128] [--dtype float32]

Every result is compared with float64 before it is timed. Prints a table and, with --json FILE, writes the figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hf_gptq_plugin import native
from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.nn import ops

ROWS = (1, 2, 4, 8, 16, 64, 256)


def best_ms(call: Callable[[], object], seconds: float = 0.5) -> float:
    """Least wall time of a call, in milliseconds: what the machine can do when nothing disturbs it."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best * 1e3


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size, dtype = options.size, getattr(torch, options.dtype)
    spec = QuantSpec(options.bits, options.group_size)
    quantized = QuantizedWeight(
        codes=torch.randint(0, spec.maxq + 1, (size, size), dtype=torch.uint8),
        scales=(torch.rand(spec.groups(size), size) * 0.01 + 0.001).half(),
        zeros=torch.full((spec.groups(size), size), 2 ** (spec.bits - 1), dtype=torch.int32),
        group=natural_groups(size, spec.group_size),
        spec=spec,
    )
    tensors = quantized.pack()
    weight = ops.KernelWeight.from_canonical(
        tensors["qweight"], tensors["qzeros"], tensors["scales"], tensors["g_idx"], spec, size
    ).packed()
    dense = quantized.dequantize()
    exact, dense = dense.double(), dense.to(dtype)
    packed_bytes = weight.qweight.numel() * 4 + weight.scales.numel() * 2
    status = native.status()
    print(f"{platform.machine()}, torch {torch.__version__}, {options.threads} thread(s), {status.state} {status.isa}")
    print(f"{size}×{size}, {options.bits} bit, groups of {options.group_size}, {options.dtype}: {' '.join(sys.argv)}")
    print(f"{'M':>5} {'ms':>9} {'dense ms':>9} {'× dense':>8} {'GB/s':>7} {'GFLOP/s':>8} {'error':>8}")
    figures = []
    for rows in ROWS:
        x = torch.randn(rows, size).to(dtype)
        truth = x.double() @ exact.T
        error = float((ops.linear(x, weight).double() - truth).norm() / truth.norm())
        dense_error = float((torch.nn.functional.linear(x, dense).double() - truth).norm() / truth.norm())
        if error > max(2 * dense_error, 1e-5):
            raise SystemExit(f"M={rows}: error {error:.1e} against float64, dense has {dense_error:.1e}")
        ours = best_ms(lambda x=x: ops.linear(x, weight))
        theirs = best_ms(lambda x=x: torch.nn.functional.linear(x, dense))
        rate, work = packed_bytes / ours / 1e6, 2 * rows * size * size / ours / 1e6
        print(f"{rows:5d} {ours:9.3f} {theirs:9.3f} {theirs / ours:8.2f} {rate:7.1f} {work:8.0f} {error:8.1e}")
        figures.append({"M": rows, "ms": ours, "dense_ms": theirs, "error": error})
    if options.json:
        options.json.write_text(json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, "rows": figures}))


if __name__ == "__main__":
    main()
