// Rows brought side by side, the order in which products read activations. Internal linkage, see
// isa.h.
#ifndef HF_GPTQ_CPU_INTERLEAVE_H_
#define HF_GPTQ_CPU_INTERLEAVE_H_

#include "simd.h"

namespace hf_gptq {
namespace {

// Row r of a becomes lane r of every row.
HF_GPTQ_INLINE void transpose(VecF (&a)[kLanes]) {
  HF_GPTQ_UNROLL
  for (int apart = 1; apart < kLanes; apart *= 2) {
    HF_GPTQ_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      if (i & apart) continue;
      const VecF upper = a[i], lower = a[i + apart];
#ifdef __clang__
      HF_GPTQ_UNROLL
      for (int j = 0; j < kLanes; ++j) {
        a[i][j] = j & apart ? lower[j - apart] : upper[j];
        a[i + apart][j] = j & apart ? lower[j] : upper[j + apart];
      }
#else
      VecI first = {}, second = {};
      HF_GPTQ_UNROLL
      for (int j = 0; j < kLanes; ++j) {
        first[j] = j & apart ? kLanes + j - apart : j;
        second[j] = j & apart ? kLanes + j : j + apart;
      }
      a[i] = __builtin_shuffle(upper, lower, first);
      a[i + apart] = __builtin_shuffle(upper, lower, second);
#endif
    }
  }
}

// packed[i * count + r] = element i of row r, for i < steps and r < count, at most kLanes.
// row_at(r, i, left): kLanes elements of row r from i on, of which `left` exist.
template <class RowAt>
HF_GPTQ_INLINE void interleave_rows(int count, int64_t steps, float* packed, RowAt row_at) {
  for (int64_t i = 0; i < steps; i += kLanes) {
    const int64_t left = min64(steps - i, kLanes);
    VecF square[kLanes];
    HF_GPTQ_UNROLL
    for (int r = 0; r < kLanes; ++r) {
      square[r] = r < count ? row_at(r, i, left) : VecF{};
    }
    transpose(square);
    // Every store but the last of all is partly overwritten by the next.
    alignas(64) float end[kLanes * kLanes];
    const bool beyond = (i + kLanes - 1) * count + kLanes > steps * count;
    float* to = beyond ? end : packed + i * count;
    HF_GPTQ_UNROLL
    for (int s = 0; s < kLanes; ++s) store(to + s * count, square[s]);
    if (beyond) copy_floats(end, left * count, packed + i * count);
  }
}

// packed[i * count + r] = rows[r * stride + i].
void interleave(const float* rows, int64_t stride, int count, int64_t steps, float* packed) {
  if (count == 1) {
    copy_floats(rows, steps, packed);
    return;
  }
  interleave_rows(count, steps, packed,
                  [&](int r, int64_t i, int64_t left) __attribute__((always_inline)) {
                    const float* row = rows + r * stride + i;
                    if (left == kLanes) return load(row);
                    VecF some = {};
                    memcpy(&some, row, left * sizeof(float));
                    return some;
                  });
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_INTERLEAVE_H_
