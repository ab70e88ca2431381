// The regimes on Hopper's warpgroup tensor cores: when they apply, what they need, how to start
// them. They take over from the wide kernel where activations are many enough to fill the 64-wide
// products of wgmma.
//
//   Hopper         M <= kHopperSplitRows: K is cut into chunk_count(N, K) chunks
//   HopperPrefill  more rows: one chunk, as there are tiles enough and the sums of chunks would
//   cost
//                  more traffic than the weights
//
// Within each a row's sum is built in one order (hopper_kernel.h), whatever M is.
//
// Neither has run on a GPU yet, so neither is chosen by itself: HF_GPTQ_CUDA_HOPPER=1 in the
// environment allows them.
#ifndef HF_GPTQ_CUDA_HOPPER_H_
#define HF_GPTQ_CUDA_HOPPER_H_

#include "linear.h"

namespace hf_gptq {

constexpr int64_t kHopperLeastRows = 32;
constexpr int64_t kHopperSplitRows = 256;

// Whether the regimes may be chosen for M rows. Any M can be computed if it is asked for.
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

// Sizes of what `partials` and `counters` point to, in elements.
static inline int64_t hopper_partials(const Device& device, int64_t M, int64_t N, int chunks) {
  if (chunks == 1) return 0;
  const int tokens = hopper_tokens(device, M, N, chunks);
  return ceil_div(M, tokens) * ceil_div(N, kBlockN) * chunks * kBlockN * tokens;
}

static inline int64_t hopper_counters(const Device& device, int64_t M, int64_t N, int chunks) {
  if (chunks == 1) return 0;
  return ceil_div(M, hopper_tokens(device, M, N, chunks)) * ceil_div(N, kBlockN);
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
