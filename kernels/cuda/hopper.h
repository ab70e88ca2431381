// The regime on Hopper's warpgroup tensor cores: when it applies and how to start it. It takes over
// from the wide kernel where activations are many enough to fill the 64-wide products of wgmma.
//
//   at most kHopperSplitRows rows   K is cut into chunk_count(N, K) chunks
//   more rows                       one chunk: there are tiles enough, and adding chunks up would
//                                   take as long as half of their products
//
// Chunks are the blocks of a cluster and meet in shared memory: no scratch is needed.
//
// Within each case a row's sum is built in one order (hopper_kernel.h), whatever M is.
//
// It has not run on a GPU yet, so it is not chosen by itself: HF_GPTQ_CUDA_HOPPER=1 in the
// environment allows it.
#ifndef HF_GPTQ_CUDA_HOPPER_H_
#define HF_GPTQ_CUDA_HOPPER_H_

#include "linear.h"

namespace hf_gptq {

constexpr int64_t kHopperLeastRows = 32;
constexpr int64_t kHopperSplitRows = 256;

// Whether the regime may be chosen for M rows. Any M can be computed if it is asked for.
static inline bool hopper_accepts(const Device& device, int64_t M) {
  return device.capability == 90 && M >= kHopperLeastRows;
}

// Chunks that K is cut into, for M rows.
static inline int hopper_chunks(int64_t M, int64_t N, int64_t k_tiles) {
  return M <= kHopperSplitRows ? chunk_count(N, k_tiles * kTileK) : 1;
}

// Tokens of a tile, 64 or 128. The larger one reads half as many weights; the smaller one is taken
// where the larger would leave half of the chip idle. It makes no difference to the result.
static inline int hopper_tokens(const Device& device, int64_t M, int64_t N, int chunks) {
  const int64_t tiles = ceil_div(M, 128) * ceil_div(N, kBlockN) * chunks;
  return M <= 64 || 2 * tiles <= device.multiprocessors ? 64 : 128;
}

// By bits and type. `chunks` of the arguments is hopper_chunks, not what the other kernels take.
cudaError_t launch_hopper_half(LinearArguments arguments, const Device& device,
                               cudaStream_t stream);
cudaError_t launch_hopper_bfloat16(LinearArguments arguments, const Device& device,
                                   cudaStream_t stream);

// Loads all kernels of a type onto the current device, which must have compute capability 9.0.
cudaError_t load_hopper_half();
cudaError_t load_hopper_bfloat16();

}  // namespace hf_gptq

#endif  // HF_GPTQ_CUDA_HOPPER_H_
