// What the linear kernels are given.
#ifndef HF_GPTQ_CUDA_LINEAR_H_
#define HF_GPTQ_CUDA_LINEAR_H_

#include "fragments.h"
#include "hf_gptq.h"
#include "ptx.h"

namespace hf_gptq {

// y = x W^T + bias, on the tile layout of fragments.h. Rows are the inputs in packed order.
struct LinearArguments {
  const uint32_t* tiles;     // [panels, k_tiles, 4, 32 * bits]
  const uint16_t* x;         // [M, x_columns], 16-byte aligned, x_stride a multiple of 8; columns
                             // from x_columns up to 64 * k_tiles count as 0
  const void* scales;        // [G, N], scale_dtype
  const uint32_t* qzeros;    // [G, zero_words], packed along N; NULL: every zero is 2^(bits-1)
  const int32_t* group_map;  // [runs] row of scales and qzeros of each run; NULL: the run's number
  const uint16_t* bias;      // [N] or NULL
  uint16_t* y;               // [M, N]
  float* partials;           // scratch of the wide kernel
  int32_t* counters;         // zero before and after
  int64_t x_stride;
  int M, N, x_columns, k_tiles;
  int G;             // rows of scales
  int runs;          // runs of group_slices slices each; beyond the last one, it goes on
  int group_slices;  // k16 slices that share scales and zeros
  int zero_words, zero_offset;
  int scale_dtype;  // hf_gptq_dtype
  int bits;
  int chunks;  // chunk_count of N and the rows
  int stages;  // of the copy pipeline
};

// What the host knows of a device.
struct Device {
  int capability;  // 10 * major + minor
  int multiprocessors;
  int shared_bytes;  // most dynamic shared memory of a block
};

// Regimes by M. The first two add up in the same order, so a row has the same bits in both.
//
//   narrow   a warp takes 16 outputs and a chunk of K, the block adds its chunks up: no traffic
//            between blocks, but every warp fetches its own activations
//   wide     a block takes 256 outputs and a chunk; activations are shared by its eight warps, and
//            the block that arrives last adds the chunks up
//
// rules.h chooses between them.

// The narrow kernel's activations cost M / 4 of the bytes of 4-bit weights, all from L2, which
// delivers about twice what memory does.
constexpr int kNarrowRows = 4;

// Tiles of K that a warp of the narrow kernel takes at a time.
constexpr int kNarrowTiles = 8;

// Rows of one block of the wide kernel; more rows take more blocks, which find the weights in L2.
constexpr int kWideRows = 64;

// Beyond this many rows the arithmetic of mma.sync costs more than writing the weight out densely
// and giving it to the vendor's library.
constexpr int kMostRows = 256;
constexpr int kMostRowsTuring = 64;  // half the tensor throughput per byte, and no async copies

// Rows of one launch of the wide kernel; more are launched one after the other, so that the sums of
// chunks take no more memory than this many need.
constexpr int kWideLaunchRows = 512;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

enum Regime { kDense = 0, kNarrow = 1, kWide = 2, kHopper = 3 };

// Groups that `slices` slices can touch.
HF_GPTQ_HD static constexpr int groups_touched(int group_slices, int slices) {
  return (group_slices + slices - 2) / group_slices + 1;
}

// Shared memory of the narrow kernel: scales and zeros of a group for 16 outputs, and what a warp
// takes at a time.
HF_GPTQ_HD static constexpr int narrow_grid_words(int scale_dtype) {
  return kTileN / (scale_dtype == HF_GPTQ_FP32 ? 1 : 2) + 4;
}

HF_GPTQ_HD static constexpr int narrow_stage_words(int M, int scale_dtype, int group_slices) {
  return M * kNarrowTiles * kTileK / 2 +
         groups_touched(group_slices, kNarrowTiles * kSlices) * narrow_grid_words(scale_dtype);
}

static inline bool narrow_fits(const Device& device, int64_t M, int scale_dtype, int group_slices) {
  return M <= kNarrowRows &&
         2 * kWarps * 4 * narrow_stage_words(static_cast<int>(M), scale_dtype, group_slices) <=
             device.shared_bytes;
}

// Token tiles of 8 that a block of the wide kernel takes: 1, 2, 4 or 8.
static inline int wide_token_tiles(int64_t M) {
  int tiles = 1;
  while (tiles * 8 < M && tiles * 8 < kWideRows) tiles *= 2;
  return tiles;
}

static inline int64_t wide_blocks(int64_t M, int64_t N) {
  return ceil_div(N, kBlockN) * ceil_div(M, 8 * wide_token_tiles(M));
}

// Sizes of what `partials` and `counters` point to, in elements.
static inline int64_t wide_partials(int64_t M, int64_t N, int chunks) {
  return chunks == 1 ? 0 : wide_blocks(M, N) * chunks * kBlockN * 8 * wide_token_tiles(M);
}

static inline int64_t wide_counters(int64_t M, int64_t N, int chunks) {
  return chunks == 1 ? 0 : wide_blocks(M, N);
}

// By bits and type; defined where the kernels are instantiated.
cudaError_t launch_narrow_half(LinearArguments arguments, const Device& device,
                               cudaStream_t stream);
cudaError_t launch_narrow_bfloat16(LinearArguments arguments, const Device& device,
                                   cudaStream_t stream);
cudaError_t launch_wide_half(LinearArguments arguments, const Device& device, cudaStream_t stream);
cudaError_t launch_wide_bfloat16(LinearArguments arguments, const Device& device,
                                 cudaStream_t stream);

// Loads all kernels of a type onto the current device.
cudaError_t load_half();
cudaError_t load_bfloat16();

}  // namespace hf_gptq

#endif  // HF_GPTQ_CUDA_LINEAR_H_
