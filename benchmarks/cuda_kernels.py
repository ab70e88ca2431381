"""Quantized layers on an NVIDIA GPU against float64, then timed beside what else computes them.

    python -m benchmarks.cuda_kernels [--shapes 4096x4096,4096x14336] [--rows 1,16,64,512,4096] [--bits 4] [--json FILE]

Every product is checked first, with fresh random inputs and outputs that held NaN. Times are medians of CUDA graph
replays; a graph walks over copies of the weight that together exceed the L2 cache several times, so that weights come
from memory, as they do in a model. "dense" is cuBLAS; ours are its regimes, "dequant" being dequantize and cuBLAS, and
"*" marks the one that the rules choose; beside them torch's tinygemm (bf16), Humming where humming-kernels is
installed, and Marlin (fp16) where it is given: --marlin takes marlin_cuda_kernel.cu (IST-DASLab/marlin, 2f6d7c1) as a
shared library, built by nvcc -O3 -std=c++17 --expt-relaxed-constexpr -shared -Xcompiler -fPIC
-gencode=arch=compute_90,code=sm_90; on Hopper without the cache hint in cp_async4_stream, an illegal instruction there.
"floor" is the larger of bytes over bandwidth and operations over the matrix rate, both measured in the same run. Needs
the CUDA library: pip install . -C cmake.define.HF_GPTQ_CUDA=ON
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_gptq_plugin import native_cuda
from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.nn import cuda, ops
from hf_gptq_plugin.nn.ops import KernelWeight

REGIMES = {0: "dequant", 1: "narrow", 2: "wide", 3: "hopper"}
NARROW_ROWS, WIDE_ROWS = 4, 256  # the most rows that these regimes are timed with
L2_MULTIPLE = 4  # weights of one graph, in sizes of the L2 cache
MOST_COPIES = 64
MARLIN = "_Z11marlin_cudaPKvS0_PvS1_iiiS1_iiP11CUstream_stiiii"  # marlin_cuda, as C++ names it


def quantized(spec: QuantSpec, out_features: int, in_features: int, device: torch.device) -> QuantizedWeight:
    """A random weight."""
    groups = spec.groups(in_features)
    zeros = torch.randint(1, spec.maxq + 1, (groups, out_features), dtype=torch.int32, device=device)
    return QuantizedWeight(
        codes=torch.randint(0, spec.maxq + 1, (out_features, in_features), dtype=torch.uint8, device=device),
        scales=(torch.rand(groups, out_features, device=device) * 0.01 + 0.001).half(),
        zeros=torch.full_like(zeros, 2 ** (spec.bits - 1)) if spec.sym else zeros,
        group=natural_groups(in_features, spec.group_size, device),
        spec=spec,
    )


def kernel_weight(weight: QuantizedWeight) -> KernelWeight:
    """In the GPU's layout."""
    return KernelWeight.from_canonical(**weight.pack(), spec=weight.spec, in_features=weight.codes.shape[1]).packed()


def relative_error(got: Tensor, truth: Tensor) -> float:
    """‖got − truth‖ / ‖truth‖ in float64; infinity where anything is not finite."""
    error = float((got.double() - truth).norm() / truth.norm())
    return error if error == error else float("inf")


def graph_us(calls: Sequence[Callable[[], object]], replays: int) -> float:
    """Median time of one call, in microseconds, of a graph that makes all of them."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[len(times) // 2]


def ceilings(replays: int) -> tuple[float, float]:
    """Bandwidth in bytes per microsecond (read plus written) and matrix rate in operations per microsecond."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() * 4 / graph_us([lambda: torch.neg(source, out=target)], replays)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return bandwidth, 2 * 8192**3 / graph_us([lambda: a @ b], replays)


