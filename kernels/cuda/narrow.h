// The kernel for very few rows.
//
// A block of eight warps takes 8 / chunks tiles of 16 outputs; each warp one tile and one chunk of
// K. Warps share nothing until the end, so that each runs its own pipeline without a barrier:
//
//            chunk 0   chunk 1   ..        K ->
//   tile 0  | warp 0 | warp 1 | .. |   sums through shared memory, chunk 0 first
//   tile 1  | ..
#ifndef HF_GPTQ_NARROW_H_
#define HF_GPTQ_NARROW_H_

#include "launch.h"
#include "pipeline.h"

namespace hf_gptq {

template <class T, int Bits>
struct Narrow {
  using Stage = WarpStage<Bits, 1>;
  using Sums = WarpSums<T, Bits, 1, 1, kNarrowRows>;
  static constexpr int kActivationWords = kNarrowRows * kTileK / 2;

  HF_GPTQ_HD static constexpr int stage_words(const LinearArguments& p) {
    return Stage::words(p.scale_dtype, p.group_slices) + kActivationWords;
  }

  static __device__ __forceinline__ void fetch(const LinearArguments& p, uint32_t* stage,
                                               int n_tile, int tile, GroupCursor at, bool first,
                                               int lane) {
    unsigned char* x = reinterpret_cast<unsigned char*>(stage);
    // Rows that do not exist are not kept up: nobody reads their sums.
    if (lane / 8 < p.M) fetch_piece(p, x, lane / 8, lane % 8, 0, tile);
    Stage::fetch(p, stage + kActivationWords, n_tile, tile, at, first, lane);
  }

  static __device__ __forceinline__ void run(const LinearArguments& p) {
    HF_GPTQ_SHARED(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int chunk = warp % p.chunks, tiles_per_block = kWarps / p.chunks;
    const int n_tile = blockIdx.x * tiles_per_block + warp / p.chunks;
    const int n = n_tile * kTileN;
    const int words = stage_words(p);
    uint32_t* stages = reinterpret_cast<uint32_t*>(shared) + warp * p.stages * words;

    Sums sums;
    sums.clear();
    if (n < p.N) {
      const int begin = static_cast<int>(chunk_begin(chunk, p.chunks, p.k_tiles));
      const int end = static_cast<int>(chunk_begin(chunk + 1, p.chunks, p.k_tiles));
      GroupCursor at(p, begin), ahead = at;
      int fetched = begin, write = 0, read = 0;
      for (; fetched < begin + p.stages - 1; ++fetched) {
        if (fetched < end) {
          fetch(p, stages + write * words, n_tile, fetched, ahead, fetched == begin, lane);
          ahead.next_tile(p);
        }
        commit_copies();
        ++write;
      }
      for (int tile = begin; tile < end; ++tile, ++fetched) {
        wait_stage(p.stages);
        __syncwarp();  // the stage has arrived for all lanes, and all are done with the one before
        if (fetched < end) {
          fetch(p, stages + write * words, n_tile, fetched, ahead, false, lane);
          ahead.next_tile(p);
        }
        commit_copies();
        const uint32_t* stage = stages + read * words;
        sums.add_tile(p, stage + kActivationWords, reinterpret_cast<const unsigned char*>(stage), n,
                      at, tile == begin, lane);
        at.next_tile(p);
        if (++write == p.stages) write = 0;
        if (++read == p.stages) read = 0;
      }
      sums.flush();
    }
    wait_copies<0>();
    __syncthreads();

    // The stages are done with; their place takes the chunks' sums, [warp][token][output].
    float* partial = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int output = lane / 4 + i / 2 * 8, token = lane % 4 * 2 + i % 2;
      if (token < kNarrowRows) {
        partial[(warp * kNarrowRows + token) * kTileN + output] = sums.total[0][0][i];
      }
    }
    __syncthreads();
    const int outputs = tiles_per_block * kTileN;
    for (int i = threadIdx.x; i < outputs * p.M; i += kThreads) {
      const int token = i / outputs, output = i % outputs;
      const int column = blockIdx.x * outputs + output;
      if (column >= p.N) continue;
      const int first = output / kTileN * p.chunks;
      float sum = 0.0f;
      for (int c = 0; c < p.chunks; ++c) {
        const float value = partial[((first + c) * kNarrowRows + token) * kTileN + output % kTileN];
        sum = c == 0 ? value : sum + value;
      }
      if (p.bias) sum += to_float(p.bias[column], T());
      p.y[static_cast<int64_t>(token) * p.N + column] = from_float(sum, T());
    }
  }
};

template <class T, int Bits>
__global__ void __launch_bounds__(kThreads) narrow_kernel(const LinearArguments p) {
  Narrow<T, Bits>::run(p);
}

template <class T, int Bits>
static cudaError_t launch_narrow(LinearArguments& p, const Device& device, cudaStream_t stream) {
  const int stage_bytes = Narrow<T, Bits>::stage_words(p) * 4 * kWarps;
  const int reduce_bytes = kWarps * kNarrowRows * kTileN * 4;
  // Two blocks on a multiprocessor hide each other's start and end.
  p.stages = fitting_stages(stage_bytes, device.shared_bytes / 2 - 1024);
  if (!p.stages) p.stages = fitting_stages(stage_bytes, device.shared_bytes);
  if (!p.stages) return cudaErrorInvalidValue;
  const int bytes = p.stages * stage_bytes;
  const int64_t tiles_per_block = kWarps / p.chunks;
  const dim3 grid(static_cast<unsigned>(ceil_div(ceil_div(p.N, kTileN), tiles_per_block)));
  return hf_gptq_launch(narrow_kernel<T, Bits>, grid, dim3(kThreads),
                        bytes > reduce_bytes ? bytes : reduce_bytes, stream, p);
}

}  // namespace hf_gptq

#endif  // HF_GPTQ_NARROW_H_
