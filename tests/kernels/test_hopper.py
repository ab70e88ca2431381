"""The Hopper kernel against float64, and that its emulator finds the mistakes that such kernels die of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulated_cuda import KERNELS
from hopper import Problem, load, start_build

from hf_gptq_plugin.format.grid import QuantizedWeight
from hf_gptq_plugin.format.spec import QuantSpec
from hf_gptq_plugin.nn import cuda
from hf_gptq_plugin.nn.ops import KernelWeight

EVERY = """
#include "hopper_half.cu"
#include "hopper_bfloat16.cu"
EXPORT int run(const hf_gptq::LinearArguments* p, int dtype, uint64_t seed, int multiprocessors, char* message) {
  return emulated(*p, seed, multiprocessors, message, [=](const auto& q, const auto& device) {
    return dtype == 1 ? launch_hopper_half(q, device, nullptr) : launch_hopper_bfloat16(q, device, nullptr);
  });
}
"""

# Each is a change of one place of hopper_kernel.h, and what the complaint says; "wrong": the numbers or any complaint.
MISTAKES = {
    "none": ("", "", ""),
    "operand overwritten while in use": (
        "a[i % kOperands]);\n    wgmma_fence();\n    wgmma(part, a[i % kOperands],",
        "a[0]);\n    wgmma_fence();\n    wgmma(part, a[0],", "wrong",
    ),
    "sum read before the products are done": ("  wgmma_wait<0>();\n", "", "wrong"),
    "no fence after the registers were written": ("wgmma_fence();", "", "wgmma_fence"),
    "stride of the descriptor": ("uint64_t(1024 >> 4) << 32", "uint64_t(512 >> 4) << 32", "wrong"),
    "step of the descriptor along k": ("b + i * (kSliceK * 2 >> 4)", "b + i * (kSliceK >> 4)", "wrong"),
    "stages not aligned to the swizzle": ("(window + 1023) / 1024 * 1024 - window", "window % 16 + 80", "descriptor"),
    "one consumer frees a stage for both": ("kConsumers * 4);\n    }", "4);\n    }", "wrong"),
    "wrong parity where scales are copied in bulk": (
        "if (BulkGrid) mbarrier_wait(empty + 8 * turn.stage, turn.parity ^ 1)",
        "if (BulkGrid) mbarrier_wait(empty + 8 * turn.stage, turn.parity)", "deadlock",
    ),
    "scales not announced": ("BulkGrid && warp == 1 ? S::kChunks", "BulkGrid && warp == 4 ? S::kChunks", "wrong"),
    "not all producers are waited for": ("stage, kProducers);", "stage, kProducers - 1);", "wrong"),
    "wrong parity": (
        "turn.parity ^ 1);\n        unsigned char", "turn.parity);\n        unsigned char", "deadlock",
    ),
    "fewer bytes than announced": ("(done, bytes);", "(done, bytes + 16);", "deadlock"),
    "outputs stored before all are there": ("  named_barrier(1 + consumer, 128);\n  const", "  const", "wrong"),
    "splits read before they are there": ("    mbarrier_wait_cluster(join.ready, join.parity);\n", "", "wrong"),
    "splits overwritten before they are read": (
        "    mbarrier_wait_cluster(join.read, join.parity ^ 1);\n#pragma", "#pragma", "wrong",
    ),
    "a block ends while others read": (
        "  if (problem.p.chunks > 1) mbarrier_wait_cluster(join.read, join.parity ^ 1);\n", "", "no longer",
    ),
}  # fmt: skip


def mistaken_source() -> str:
    """A driver with one namespace per mistake."""
    kernel = (KERNELS / "cuda" / "hopper_kernel.h").read_text()
    text = (
        '#include <math.h>\n#include "decode.h"\n#include "hf_gptq.h"\n#include "hopper_ptx.h"\n#include "linear.h"\n'
    )
    body = kernel[kernel.index("namespace hf_gptq {") : kernel.index("#endif  // HF_GPTQ_HOPPER_KERNEL_H_")]
    for number, (old, new, _) in enumerate(MISTAKES.values()):
        assert old in body
        text += (
            body.replace(old, new, 1)
            .replace("namespace hopper {", f"namespace mistake{number} {{\nusing namespace hopper;")
            .replace("}  // namespace hopper", "}")
        )
        text += f"""