def regime_of(kernel: KernelWeight, x: Tensor) -> str:
    """What the library's rules choose."""
    described, keep = cuda._describe(x.shape[-1], *kernel.arguments)
    plan, library = native_cuda.Plan(), native_cuda.library(x.device)
    assert library is not None
    with torch.cuda.device(x.device):
        native_cuda.check(library.hf_gptq_cuda_plan(described, native_cuda.DTYPES[x.dtype], x.shape[0], 1, -1, plan))
    del keep
    return REGIMES[plan.regime]


Peer = tuple[Callable[..., Tensor], tuple[Tensor, ...]]  # call(x, *tensors), and the tensors


def marlin(path: Path, weight: QuantizedWeight, dtype: torch.dtype) -> Peer | None:
    """Marlin on the same codes, from the library at `path`; None where it has no kernel for them."""
    spec, (out_features, in_features) = weight.spec, weight.codes.shape
    fits = (spec.bits, spec.sym, dtype) == (4, True, torch.float16) and spec.group_size in (-1, 128)
    if not fits or out_features % 256 or in_features % 128:
        return None
    multiply = getattr(ctypes.CDLL(str(path)), MARLIN)
    device = weight.codes.device
    # Its words: for 16 inputs, four tiles of 16 outputs at a time; of a tile a lane of the tensor core's operand B has
    # eight codes, those of even inputs in the low half of the word.
    word = torch.arange(out_features * 2, device=device)
    lane, tile = word % 128 // 4, word // 128 * 4 + word % 4
    codes = weight.codes.T.reshape(in_features // 16, 16, out_features)
    packed = torch.zeros(in_features // 16, out_features * 2, dtype=torch.int32, device=device)
    for nibble in range(8):
        element = nibble % 4 * 2 + nibble // 4
        inputs = 2 * (lane % 4) + element % 2 + element % 4 // 2 * 8
        packed |= codes[:, inputs, 16 * tile + lane // 4 + element // 4 * 8].int() << 4 * nibble
    split = (4, 4, 2) if spec.group_size == -1 else (8, 8)
    scales = weight.scales.reshape(-1, *split).transpose(1, 2).reshape(weight.scales.shape).contiguous()

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], out_features)
        codes, scales, locks = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
        failed = multiply(
            ctypes.c_void_p(x.data_ptr()), codes, ctypes.c_void_p(out.data_ptr()), scales, x.shape[0], out_features,
            in_features, locks, spec.group_size, torch.cuda.current_device(),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), -1, -1, -1, 16,
        )  # fmt: skip
        if failed:
            raise SystemExit(f"marlin: error {failed} at M={x.shape[0]} N={out_features} K={in_features}")
        return out

    return call, (packed, scales, torch.zeros(out_features // 128 * 16, dtype=torch.int32, device=device))


def humming(weight: QuantizedWeight, dtype: torch.dtype) -> Peer | None:
    """Humming (humming-kernels 0.1.19) as vLLM calls it, by its own heuristics; None where it is not installed. Kernels
    are compiled at their first call. In bf16 it rounds scales to bf16."""
    spec, (out_features, in_features) = weight.spec, weight.codes.shape
    if spec.bits != 4 or not spec.sym or importlib.util.find_spec("humming") is None:
        return None
    from humming.kernel.humming import HummingKernel
    from humming.ops import launch_kernel
    from humming.schema import BaseWeightSchema, HummingInputSchema
    from humming.transform import prepare_and_transform_humming_tensors
    from humming.tune import get_heuristics_config

    device = torch.device("cuda", torch.cuda.current_device())
    group_size = 0 if spec.group_size in (-1, in_features) else spec.group_size
    schema = BaseWeightSchema.from_config(
        {"quant_method": "humming", "dtype": "int4", "group_size": group_size, "has_zero_point": False}
    )
    tensors = {
        "weight": (weight.codes[:, 0::2] | weight.codes[:, 1::2] << 4).contiguous().view(torch.int32),
        "weight_scale": weight.scales.to(dtype).T.contiguous(),
    }
    schema, tensors = schema.convert_humming(
        tensors=tensors, shape_n_stacks=[out_features], shape_k_stacks=[in_features], param_dtype=dtype
    )
    layer, tensors = prepare_and_transform_humming_tensors(
        tensors=tensors, shape_n=out_features, shape_k=in_features, weight_schema=schema,
        input_schema=HummingInputSchema(), pad_n_to_multiple=256, pad_k_to_multiple=128, has_bias=False,
        torch_dtype=dtype, device=device,
    )  # fmt: skip
    options = {"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "dense"}
    intervals = get_heuristics_config(layer, **options, device=device)  # (low, high, kernel) for low < rows <= high
    locks = torch.zeros(4096, dtype=torch.int32, device=device)

    @functools.cache
    def kernel(rows: int) -> Tensor:
        (chosen,) = (made for low, high, made in intervals if low < rows <= high)
        return HummingKernel.prepare_kernels(layer.to_str(), json.dumps(options), chosen, device)

    def call(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        return launch_kernel(
            configs=kernel(x.shape[0]), inputs=x, weight=weight, weight_scale=scales,
            weight_scale_2=tensors.get("weight_scale_2"), locks=locks,
        )  # fmt: skip

    return call, (tensors["weight"], tensors["weight_scale"])


def tinygemm(weight: QuantizedWeight, dtype: torch.dtype) -> Peer | None:
    """torch's own 4-bit op (bf16, groups of 32 to 256), on the same grid; None where it does not apply."""
    spec = weight.spec
    out_features, in_features = weight.codes.shape
    fits = spec.bits == 4 and dtype is torch.bfloat16 and spec.group_size in (32, 64, 128, 256)
    if not fits or out_features % 8 or in_features % 128:
        return None
    pairs = weight.codes[:, ::2] << 4 | weight.codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
    # It computes (code - 8) * scale + zero.
    zeros = (8 - weight.zeros.float()) * weight.scales.float()
    grid = torch.stack([weight.scales.float(), zeros], dim=-1).bfloat16().contiguous()
    return lambda x, packed, grid: torch.ops.aten._weight_int4pack_mm(x, packed, spec.group_size, grid), (packed, grid)


# Other kernels for the same codes: (weight, dtype) -> what computes it, or None where it cannot.
PEERS: dict[str, Callable[[QuantizedWeight, torch.dtype], Peer | None]] = {
    "tinygemm": tinygemm, "humming": humming,
}  # fmt: skip


def correctness(device: torch.device) -> list[dict[str, Any]]:
    """Every width, grid, order and regime against float64 on ragged sizes; exits at the first mismatch."""
    figures = []
    shapes = ((1, 520, 1040, 48), (3, 4096, 4096, 128), (8, 72, 640, -1), (33, 1000, 1024, 16), (200, 512, 2048, 40))
    for bits in (2, 3, 4, 8):
        for sym in (True, False):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                for rows, out_features, in_features, group_size in (*shapes, (600, 512, 512, 32)):
                    weight = quantized(QuantSpec(bits, group_size, sym), out_features, in_features, device)
                    if rows % 2 == 0:  # act-order
                        weight = QuantizedWeight(
                            weight.codes, weight.scales, weight.zeros,
                            weight.group[torch.randperm(in_features, device=device)], weight.spec,
                        )  # fmt: skip
                    x = torch.randn(rows, in_features, device=device).to(dtype)
                    bias = torch.randn(out_features, device=device).to(dtype)
                    kernel, dense = kernel_weight(weight), weight.dequantize().double()
                    truth = x.double() @ dense.T + bias.double()
                    rounding = relative_error(truth.to(dtype), truth)
                    possible = {
                        "dequant": True, "narrow": rows <= NARROW_ROWS and dtype is not torch.float32,
                        "wide": dtype is not torch.float32,
                        "hopper": dtype is not torch.float32 and torch.cuda.get_device_capability() == (9, 0),
                    }  # fmt: skip
                    calls: dict[str, Callable[[], Tensor]] = {
                        name: functools.partial(cuda.linear, x, bias, *kernel.arguments, regime=number)
                        for number, name in REGIMES.items() if possible[name]
                    }  # fmt: skip
                    for regime, call in calls.items():
                        name = (
                            f"bits={bits} sym={sym} {dtype} M={rows} N={out_features} K={in_features} g={group_size} "
                            f"{regime}"
                        )
                        first = call()
                        error = relative_error(first, truth)
                        limit = 1.1 * rounding + 2e-6 if regime != "dequant" else 4 * rounding + 1e-3
                        if error > limit:
                            wrong = (first.double() - truth).abs()
                            place = divmod(int(wrong.argmax()), out_features)
                            raise SystemExit(f"{name}: error {error:.1e}, limit {limit:.1e}; worst at {place}")
                        if not torch.equal(first, call()):
                            raise SystemExit(f"{name}: two runs differ")
                        figures.append({"case": name, "error": error, "rounding": rounding})
    return figures


def measure(
    spec: QuantSpec, out_features: int, in_features: int, rows: int, dtype: torch.dtype, replays: int,
    bandwidth: float, rate: float,
) -> dict[str, Any]:  # fmt: skip
    """One size: times in microseconds of everything that computes it, right results first."""
    device = torch.device("cuda")
    weight = quantized(spec, out_features, in_features, device)
    kernel = kernel_weight(weight)
    dense = weight.dequantize().to(dtype)
    x = torch.randn(rows, in_features, device=device).to(dtype)
    truth = x.double() @ weight.dequantize().double().T
    weight_bytes = kernel.qweight.numel() * 4 + kernel.scales.numel() * 2
    if kernel.qzeros is not None:
        weight_bytes += kernel.qzeros.numel() * 4
    cache = torch.cuda.get_device_properties(device).L2_cache_size

    def with_grid(*tensors: Tensor) -> KernelWeight:
        return KernelWeight(**{**vars(kernel), **dict(zip(("qweight", "scales", "qzeros"), tensors, strict=False))})

    def in_regime(regime: int) -> Callable[..., Tensor]:
        return lambda x, *tensors: cuda.linear(x, None, *with_grid(*tensors).arguments, regime=regime)

    zeros = () if kernel.qzeros is None else (kernel.qzeros,)
    ours, chosen = (kernel.qweight, kernel.scales, *zeros), regime_of(kernel, x)
    candidates: dict[str, Peer] = {"dense": (torch.nn.functional.linear, (dense,))}
    for regime, name in REGIMES.items():
        timed = {
            "narrow": rows <= NARROW_ROWS, "wide": rows <= WIDE_ROWS, "dequant": True,
            "hopper": torch.cuda.get_device_capability() == (9, 0),
        }  # fmt: skip
        if name == chosen or timed[name]:
            candidates[name] = (in_regime(regime), ours)
    for name, made in PEERS.items():
        if (peer := made(weight, dtype)) is not None:
            candidates[name] = peer
    result: dict[str, Any] = {
        "M": rows, "N": out_features, "K": in_features, "dtype": str(dtype), "bits": spec.bits,
        "group_size": spec.group_size, "regime": chosen,
        "floor_us": max(
            (weight_bytes + 2 * rows * (in_features + out_features)) / bandwidth,
            2 * rows * in_features * out_features / rate,
        ),
    }  # fmt: skip
    copies: dict[tuple[Tensor, ...], list[tuple[Tensor, ...]]] = {}
    for name, (call, tensors) in candidates.items():
        if tensors not in copies:
            size = sum(t.numel() * t.element_size() for t in tensors)
            count = min(MOST_COPIES, max(2, -(-L2_MULTIPLE * cache // size)))
            copies[tensors] = [tuple(t.clone() for t in tensors) for _ in range(count)]
        result[f"{name}_error"] = relative_error(call(x, *tensors), truth)
        if result[f"{name}_error"] > 2e-2:
            raise SystemExit(f"{name}: error {result[f'{name}_error']:.1e} at {result}")
        result[f"{name}_us"] = graph_us([functools.partial(call, x, *t) for t in copies[tensors]], replays)
    gradient = torch.randn(rows, out_features, device=device).to(dtype)

    def backward(*tensors: Tensor) -> Tensor:
        return gradient @ ops.dequantize(with_grid(*tensors), in_features, dtype)

    result["backward_us"] = graph_us([functools.partial(backward, *t) for t in copies[ours]], replays)
    result["dense_backward_us"] = graph_us(
        [functools.partial(torch.matmul, gradient, *t) for t in copies[(dense,)]], replays
    )
    return result


def environment() -> dict[str, str]:
    """What the figures belong to."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split("\n")[0]
    return {
        "gpu": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__,
        "cuda": str(torch.version.cuda), "library": native_cuda.status().detail, "date": date.today().isoformat(),
        "command": "python -m benchmarks.cuda_kernels " + " ".join(sys.argv[1:]),
    }  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="4096x4096,4096x14336,8192x28672", help="KxN, comma separated")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,256,512,1024,4096")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--replays", type=int, default=30)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check-only", action="store_true", help="compare with float64 and time nothing")
    only.add_argument("--no-check", action="store_true", help="compare with float64 only what is timed")
    parser.add_argument("--marlin", type=Path, help="Marlin as a shared library; see above")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("cuda_kernels: there is no CUDA device here (or this torch was built without CUDA)")
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := native_cuda.problem(device)) is not None:
        raise SystemExit(f"cuda_kernels: the CUDA library does not run on {torch.cuda.get_device_name()}: {reason}")
    torch.manual_seed(0)
    # Memory that torch leaves uninitialised holds NaN while results are checked.
    torch.use_deterministic_algorithms(True, warn_only=True)
    checks = [] if options.no_check else correctness(device)
    report: dict[str, Any] = {"environment": environment(), "checks": checks, "rows": []}
    torch.use_deterministic_algorithms(False)
    print(", ".join(f"{k} {v}" for k, v in report["environment"].items()))
    print(f"{len(report['checks'])} products agree with float64 and with themselves")
    if options.marlin:
        PEERS["marlin"] = functools.partial(marlin, options.marlin)
    if not options.check_only:
        bandwidth, rate = ceilings(options.replays)
        report["environment"] |= {"bytes_per_us": bandwidth, "operations_per_us": rate}
        print(f"measured ceilings: {bandwidth / 1e6:.2f} TB/s, {rate / 1e6:.0f} TFLOP/s (bf16)")
        spec = QuantSpec(options.bits, options.group_size, not options.asym)
        names = ("dense", *REGIMES.values(), *PEERS)
        print(f"{'K×N':>12} {'M':>5} {'floor µs':>9} {'% floor':>8}", *(f"{name:>9}" for name in names),
              f"{'dX':>9} {'dense dX':>9}")  # fmt: skip
        for shape in options.shapes.split(","):
            in_features, out_features = (int(part) for part in shape.split("x"))
            for rows in (int(part) for part in options.rows.split(",")):
                row = measure(
                    spec, out_features, in_features, rows, getattr(torch, options.dtype), options.replays,
                    bandwidth, rate,
                )  # fmt: skip
                report["rows"].append(row)
                times = (
                    f"{row[n + '_us']:{8 if n == row['regime'] else 9}.1f}{'*' if n == row['regime'] else ''}"
                    if n + "_us" in row else f"{'-':>9}" for n in names
                )  # fmt: skip
                print(f"{shape:>12} {rows:5d} {row['floor_us']:9.1f} "
                      f"{100 * row['floor_us'] / row[row['regime'] + '_us']:8.0f}", *times,
                      f"{row['backward_us']:9.1f} {row['dense_backward_us']:9.1f}", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
