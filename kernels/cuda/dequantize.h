// The dense weight from the tiles: (q - z) * scale in fp32, rounded once.
#ifndef HF_GPTQ_DEQUANTIZE_H_
#define HF_GPTQ_DEQUANTIZE_H_

#include "decode.h"
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
  int64_t out_stride, N, K, rows, k_tiles, runs;
  int group_slices, zero_words, zero_offset, scale_dtype, out_dtype;
  bool in_pieces;  // rows can be written sixteen bytes at a time
};

HF_GPTQ_DEVICE float read_float(const void* from, int64_t index, int dtype) {
  if (dtype == HF_GPTQ_FP32) return static_cast<const float*>(from)[index];
  const uint16_t value = static_cast<const uint16_t*>(from)[index];
  return dtype == HF_GPTQ_FP16 ? to_float(value, Half()) : to_float(value, Bfloat16());
}

struct Float {};

// An output and two of them in a row, rounded.
template <class Out>
struct Element {
  using Type = uint16_t;
  using Pair = uint32_t;
  static __device__ __forceinline__ Pair pair(float low, float high) {
    return pack_floats(low, high, Out());
  }
};

template <>
struct Element<Float> {
  using Type = float;
  struct alignas(8) Pair {
    float low, high;
  };
  static __device__ __forceinline__ Pair pair(float low, float high) { return {low, high}; }
};

struct alignas(16) Piece {
  uint32_t word[4];
};

constexpr int kDequantizeWarps = 4;

// A warp takes a tile. It decodes and scales its fragments, lays the tile out in shared memory and
// writes rows of 64 inputs, sixteen bytes a lane where they lie together.
template <int Bits, class Out>
__global__ void __launch_bounds__(32 * kDequantizeWarps)
    dequantize_kernel(const DequantizeArguments p) {
  using Type = typename Element<Out>::Type;
  using Pair = typename Element<Out>::Pair;
  constexpr int kPerPiece = 16 / sizeof(Type);
  constexpr int kPitch = kTileK + kPerPiece;  // spreads the rows over the banks
  HF_GPTQ_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t k_tile = blockIdx.x, n_tile = blockIdx.y * kDequantizeWarps + warp;
  if (n_tile * kTileN >= p.N) return;
  Type* const rows = reinterpret_cast<Type*>(shared) + warp * kTileN * kPitch;
  const LaneWords<Bits> codes = LaneWords<Bits>::load_once(
      p.tiles + tile_index(n_tile, k_tile, p.k_tiles) * tile_words(Bits), lane);

  float scale[2];
  uint32_t zero[2];
  const int first = static_cast<int>(k_tile) * kSlices;
  int run = first / p.group_slices, left = 0;
#pragma unroll
  for (int slice = 0; slice < kSlices; ++slice) {
    if (left == 0) {
      left = slice == 0 ? p.group_slices - first % p.group_slices : p.group_slices;
      const int inside_run = run < p.runs ? run : static_cast<int>(p.runs) - 1;
      const int64_t group = p.group_map ? p.group_map[inside_run] : inside_run;
      ++run;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t n = n_tile * kTileN + lane / 4 + 8 * half, inside = n < p.N ? n : p.N - 1;
        scale[half] = read_float(p.scales, group * p.N + inside, p.scale_dtype);
        uint32_t value = 1u << (Bits - 1);
        if (p.qzeros) {
          const uint32_t* words = p.qzeros + group * p.zero_words + code_word(inside, Bits);
          const int shift = code_shift(inside, Bits);
          value = load_field<Bits>(words, shift) + p.zero_offset;
        }
        zero[half] = zero_register<Half, Bits>(value);
      }
    }
    --left;
    uint32_t a[4];  // codes minus zeros, exact in fp16
    decode_slice<Half, Bits>(codes, slice, zero[0], zero[1], a);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = to_float(static_cast<uint16_t>(a[i]), Half()) * scale[i % 2];
      const float high = to_float(static_cast<uint16_t>(a[i] >> 16), Half()) * scale[i % 2];
      Type* const at =
          rows + (lane / 4 + i % 2 * 8) * kPitch + slice * kSliceK + lane % 4 * 2 + i / 2 * 8;
      *reinterpret_cast<Pair*>(at) = Element<Out>::pair(low, high);
    }
  }
  __syncwarp();

  Type* const out = static_cast<Type*>(p.out) + n_tile * kTileN * p.out_stride;
  const int64_t outputs = p.N - n_tile * kTileN;
  const int count = outputs < kTileN ? static_cast<int>(outputs) : kTileN;
  if (p.in_pieces && (k_tile + 1) * kTileK <= p.K) {
    constexpr int kPieces = kTileK / kPerPiece;
    for (int i = lane; i < count * kPieces; i += 32) {
      const int row = i / kPieces, column = i % kPieces * kPerPiece;
      *reinterpret_cast<Piece*>(out + row * p.out_stride + k_tile * kTileK + column) =
          *reinterpret_cast<const Piece*>(rows + row * kPitch + column);
    }
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = k_tile * kTileK + lane + 32 * half;
    const int64_t feature = row >= p.rows ? -1 : p.perm ? p.perm[row] : row;
    if (feature < 0 || feature >= p.K) continue;
    for (int i = 0; i < count; ++i) {
      out[i * p.out_stride + feature] = rows[i * kPitch + lane + 32 * half];
    }
  }
}

template <int Bits, class Out>
static cudaError_t launch_dequantize_to(const DequantizeArguments& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.k_tiles),
                  static_cast<unsigned>(ceil_div(ceil_div(p.N, kTileN), kDequantizeWarps)));
  constexpr int kElement = sizeof(typename Element<Out>::Type);
  return hf_gptq_launch(dequantize_kernel<Bits, Out>, grid, dim3(32 * kDequantizeWarps),
                        kDequantizeWarps * kTileN * (kTileK * kElement + 16), stream, p);
}

template <int Bits>
static cudaError_t launch_dequantize(DequantizeArguments p, cudaStream_t stream) {
  const int element = p.out_dtype == HF_GPTQ_FP32 ? 4 : 2;
  p.in_pieces =
      !p.perm && reinterpret_cast<uintptr_t>(p.out) % 16 == 0 && p.out_stride * element % 16 == 0;
  switch (p.out_dtype) {
    case HF_GPTQ_FP32:
      return launch_dequantize_to<Bits, Float>(p, stream);
    case HF_GPTQ_FP16:
      return launch_dequantize_to<Bits, Half>(p, stream);
    default:
      return launch_dequantize_to<Bits, Bfloat16>(p, stream);
  }
}

// Loads all of them onto the current device.
template <int Bits>
static cudaError_t load_dequantize() {
  const void* const kernels[] = {reinterpret_cast<const void*>(dequantize_kernel<Bits, Float>),
                                 reinterpret_cast<const void*>(dequantize_kernel<Bits, Half>),
                                 reinterpret_cast<const void*>(dequantize_kernel<Bits, Bfloat16>)};
  for (const void* kernel : kernels) {
    const cudaError_t error = hf_gptq_load(kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace hf_gptq

#endif  // HF_GPTQ_DEQUANTIZE_H_