EXPORT int run{number}(const hf_gptq::LinearArguments* p, int, uint64_t seed, int multiprocessors, char* message) {{
  using namespace hf_gptq;
  return emulated(*p, seed, multiprocessors, message, [](const auto& q, const auto&) -> int {{
    hopper::TensorMap x;
    if (hopper::make_tensor_map(&x, q.x, q.x_columns, q.M, q.x_stride, 64, Half())) return 1;
    const bool bulk_grid = q.N * 2 % 16 == 0 && q.zero_words % 4 == 0;
    const mistake{number}::Problem problem{{q, (q.M + 63) / 64, (q.N + 255) / 256, bulk_grid}};
    return hopper::launch_clusters(mistake{number}::linear_kernel<Half, 4, 64, 4>, q.chunks, dim3(q.chunks),
                                   dim3(384), mistake{number}::Shared<4, 64, 4>::kBytes, nullptr, x, problem);
  }});
}}
"""
    return text


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("hopper")
    every, mistakes = folder / "every.so", folder / "mistakes.so"
    running = [start_build(EVERY, every), start_build(mistaken_source(), mistakes)]
    assert [process.wait() for process in running] == [0, 0]
    return every, mistakes


HALF, BF16 = torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    "problem",
    [
        Problem(64, 256, 128, 128),
        Problem(64, 544, 256, 64),
        Problem(40, 520, 256, 16, dtype=BF16, scale_dtype=torch.float32),
        Problem(40, 288, 256, 32, bits=3),
        Problem(1, 64, 64, 64, dtype=BF16, scale_dtype=BF16),
        Problem(33, 77, 200, 32),
        Problem(130, 520, 330, 16, dtype=BF16, scale_dtype=BF16),
        Problem(70, 130, 200, 48, scale_dtype=torch.float32, group_map=True),
        Problem(65, 258, 320, 64, dtype=BF16, scale_dtype=torch.float32, symmetric=True, bias=False),
        Problem(200, 70, 136, 10**6, padding=8),
        Problem(70, 90, 256, 64, bits=8, dtype=BF16, scale_dtype=BF16),
        Problem(20, 264, 200, 32, bits=8),
        Problem(70, 90, 200, 16, bits=3, group_map=True),
        Problem(130, 90, 128, 128, bits=3, dtype=BF16),
        Problem(40, 300, 256, 64, bits=2, dtype=BF16, padding=16),
        Problem(66, 90, 70, 32, bits=2),
        Problem(100, 300, 512, 128, chunks=2),
        Problem(130, 40, 520, 64, chunks=8, dtype=BF16),
    ],
    ids=lambda p: f"{p.M}x{p.N}x{p.K}-g{p.group_size}-{p.bits}bit-{p.chunks}",
)
def test_matches_float64(built: tuple[Path, Path], problem: Problem) -> None:
    y, message = problem.run(load(built[0]).run, seed=problem.M)
    assert message == ""
    assert not problem.wrong(y).any()


def test_bits_depend_neither_on_the_schedule_nor_on_other_rows(built: tuple[Path, Path]) -> None:
    """Order of threads, copies and blocks, number of blocks, width of the token tile: 64 at M = 20, 128 at M = 140."""
    run = load(built[0]).run
    expected, _ = Problem(140, 300, 320, 64, chunks=4).run(run)
    for seed, multiprocessors in ((1, 1), (5, 5), (11, 40)):
        y, message = Problem(140, 300, 320, 64, chunks=4).run(run, seed, multiprocessors)
        assert message == ""
        assert torch.equal(y, expected)
    few, _ = Problem(20, 300, 320, 64, chunks=4).run(run)
    assert torch.equal(few, expected[:20])


@pytest.mark.parametrize("order", ["natural", "shuffled", "irregular"])
@pytest.mark.parametrize("rows", [5, 70])
def test_through_the_op(emulated: Callable[..., None], order: str, rows: int) -> None:
    """The plan, the gathering of x and the kernel, with groups in any order, chunks and x at an odd address."""
    emulated(seed=rows, capability=90, shared_bytes=227 * 1024)
    out_features, in_features = 88, 512
    spec = QuantSpec(4, 64, False)
    group = torch.arange(in_features, dtype=torch.int32) // 64
    if order == "shuffled":
        group = group[torch.randperm(in_features)]
    elif order == "irregular":
        group = torch.randint(0, 8, (in_features,), dtype=torch.int32)
    zeros = torch.randint(1, 17, (8, out_features), dtype=torch.int32)
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8)
    scales = (torch.rand(8, out_features) / 64 + 0.01).half()
    weight = QuantizedWeight(codes=codes, scales=scales, zeros=zeros, group=group, spec=spec)
    kernel = KernelWeight.from_canonical(**weight.pack(), spec=spec, in_features=in_features).packed()
    dense = (codes.double() - zeros[group.long()].T) * scales.double()[group.long()].T
    x, bias = torch.randn(rows, in_features + 1).half()[:, 1:], torch.randn(out_features).half()
    y = cuda.linear(x, bias, *kernel.arguments, regime=3)
    exact = x.double() @ dense.T + bias.double()
    assert bool(((y.double() - exact).abs() <= 2**-11 * exact.abs() + 1e-4).all())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_emulator_finds_mistakes(built: tuple[Path, Path], mistake: str) -> None:
    """One tile with more stages of K than the ring has, then many small tiles."""
    run = getattr(load(built[1]), f"run{list(MISTAKES).index(mistake)}")
    expected = MISTAKES[mistake][2]
    found = set()
    # Scales of the first two begin at multiples of 16 bytes, and are the copy engine's work.
    for problem in (
        Problem(60, 160, 832, 64), Problem(300, 160, 128, 64, chunks=2), Problem(60, 140, 832, 64),
        Problem(300, 140, 128, 64, chunks=2),
    ):  # fmt: skip
        for seed in range(2):
            y, message = problem.run(run, seed, multiprocessors=1)
            if message:
                found.add(message)
            elif problem.wrong(y).any():
                found.add("wrong")
        if found and expected:
            break
    if expected == "wrong":
        assert found
    else:
        assert any(expected in message for message in found) if expected else not found, found
