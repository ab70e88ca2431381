// The regime on Hopper's warpgroup tensor cores: how a product is cut, and how to start it.
//
// K is cut into 1, 2 or 4 chunks, which the blocks of a cluster add up in shared memory: no scratch
// is needed. A row's sum is built in one order (hopper_kernel.h) for one number of chunks; how many
// are best depends on M.
#ifndef HF_GPTQ_CUDA_HOPPER_H_
#define HF_GPTQ_CUDA_HOPPER_H_

#include "linear.h"

namespace hf_gptq {

// Tokens of a tile, 64 or 128, the chunks of K, and what that takes.
struct HopperCut {
  int tokens, chunks;
  double us;
};

// Clusters of so many blocks that run at a time, one block on a multiprocessor. Clusters of four
// do not fill all groups of multiprocessors: an H200 with 132 runs fewer than 32.
static inline int64_t hopper_clusters(const Device& device, int chunks) {
  const int64_t clusters = device.multiprocessors / chunks;
  const int64_t fitting = chunks < 4 ? clusters : clusters * 7 / 8;
  return fitting < 1 ? 1 : fitting;
}

// Measured on an H200: 2.6 us, 0.65 for a tile of 64 inputs with 64 tokens and 0.94 with 128, 5.5
// and 8 for adding chunks up.
static inline double hopper_us(const Device& device, int64_t M, int64_t N, int64_t k_tiles,
                               int tokens, int chunks) {
  const int64_t tiles = ceil_div(M, tokens) * ceil_div(N, kBlockN);
  const int64_t waves = ceil_div(tiles, hopper_clusters(device, chunks));
  const double tile = tokens == 64 ? 0.65 : 0.94, join = tokens == 64 ? 5.5 : 8.0;
  return 2.6 + static_cast<double>(waves) * (tile * static_cast<double>(ceil_div(k_tiles, chunks)) +
                                             (chunks > 1 ? join : 0.0));
}

// The better number of tokens for so many chunks. It makes no difference to the result.
static inline HopperCut hopper_cut(const Device& device, int64_t M, int64_t N, int64_t k_tiles,
                                   int chunks) {
  const double few = hopper_us(device, M, N, k_tiles, 64, chunks);
  const double many = hopper_us(device, M, N, k_tiles, 128, chunks);
  return M <= 64 || few <= many ? HopperCut{64, chunks, few} : HopperCut{128, chunks, many};
}

static inline HopperCut hopper_cut(const Device& device, int64_t M, int64_t N, int64_t k_tiles) {
  HopperCut best = hopper_cut(device, M, N, k_tiles, 1);
  for (const int chunks : {2, 4}) {
    if (k_tiles < 4 * chunks) break;
    const HopperCut cut = hopper_cut(device, M, N, k_tiles, chunks);
    if (cut.us < best.us) best = cut;
  }
  return best;
}

// By bits and type. `chunks` of the arguments is that of hopper_cut, not what the other kernels
// take.
cudaError_t launch_hopper_half(LinearArguments arguments, const Device& device,
                               cudaStream_t stream);
cudaError_t launch_hopper_bfloat16(LinearArguments arguments, const Device& device,
                                   cudaStream_t stream);

// Loads all kernels of a type onto the current device, which must have compute capability 9.0.
cudaError_t load_hopper_half();
cudaError_t load_hopper_bfloat16();

}  // namespace hf_gptq

#endif  // HF_GPTQ_CUDA_HOPPER_H_
