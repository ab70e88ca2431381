// Sums of outer products, the core of every matrix product here, with both operands in packed
// panels.
// Internal linkage, see isa.h.
#ifndef HF_GPTQ_CPU_OUTER_H_
#define HF_GPTQ_CPU_OUTER_H_

#include "simd.h"

namespace hf_gptq {
namespace {

// Register blocking of outer_tile(). kOuterRows and kOuterColumns divide kPackColumns.
#if defined(HF_GPTQ_EMULATE)
constexpr int kOuterRows = 3, kOuterVectors = 2;
#elif defined(HF_GPTQ_SIMD_AVX512F)
constexpr int kOuterRows = 12, kOuterVectors = 2;
#elif defined(HF_GPTQ_SIMD_AVX2)
constexpr int kOuterRows = 6, kOuterVectors = 2;
#else
constexpr int kOuterRows = 3, kOuterVectors = 4;
#endif
constexpr int kOuterColumns = kOuterVectors * kLanes;
constexpr int64_t kPackColumns = 96;

// C[r, j] += sum, where sum = fma(A[t, r], B[t, j], sum) for t = 0 .. count-1 from sum = 0; or,
// where elements are pairs of bf16, fmadd_pairs() in place of fma. A: [count, kRows]; B:
// [count, kOuterColumns]; C: [kRows, kOuterColumns], rows C_stride apart.
template <bool kPairs = false, int kRows = kOuterRows>
void outer_tile(const float* A, const float* B, int64_t count, float* C, int64_t C_stride) {
  VecF sum[kRows][kOuterVectors] = {};
  for (int64_t t = 0; t < count; ++t) {
    VecF b[kOuterVectors];
    HF_GPTQ_UNROLL
    for (int v = 0; v < kOuterVectors; ++v) b[v] = load(B + v * kLanes);
    HF_GPTQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      HF_GPTQ_UNROLL
      for (int v = 0; v < kOuterVectors; ++v) {
        sum[r][v] = kPairs ? fmadd_pairs(b[v], A + r, sum[r][v]) : fmadd(b[v], A + r, sum[r][v]);
      }
    }
    A += kRows;
    B += kOuterColumns;
  }
  HF_GPTQ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    HF_GPTQ_UNROLL
    for (int v = 0; v < kOuterVectors; ++v) {
      float* c = C + r * C_stride + v * kLanes;
      store(c, load(c) + sum[r][v]);
    }
  }
}

using OuterTile = void (*)(const float*, const float*, int64_t, float*, int64_t);

// outer_tile() for 1 to kOuterRows rows.
template <bool kPairs, int kRows = kOuterRows>
OuterTile outer_tile_for(int rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return outer_tile_for<kPairs, kRows - 1>(rows);
  }
  return outer_tile<kPairs, kRows>;
}

// Copies [rows, columns] of src into panels [rows, kWidth], panel_stride apart. Columns missing in
// the last panel become 0.
template <int kWidth>
void pack_panels(const float* src, int64_t src_stride, int64_t rows, int64_t columns, float* panels,
                 int64_t panel_stride) {
  // A few rows at a time: rows of src and panels are often a multiple of 4 KiB apart, where few of
  // them fit in the cache together.
  constexpr int64_t kRows = 8;
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t end = min64(row + kRows, rows);
    float* panel = panels;
    for (int64_t j = 0; j < columns; j += kWidth, panel += panel_stride) {
      if (j + kWidth <= columns) {
        for (int64_t r = row; r < end; ++r) {
          memcpy(panel + r * kWidth, src + r * src_stride + j, kWidth * sizeof(float));
        }
        continue;
      }
      for (int64_t r = row; r < end; ++r) {
        for (int64_t c = 0; c < kWidth; ++c) {
          panel[r * kWidth + c] = j + c < columns ? src[r * src_stride + j + c] : 0.0f;
        }
      }
    }
  }
}

// Two rows of bf16 as pairs, the upper halves 0 where there is no upper row.
inline void interleave_rows(const uint16_t* lower, const uint16_t* upper, int64_t column_stride,
                            int64_t count, float* pairs) {
  if (column_stride == 1 && upper) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t pair = lower[i] | uint32_t{upper[i]} << 16;
      memcpy(pairs + i, &pair, sizeof pair);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t high = upper ? upper[i * column_stride] : 0;
    const uint32_t pair = lower[i * column_stride] | uint32_t{high} << 16;
    memcpy(pairs + i, &pair, sizeof pair);
  }
}

