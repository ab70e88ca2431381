"""The CPU kernels against every baseline on this machine, in one process.

    python -m benchmarks.cpu_kernels [forward] [backward] [packing] [--threads 1] [--shapes 4096x4096 ...] [--json FILE]

On a machine that others use too, `--clock cpu` takes the process's own time on the processor in place of wall time.

Weights are copied until they are larger than the caches and every call takes the next copy. Each result is
compared with float64 before it is timed; a time is the least of many. Baselines that this machine or build does not
have are listed with the reason. Shapes are N×K. `× int8` is how many times as fast the product is with activations
rounded to 8 bits (`native.set_activations`), and the last column its error.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_gptq_plugin import native
from hf_gptq_plugin.format.grid import QuantizedWeight, natural_groups
from hf_gptq_plugin.format.spec import BITS, QuantSpec
from hf_gptq_plugin.nn import ops

ROWS = (1, 4, 8, 16, 64, 256, 1024, 4096)
SHAPES = ("4096x4096", "11008x4096", "4096x11008", "576x1536")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CACHES = 128 << 20  # bytes of copies: four times the largest cache of the machines measured
TRUTH_ROWS = 16  # rows compared with float64
FEW_ROWS = 16
# 7B-shaped: Llama-2-7B's seven matrices of a block, N×K, and its number of blocks.
BLOCK_7B = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)
BLOCKS_7B = 32


@dataclass(frozen=True)
class Case:
    """One way to store a weight."""

    bits: int
    sym: bool = True
    act_order: bool = False
    group_size: int = 128

    def __str__(self) -> str:
        marks = ("" if self.sym else " asym") + (" act-order" if self.act_order else "")
        return f"{self.bits} bit{marks}"


def random_weight(rows: int, columns: int, case: Case) -> QuantizedWeight:
    """A random quantized weight `[rows, columns]`."""
    spec = QuantSpec(case.bits, case.group_size, case.sym, desc_act=case.act_order)
    groups = spec.groups(columns)
    low, high = spec.zero_range
    zeros = torch.full((groups, rows), 2 ** (case.bits - 1), dtype=torch.int32)
    group = natural_groups(columns, case.group_size)
    return QuantizedWeight(
        codes=torch.randint(0, spec.maxq + 1, (rows, columns), dtype=torch.uint8),
        scales=(torch.rand(groups, rows) * 0.01 + 0.001).half(),
        zeros=zeros if case.sym else torch.randint(low, high + 1, (groups, rows), dtype=torch.int32),
        group=group[torch.randperm(columns)].contiguous() if case.act_order else group,
        spec=spec,
    )


def canonical_weight(weight: QuantizedWeight) -> ops.KernelWeight:
    """As a checkpoint has it."""
    return ops.KernelWeight.from_canonical(**weight.pack(), spec=weight.spec, in_features=weight.codes.shape[1])


def kernel_weight(weight: QuantizedWeight) -> ops.KernelWeight:
    """As the ops take it, packed."""
    return canonical_weight(weight).packed()


clock = time.perf_counter  # or process_time, see --clock


def best_us(call: Callable[[int], object], seconds: float, together: int = 1) -> float:
    """Least time of `call(i)`, i counting up, in microseconds; at least 3 calls.

    Args:
        call: what to time.
        seconds: how long.
        together: calls whose mean is taken: over copies of a weight, so that none is lucky to be in a cache.
    """
    call(0)
    best, count, end = float("inf"), 0, clock() + seconds
    while count < 3 or clock() < end:
        start = clock()
        for i in range(together):
            call(count + i)
        best = min(best, (clock() - start) / together)
        count += together
    return best * 1e6


def bandwidth(many: list[ops.KernelWeight]) -> float:
    """Bytes per second at which this machine reads the codes of weights, with the threads that torch uses."""
    words = [w.qweight.flatten()[: w.qweight.numel() // 2 * 2].view(torch.int64) for w in many]
    return words[0].numel() * 8 / best_us(lambda i: words[i % len(words)].sum(), 1.0, len(words)) * 1e6


def copies(tensor_bytes: int) -> int:
    return max(1, -(-CACHES // tensor_bytes))


def torch_int4(weight: QuantizedWeight, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | str:
    """torch's `_weight_int4pack_mm_for_cpu` on the same weight, or why not."""
    spec = weight.spec
    if spec.bits != 4 or bool((weight.group != natural_groups(weight.codes.shape[1], spec.group_size)).any()):
        return "4 bit in natural order only"
    if weight.codes.shape[1] % spec.group_size:
        return "whole groups only"
    if dtype != torch.bfloat16:
        return "vectorised for bf16 only; 30 times slower otherwise"
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
    scales = weight.scales.float()
    zeros = scales * (8 - weight.zeros.float())  # it computes (code - 8) · scale + zero
    both = torch.stack([scales, zeros], -1).to(dtype).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, spec.group_size, both)


