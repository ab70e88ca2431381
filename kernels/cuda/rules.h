// Which kernel computes a product, by rules on its size. Within a call nothing is timed or tried.
//
// The narrow kernel takes up to 4 rows, where its shared memory allows so many: 3 with that of
// compute capability 7.5. For more rows, 9.0 takes whatever the times below say is least; other
// GPUs take the wide kernel up to 256 rows (64 before 8.0), then the dense product.
// HF_GPTQ_BATCH_INVARIANT=1: the wide kernel for all that the narrow one leaves. They add up in one
// order.
//
// The times, in microseconds, were measured on an H200 at 4 bit, groups of 128 and sizes from
// 4096 x 4096, and are taken for other widths and groups, too. For smaller layers the dense product
// was not timed, and is not chosen up to 256 rows. The limits of other GPUs have not been measured.
#ifndef HF_GPTQ_CUDA_RULES_H_
#define HF_GPTQ_CUDA_RULES_H_

#include "hopper.h"
#include "linear.h"

namespace hf_gptq {

// The wide kernel up to 16 rows; beyond them Hopper's is faster at any size.
constexpr int64_t kWideMeasuredRows = 16;

// Weights of the smallest layer whose dense product was timed.
constexpr int64_t kDenseMeasuredWeights = int64_t{4096} * 4096;

static inline double wide_us(const Device& device, int64_t M, int64_t N, int64_t k_tiles) {
  const int chunks = chunk_count(N, k_tiles * kTileK);
  const int64_t waves = ceil_div(ceil_div(N, kBlockN) * chunks, device.multiprocessors);
  return (M <= 8 ? 7.3 : 10.0) + 0.85 * static_cast<double>(waves * ceil_div(k_tiles, chunks));
}

// Dequantize, then cuBLAS, which reads the weight or computes, whatever takes longer.
static inline double dense_us(int64_t M, int64_t N, int64_t k_tiles) {
  const double weights = static_cast<double>(N) * static_cast<double>(k_tiles * kTileK);
  const double reading = weights * 0.55e-6, computing = weights * static_cast<double>(M) / 380e6;
  return 4.0 + weights * 0.635e-6 + (reading > computing ? reading : computing);
}

static inline Regime choose_regime(const Device& device, int64_t M, int64_t N, int64_t k_tiles,
                                   int scale_dtype, int group_slices, bool invariant) {
  if (narrow_fits(device, M, scale_dtype, group_slices)) return kNarrow;
  if (invariant) return kWide;
  if (device.capability != 90) {
    return M <= (device.capability < 80 ? kMostRowsTuring : kMostRows) ? kWide : kDense;
  }
  const double never = 1e30;
  const bool small = N * k_tiles * kTileK < kDenseMeasuredWeights && M <= kMostRows;
  const double dense = small ? never : dense_us(M, N, k_tiles);
  const double wide = M <= kWideMeasuredRows ? wide_us(device, M, N, k_tiles) : never;
  const double hopper = hopper_cut(device, M, N, k_tiles).us;
  if (wide <= hopper && wide <= dense) return kWide;
  return hopper <= dense ? kHopper : kDense;
}

}  // namespace hf_gptq

#endif  // HF_GPTQ_CUDA_RULES_H_