// Pairs of `numbers` rows of bf16 into panels [pairs, kWidth], as pack_panels().
template <int kWidth>
void pack_panels_of_pairs(const uint16_t* src, int64_t src_stride, int64_t column_stride,
                          int64_t numbers, int64_t columns, float* panels, int64_t panel_stride) {
  constexpr int64_t kRows = 8;
  float pairs[kRows * kPackColumns];
  for (int64_t row = 0; row < numbers; row += 2 * kRows) {
    const int64_t count = min64(2 * kRows, numbers - row);
    for (int64_t j = 0; j < columns; j += kPackColumns) {
      const int64_t width = min64(kPackColumns, columns - j);
      for (int64_t r = 0; r < count; r += 2) {
        const uint16_t* lower = src + (row + r) * src_stride + j * column_stride;
        interleave_rows(lower, r + 1 < count ? lower + src_stride : nullptr, column_stride, width,
                        pairs + r / 2 * kPackColumns);
      }
      pack_panels<kWidth>(pairs, kPackColumns, ceil_div(count, 2), width,
                          panels + row / 2 * kWidth + j / kWidth * panel_stride, panel_stride);
    }
  }
}

// panel[r, c] = column[c * column_stride + r] for r, c < 4.
template <int kWidth>
HF_GPTQ_INLINE void transpose_4x4(const float* column, int64_t column_stride, float* panel) {
  Vec4 c[4];
  HF_GPTQ_UNROLL
  for (int i = 0; i < 4; ++i) memcpy(&c[i], column + i * column_stride, sizeof c[i]);
  const Vec4 low02 = HF_GPTQ_SHUFFLE_4(c[0], c[2], 0, 4, 1, 5);
  const Vec4 low13 = HF_GPTQ_SHUFFLE_4(c[1], c[3], 0, 4, 1, 5);
  const Vec4 high02 = HF_GPTQ_SHUFFLE_4(c[0], c[2], 2, 6, 3, 7);
  const Vec4 high13 = HF_GPTQ_SHUFFLE_4(c[1], c[3], 2, 6, 3, 7);
  const Vec4 r[4] = {
      HF_GPTQ_SHUFFLE_4(low02, low13, 0, 4, 1, 5), HF_GPTQ_SHUFFLE_4(low02, low13, 2, 6, 3, 7),
      HF_GPTQ_SHUFFLE_4(high02, high13, 0, 4, 1, 5), HF_GPTQ_SHUFFLE_4(high02, high13, 2, 6, 3, 7)};
  HF_GPTQ_UNROLL
  for (int i = 0; i < 4; ++i) memcpy(panel + i * kWidth, &r[i], sizeof r[i]);
}

// The same from columns that are not adjacent: element (row, column) at
// row * row_stride + column * column_stride of src. Fast for row_stride = 1.
template <int kWidth>
void pack_panels_transposed(const float* src, int64_t row_stride, int64_t column_stride,
                            int64_t rows, int64_t columns, float* panels, int64_t panel_stride) {
  // A cache line of each column at a time: columns are often a multiple of 4 KiB apart, where few
  // of them fit in the cache together, so a line must not be needed twice.
  constexpr int64_t kRows = 16;
  for (int64_t j = 0; j < columns; j += kWidth, panels += panel_stride) {
    const int64_t width = min64(kWidth, columns - j);
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t count = min64(kRows, rows - row);
      const float* block = src + row * row_stride + j * column_stride;
      float* panel = panels + row * kWidth;
      if (width < kWidth) memset(panel, 0, count * kWidth * sizeof(float));
      int64_t c = 0;
      for (; c + 4 <= width && count == kRows && row_stride == 1; c += 4) {
        for (int64_t r = 0; r < kRows; r += 4) {
          transpose_4x4<kWidth>(block + c * column_stride + r, column_stride,
                                panel + r * kWidth + c);
        }
      }
      for (; c < width; ++c) {
        for (int64_t r = 0; r < count; ++r) {
          panel[r * kWidth + c] = block[r * row_stride + c * column_stride];
        }
      }
    }
  }
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_OUTER_H_