def vllm_int4(weight: QuantizedWeight, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | str:
    """vLLM's own CPU GPTQ op on the same weight, or why not."""
    try:
        import vllm._custom_ops as custom
        from vllm.model_executor.kernels.linear.mixed_precision.cpu import _get_isa_hint
    except ImportError as error:
        return f"vLLM cannot be imported ({error})"
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return f"vLLM's build for {torch.backends.cpu.get_cpu_capability()} has no cpu_gemm_wna16"
    spec = weight.spec
    if spec.bits != 4 or not spec.sym or dtype == torch.float32:
        return "4 bit symmetric in bf16 or fp16 only"
    if bool((weight.group != natural_groups(weight.codes.shape[1], spec.group_size)).any()):
        return "natural order only"
    columns = weight.codes.shape[1]
    if columns % spec.group_size:
        return "whole groups only"
    nibbles = weight.codes.T.int().unflatten(1, (-1, 8))
    words = torch.zeros(nibbles.shape[:-1], dtype=torch.int32)
    for i in range(8):
        words |= nibbles[..., i] << (4 * i)
    packed = words.view(columns, -1, 2).permute(1, 0, 2).reshape(-1, columns * 2).contiguous()
    scales = weight.scales.to(dtype)
    hint = _get_isa_hint(dtype)
    return lambda x: custom.cpu_gemm_wna16(x, packed, scales, None, None, 8, hint)


def check(name: str, got: Tensor, truth: Tensor, limit: float) -> float:
    """Relative error of a result against float64; stops the benchmark where it is beyond `limit`."""
    error = float((got.double() - truth).norm() / truth.norm())
    if not error <= limit:
        raise SystemExit(f"{name}: relative error {error:.1e} against float64, accepted is {limit:.1e}")
    return error


def int8_product(
    x: Tensor, packed: ops.KernelWeight, many: list[ops.KernelWeight], truth: Tensor, seconds: float, few: bool
) -> tuple[float, float] | None:
    """Microseconds and error of the product with activations rounded to 8 bits; None where there is no such product."""
    try:
        native.set_activations("int8")
    except native.NativeError:
        return None
    try:
        error = check(f"int8 M={len(x)}", ops.linear(x, packed)[:TRUTH_ROWS], truth, 2e-2)
        us = best_us(lambda i: ops.linear(x, many[i % len(many)]), seconds, len(many) if few else 1)
    finally:
        native.set_activations("exact")
    return us, error


def forward(
    shapes: Iterable[tuple[int, int]], rows: Iterable[int], cases: Iterable[Case], dtypes: Iterable[str], seconds: float
) -> list[dict[str, Any]]:
    """The product: prints one line per combination and returns the figures."""
    native.set_activations("exact")
    heads = ("ISA", "N×K", "weight", "x", "M", "µs", "GB/s", "GFLOP/s", "× read")
    heads += ("× dense", "× fp32", "× torch", "× vLLM", "× int8")
    print(" ".join(f"{h:>10}" for h in heads), f"{'error':>8} {'dense':>8} {'int8':>8}")
    figures, notes = [], {}
    for out_features, in_features in shapes:
        for case in cases:
            weight = random_weight(out_features, in_features, case)
            canonical = canonical_weight(weight)
            packed = canonical.packed()
            size = packed.qweight.numel() * 4 + packed.scales.numel() * packed.scales.element_size()
            size += 0 if packed.qzeros is None else packed.qzeros.numel() * 4
            many = [canonical.packed() for _ in range(copies(size))]
            read = bandwidth(many)
            print(f"the codes of {out_features}×{in_features} {case} are read at {read / 1e9:.1f} GB/s")
            full = weight.dequantize()
            for name in dtypes:
                dtype = DTYPES[name]
                dense = full.to(dtype)
                dense_many = [dense.clone() for _ in range(copies(dense.numel() * dense.element_size()))]
                others = {"torch": torch_int4(weight, dtype), "vllm": vllm_int4(weight, dtype)}
                for m in rows:
                    x = torch.randn(m, in_features).to(dtype)
                    truth = x[:TRUTH_ROWS].double() @ full.double().T
                    dense_error = check("dense", torch.nn.functional.linear(x[:TRUTH_ROWS], dense), truth, 2e-2)
                    error = check(f"M={m} {case} {name}", ops.linear(x, packed)[:TRUTH_ROWS], truth, dense_error * 1.05)
                    few = m <= FEW_ROWS  # with more, a weight is not read but computed with
                    us = best_us(lambda i, x=x, w=many: ops.linear(x, w[i % len(w)]), seconds, len(many) if few else 1)
                    times: dict[str, float] = {
                        "dense": best_us(
                            lambda i, x=x, w=dense_many: torch.nn.functional.linear(x, w[i % len(w)]),
                            seconds,
                            len(dense_many) if few else 1,
                        )
                    }
                    if name != "fp32":
                        wide = x.float()
                        times["fp32"] = best_us(lambda i, x=wide, w=full: torch.nn.functional.linear(x, w), seconds)
                    for label, call in others.items():
                        if isinstance(call, str):
                            notes[f"{label}, {case}, {name}"] = call
                            continue
                        check(f"{label} M={m}", call(x)[:TRUTH_ROWS], truth, 2e-2)
                        times[label] = best_us(lambda i, x=x, call=call: call(x), seconds)
                    int8 = int8_product(x, packed, many, truth, seconds, few)
                    line = {
                        "N": out_features, "K": in_features, "case": str(case), "dtype": name, "M": m,
                        "isa": native.status().isa, "us": us, "GB/s": size / us / 1e3, "bytes": size,
                        "GFLOP/s": 2 * m * out_features * in_features / us / 1e3,
                        "x_read": us / (size / read * 1e6), "error": error, "dense_error": dense_error,
                        "baselines_us": times, "int8_us": int8 and int8[0], "int8_error": int8 and int8[1],
                    }  # fmt: skip
                    figures.append(line)
                    ratios = [
                        f"{times[k] / us:10.2f}" if k in times else f"{'-':>10}"
                        for k in ("dense", "fp32", "torch", "vllm")
                    ]
                    print(
                        f"{line['isa']:>10} {f'{out_features}×{in_features}':>10} {case!s:>10} {name:>10} {m:10d} "
                        f"{us:10.0f} {line['GB/s']:10.1f} {line['GFLOP/s']:10.0f} {line['x_read']:10.2f}",
                        *ratios, f"{us / int8[0]:10.2f}" if int8 else f"{'-':>10}",
                        f"{error:8.1e} {dense_error:8.1e}", f"{int8[1]:8.1e}" if int8 else f"{'-':>8}", flush=True,
                    )  # fmt: skip
    for label, reason in notes.items():
        print(f"no figure for {label}: {reason}")
    slowest = min(figures, key=lambda f: min(f["baselines_us"].values()) / f["us"])
    ratio = min(slowest["baselines_us"].values()) / slowest["us"]
    print(
        f"slowest against its best baseline: {slowest['N']}×{slowest['K']} {slowest['case']} {slowest['dtype']} "
        f"M={slowest['M']}, × {ratio:.2f}"
    )
    return figures


def backward(
    shapes: Iterable[tuple[int, int]], rows: Iterable[int], dtypes: Iterable[str], seconds: float
) -> list[dict[str, Any]]:
    """The gradient by the activations, 4 bit: prints one line per combination and returns the figures."""
    print(
        f"\n{'N×K':>10} {'g':>5} {'M':>5} {'µs':>10} {'GFLOP/s':>8} {'× dense':>8} {'× fp32':>8} "
        f"{'error':>8} {'dense':>8}"
    )
    figures = []
    for out_features, in_features in shapes:
        weight = random_weight(out_features, in_features, Case(4))
        packed, full = kernel_weight(weight), weight.dequantize()
        for name in dtypes:
            dense = full.to(DTYPES[name])
            for m in rows:
                g = torch.randn(m, out_features).to(DTYPES[name])
                truth = g[:TRUTH_ROWS].double() @ full.double()
                dense_error = check("dense", g[:TRUTH_ROWS] @ dense, truth, 2e-2)
                got = ops.linear_transposed(g, packed, in_features)[:TRUTH_ROWS]
                error = check(f"M={m} {name}", got, truth, dense_error * 1.5)
                us = best_us(lambda _i, g=g, w=packed, k=in_features: ops.linear_transposed(g, w, k), seconds)
                theirs = best_us(lambda _i, g=g, w=dense: g @ w, seconds)
                wide = g.float()
                fp32 = best_us(lambda _i, g=wide, w=full: g @ w, seconds)
                work = 2 * m * out_features * in_features
                print(
                    f"{f'{out_features}×{in_features}':>10} {name:>5} {m:5d} {us:10.0f} {work / us / 1e3:8.0f} "
                    f"{theirs / us:8.2f} {fp32 / us:8.2f} {error:8.1e} {dense_error:8.1e}",
                    flush=True,
                )
                figures.append(
                    {
                        "N": out_features, "K": in_features, "dtype": name, "M": m, "us": us, "error": error,
                        "dense_error": dense_error, "baselines_us": {"dense": theirs, "fp32": fp32},
                    }
                )  # fmt: skip
    return figures


def packing() -> list[dict[str, Any]]:
    """From a checkpoint's tensors to the kernels' layout for a 7B-shaped model, block by block."""
    print(f"\n{'weight':>20} {'one block, ms':>14} {'32 blocks, s':>13} {'most extra memory, MB':>22}")
    figures = []
    for case in (Case(4), Case(3), Case(4, act_order=True)):
        taken, extra = 0.0, 0
        for rows, columns in BLOCK_7B:
            weight = random_weight(rows, columns, case)
            canonical = ops.KernelWeight.from_canonical(**weight.pack(), spec=weight.spec, in_features=columns)
            packed = canonical.packed()
            x = torch.randn(1, columns)
            check(str(case), ops.linear(x, packed), x.double() @ weight.dequantize().double().T, 1e-5)
            taken += best_us(lambda _i, w=canonical: w.packed(), 0.3)
            extra = max(extra, packed.qweight.numel() * 4)
        print(f"{case!s:>20} {taken / 1e3:14.1f} {taken * BLOCKS_7B / 1e6:13.2f} {extra / 1e6:22.1f}", flush=True)
        figures.append({"case": str(case), "block_us": taken, "extra_bytes": extra})
    return figures


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help="forward, backward, packing; all by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="N×K, written 4096x11008")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--bits", nargs="+", type=int, default=[4], choices=BITS)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--every-kind", action="store_true", help="asymmetric and act-order too")
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on one figure")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: with one thread only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.clock == "cpu":
        if options.threads != 1:
            parser.error("--clock cpu adds up the time of all threads; it needs --threads 1")
        global clock
        clock = time.process_time
    sections = options.sections or ["forward", "backward", "packing"]
    unknown = set(sections) - {"forward", "backward", "packing"}
    if unknown:
        parser.error(f"unknown section {sorted(unknown)[0]!r}; accepted: forward, backward, packing")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shapes = [(int(n), int(k)) for n, k in (shape.split("x") for shape in options.shapes)]
    kinds = [(True, False), (False, False), (True, True)] if options.every_kind else [(True, False)]
    cases = [Case(bits, sym, act) for bits in options.bits for sym, act in kinds]
    status = native.status()
    print(f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s), "
          f"torch {torch.__version__}, native library: {status.state} {status.isa}")  # fmt: skip
    print("python -m benchmarks.cpu_kernels", *sys.argv[1:])
    results: dict[str, Any] = {"isa": status.isa, "threads": options.threads, "command": sys.argv[1:]}
    with torch.inference_mode():
        if "forward" in sections:
            results["forward"] = forward(shapes, options.rows, cases, options.dtypes, options.seconds)
        if "backward" in sections:
            rows = [m for m in options.rows if m >= 64]
            results["backward"] = backward(shapes, rows, options.dtypes, options.seconds)
        if "packing" in sections:
            results["packing"] = packing()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
