// The dense weight from the tiles: (q - z) * scale in fp32, rounded once.
#ifndef HF_GPTQ_DEQUANTIZE_H_
#define HF_GPTQ_DEQUANTIZE_H_

#include "fragments.h"
#include "hf_gptq.h"
#include "launch.h"

namespace hf_gptq {

struct DequantizeArguments {
  const uint32_t* tiles;
  const void* scales;
  const uint32_t* qzeros;
  const int32_t* perm;       // [rows] input of each row, -1: none; NULL
  const int32_t* group_map;  // [runs] or NULL
  void* out;                 // [N, K], rows out_stride apart
  int64_t out_stride, N, K, rows, k_tiles, G, runs;
  int group_slices, zero_words, zero_offset, scale_dtype, bits, out_dtype;
};

HF_GPTQ_DEVICE float read_float(const void* from, int64_t index, int dtype) {
  if (dtype == HF_GPTQ_FP32) return static_cast<const float*>(from)[index];
  const uint16_t value = static_cast<const uint16_t*>(from)[index];
  return dtype == HF_GPTQ_FP16 ? to_float(value, Half()) : to_float(value, Bfloat16());
}

HF_GPTQ_DEVICE void write_float(void* to, int64_t index, float value, int dtype) {
  if (dtype == HF_GPTQ_FP32) {
    static_cast<float*>(to)[index] = value;
  } else {
    static_cast<uint16_t*>(to)[index] =
        dtype == HF_GPTQ_FP16 ? from_float(value, Half()) : from_float(value, Bfloat16());
  }
}

constexpr int kDequantizeWarps = 4;

// A warp takes a tile. It decodes its fragments into shared memory, as codes minus zeros, then
// scales and writes rows of 64 inputs.
template <int Bits>
__global__ void __launch_bounds__(32 * kDequantizeWarps)
    dequantize_kernel(const DequantizeArguments p) {
  HF_GPTQ_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t k_tile = blockIdx.x, n_tile = blockIdx.y * kDequantizeWarps + warp;
  if (n_tile * kTileN >= p.N) return;
  constexpr int kPitch = kTileK + 2;  // spreads the rows over the banks
  uint16_t* codes = reinterpret_cast<uint16_t*>(shared) + warp * kTileN * kPitch;
  const uint32_t* tile = p.tiles + tile_index(n_tile, k_tile, p.k_tiles) * tile_words(Bits);
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
      const FragmentPlace place{lane, slice, element};
      codes[fragment_n(place) * kPitch + fragment_k(place)] =
          static_cast<uint16_t>(read_code(tile, place, Bits));
    }
  }
  __syncwarp();
  int64_t feature[2];
  int64_t group[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = k_tile * kTileK + lane + 32 * half;
    feature[half] = row >= p.rows ? -1 : p.perm ? p.perm[row] : row;
    if (feature[half] >= p.K) feature[half] = -1;
    int64_t run = row / kSliceK / p.group_slices;
    run = run < p.runs ? run : p.runs - 1;
    group[half] = p.group_map ? p.group_map[run] : run;
  }
  for (int i = 0; i < kTileN; ++i) {
    const int64_t n = n_tile * kTileN + i;
    if (n >= p.N) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (feature[half] < 0) continue;
      int zero = 1 << (Bits - 1);
      if (p.qzeros) {
        const uint32_t* words = p.qzeros + group[half] * p.zero_words;
        const int64_t word = code_word(n, Bits);
        const int shift = code_shift(n, Bits);
        uint32_t field = words[word] >> shift;
        if (shift + Bits > 32) field |= words[word + 1] << (32 - shift);
        zero = static_cast<int>(field & ((1u << Bits) - 1u)) + p.zero_offset;
      }
      const int code = codes[i * kPitch + lane + 32 * half];
      const float scale = read_float(p.scales, group[half] * p.N + n, p.scale_dtype);
      write_float(p.out, n * p.out_stride + feature[half], static_cast<float>(code - zero) * scale,
                  p.out_dtype);
    }
  }
}

template <int Bits>
static cudaError_t launch_dequantize(const DequantizeArguments& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.k_tiles),
                  static_cast<unsigned>(ceil_div(ceil_div(p.N, kTileN), kDequantizeWarps)));
  return hf_gptq_launch(dequantize_kernel<Bits>, grid, dim3(32 * kDequantizeWarps),
                        kDequantizeWarps * kTileN * (kTileK + 2) * 2, stream, p);
}

}  // namespace hf_gptq

#endif  // HF_GPTQ_DEQUANTIZE_H_
