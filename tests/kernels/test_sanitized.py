"""The kernels under the address and undefined-behaviour sanitizers, on buffers that end where their tensors end."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from emulated_cuda import KERNELS

DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>

#include "narrow.h"
#include "wide.h"

using namespace hf_gptq;

// One product of random codes; nobody looks at the result.
template <int Bits, class T, int MT>
int run(int M, int N, int K, int group_size, int scale_dtype) {
  const int groups = (K + group_size - 1) / group_size, chunks = chunk_count(N, K);
  const int64_t zero_words = packed_words(N, Bits), tile_count = packed_tile_words(N, K, Bits);
  const size_t scale_bytes = size_t(groups) * N * (scale_dtype == HF_GPTQ_FP32 ? 4 : 2);
  LinearArguments p = {};
  uint32_t* tiles = static_cast<uint32_t*>(malloc(tile_count * 4));
  for (int64_t i = 0; i < tile_count; ++i) tiles[i] = uint32_t(rand());
  void* const buffers[] = {tiles,
                           calloc(M * K, 2),
                           calloc(scale_bytes, 1),
                           calloc(groups * zero_words, 4),
                           calloc(N, 2),
                           calloc(M * N, 2),
                           calloc(wide_partials(M, N, chunks) + 1, 4),
                           calloc(wide_blocks(M, N), 4)};
  p.tiles = tiles;
  p.x = static_cast<const uint16_t*>(buffers[1]);
  p.scales = buffers[2];
  p.qzeros = static_cast<const uint32_t*>(buffers[3]);
  p.bias = static_cast<const uint16_t*>(buffers[4]);
  p.y = static_cast<uint16_t*>(buffers[5]);
  p.partials = static_cast<float*>(buffers[6]);
  p.counters = static_cast<int32_t*>(buffers[7]);
  p.x_stride = p.x_columns = K;
  p.M = M;
  p.N = N;
  p.k_tiles = int(k_tile_count(K)) + MORE_TILES;
  p.G = p.runs = groups;
  p.group_slices = group_size / kSliceK;
  p.zero_words = int(zero_words);
  p.zero_offset = 1;
  p.scale_dtype = scale_dtype;
  p.bits = Bits;
  p.chunks = chunks;
  const Device device{80, 10, 160 * 1024};
  const cudaError_t error = M <= kNarrowRows ? launch_narrow<T, Bits>(p, device, nullptr)
                                             : launch_wide_tokens<T, Bits, MT>(p, device, nullptr);
  if (error) fprintf(stderr, "%s\n", emulate::error.c_str());
  for (void* buffer : buffers) free(buffer);
  return error;
}

int main() {
  return run<4, Half, 1>(1, 33, 208, 16, HF_GPTQ_FP16) | run<3, Half, 1>(3, 72, 320, 32, HF_GPTQ_BF16) |
         run<4, Half, 2>(13, 40, 264, 48, HF_GPTQ_FP32) | run<3, Half, 2>(9, 272, 520, 128, HF_GPTQ_FP16) |
         run<8, Bfloat16, 2>(16, 24, 72, 32, HF_GPTQ_BF16) | run<2, Half, 1>(2, 20, 136, 64, HF_GPTQ_FP16);
}
"""


def run(folder: Path, more_tiles: int) -> subprocess.CompletedProcess[str]:
    source, program = folder / "driver.cpp", folder / "driver"
    source.write_text(DRIVER)
    subprocess.run(
        ["g++", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-std=c++17", "-O0", "-g1",
         "-DHF_GPTQ_EMULATE", f"-DMORE_TILES={more_tiles}", "-Wno-unknown-pragmas",
         f"-I{KERNELS / 'include'}", f"-I{KERNELS / 'cuda'}", str(source), "-o", str(program)],
        check=True,
    )  # fmt: skip
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    return subprocess.run([program], capture_output=True, text=True, env=environment)


def test_no_access_out_of_bounds(tmp_path: Path) -> None:
    done = run(tmp_path, 0)
    assert done.returncode == 0 and "ERROR" not in done.stderr, done.stderr


def test_the_sanitizer_sees_the_kernels_accesses(tmp_path: Path) -> None:
    """One tile more along K than there is: the codes are read beyond their end."""
    done = run(tmp_path, 1)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr
