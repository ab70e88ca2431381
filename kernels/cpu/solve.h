// The GPTQ column loop. Internal linkage, see isa.h.
//
//                 block of columns        the columns right of it
//              +----------------------+---------------------------+
//   group of   | panel | in the block |  `update`, one column tile |
//   kLanes     | eager |  `update`    |  at a time                 |
//   rows       +----------------------+---------------------------+
//
// A panel is solved with one row per lane; the updates it causes are applied by `update`, which
// keeps a tile of W in registers and subtracts e * U[i, :] from it for ascending i. Whatever the
// blocking, an element of W therefore receives the same subtractions in the same order, each
// product and each difference rounded by itself (-ffp-contract=off).
#ifndef HF_GPTQ_CPU_SOLVE_H_
#define HF_GPTQ_CPU_SOLVE_H_

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace hf_gptq {
namespace {

constexpr int kPanelColumns = 16;
constexpr int64_t kMaxBlock = 256;
// Rows that share one packed tile of U. More rows amortize the packing; fewer keep their errors
// (kRowChunk * block floats) in L2.
constexpr int64_t kRowChunk = 256;
// Register blocking of update().
constexpr int kUpdateRows = kLanes >= 16 ? 8 : 4;
constexpr int kUpdateVectors = 2;
constexpr int64_t kUpdateColumns = kUpdateVectors * kLanes;
// Tiles of U packed at a time: each of its rows is in another page, so a visit should take several
// cache lines.
constexpr int64_t kPackedTiles = 128 / kUpdateColumns;
constexpr int64_t kPackedColumns = kPackedTiles * kUpdateColumns;

// W[r, j] -= errors[i, r] * U[i, j] for i = 0 .. count-1 in turn, on kRows rows and kVectors
// vectors of columns. errors is [count, kLanes].
template <int kRows, int kVectors>
HF_GPTQ_INLINE void update_tile(float* W, int64_t W_stride, const float* U, int64_t U_stride,
                                const float* errors, int64_t count) {
  VecF w[kRows][kVectors];
  HF_GPTQ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    HF_GPTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) w[r][v] = load(W + r * W_stride + v * kLanes);
    // The next call mostly works on the rows below.
    HF_GPTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      __builtin_prefetch(W + (r + kRows) * W_stride + v * kLanes);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    VecF u[kVectors];
    HF_GPTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) u[v] = load(U + i * U_stride + v * kLanes);
    HF_GPTQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const VecF e = splat(errors[i * kLanes + r]);
      HF_GPTQ_UNROLL
      for (int v = 0; v < kVectors; ++v) w[r][v] = w[r][v] - e * u[v];
    }
  }
  HF_GPTQ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    HF_GPTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) store(W + r * W_stride + v * kLanes, w[r][v]);
  }
}

template <int kRows>
void update_rows(float* W, int64_t W_stride, const float* U, int64_t U_stride, const float* errors,
                 int64_t count, int64_t columns) {
  int64_t j = 0;
  for (; j + kUpdateColumns <= columns; j += kUpdateColumns) {
    update_tile<kRows, kUpdateVectors>(W + j, W_stride, U + j, U_stride, errors, count);
  }
  for (; j + kLanes <= columns; j += kLanes) {
    update_tile<kRows, 1>(W + j, W_stride, U + j, U_stride, errors, count);
  }
  for (; j < columns; ++j) {
    for (int r = 0; r < kRows; ++r) {
      float w = W[r * W_stride + j];
      for (int64_t i = 0; i < count; ++i) w = w - errors[i * kLanes + r] * U[i * U_stride + j];
      W[r * W_stride + j] = w;
    }
  }
}

// The update of one group of rows, of which `rows` <= kLanes exist.
void update(float* W, int64_t W_stride, const float* U, int64_t U_stride, const float* errors,
            int64_t count, int64_t columns, int64_t rows) {
  int64_t r = 0;
  for (; r + kUpdateRows <= rows; r += kUpdateRows) {
    update_rows<kUpdateRows>(W + r * W_stride, W_stride, U, U_stride, errors + r, count, columns);
  }
  for (; r < rows; ++r) {
    update_rows<1>(W + r * W_stride, W_stride, U, U_stride, errors + r, count, columns);
  }
}

// Solves columns [column, column + count) of rows [row, row + rows), rows <= kLanes, and writes
// their errors, [count, kLanes]. U is the diagonal block of these columns with rows U_stride apart.
void solve_panel(const SolveArguments& a, int64_t row, int64_t rows, int64_t column, int count,
                 const float* U, int64_t U_stride, float* errors) {
  const VecF top = splat(static_cast<float>((1 << a.bits) - 1));
  // Lanes without a row quantize 0 with scale 1 and cause no error.
  alignas(64) float w[kPanelColumns][kLanes] = {};
  alignas(64) float q[kPanelColumns][kLanes];
  alignas(64) float scale[kLanes];
  alignas(64) float zero[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    scale[l] = 1.0f;
    zero[l] = 0.0f;
  }
  for (int64_t l = 0; l < rows; ++l) {
    for (int c = 0; c < count; ++c) w[c][l] = a.W[(row + l) * a.K + column + c];
  }
  int64_t group = -1;
  for (int c = 0; c < count; ++c) {
    if (a.group[column + c] != group) {
      group = a.group[column + c];
      for (int64_t l = 0; l < rows; ++l) {
        scale[l] = a.scales[(row + l) * a.G + group];
        zero[l] = a.zeros[(row + l) * a.G + group];
      }
    }
    const VecF wc = load(w[c]);
    const VecF s = load(scale);
    const VecF z = load(zero);
    const VecF qc = quantize(wc / s, z, top);
    const VecF e = (wc - (qc - z) * s) / splat(U[c * U_stride + c]);
    for (int j = c + 1; j < count; ++j) {
      store(w[j], load(w[j]) - e * splat(U[c * U_stride + j]));
    }
    store(q[c], qc);
    store(errors + c * kLanes, e);
  }
  for (int64_t l = 0; l < rows; ++l) {
    uint8_t* codes = a.codes + (row + l) * a.K + column;
    for (int c = 0; c < count; ++c) codes[c] = static_cast<uint8_t>(q[c][l]);
  }
  if (a.loss) {
    for (int c = 0; c < count; ++c) {
      for (int64_t l = 0; l < rows; ++l) {
        const double e = errors[c * kLanes + l];
        a.loss[row + l] += e * e;
      }
    }
  }
}

int64_t block_size(const SolveArguments& a) {
  const int64_t size = a.blocksize < kMaxBlock ? a.blocksize : kMaxBlock;
  return size < a.K ? size : a.K;
}

// Copies [rows, columns] of U, columns <= kPackedColumns, into tiles [rows, kUpdateColumns], one
// after the other.
void pack_tiles(const float* U, int64_t U_stride, int64_t rows, int64_t columns, float* tiles) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < columns; j += kUpdateColumns) {
      copy_floats(U + r * U_stride + j, columns - j < kUpdateColumns ? columns - j : kUpdateColumns,
                  tiles + j * rows + r * kUpdateColumns);
    }
  }
}

// Rows [begin, end), at most kRowChunk. scratch: [block, block] for the diagonal block of U,
// kPackedTiles tiles [block, kUpdateColumns] right of it, [kRowChunk / kLanes, block, kLanes]
// errors.
void solve_chunk(const SolveArguments& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t block = block_size(a);
  float* diagonal = scratch;
  float* tiles = diagonal + block * block;
  float* errors = tiles + block * kPackedColumns;
  if (a.loss) memset(a.loss + begin, 0, (end - begin) * sizeof(double));

  for (int64_t i = 0; i < a.K; i += block) {
    const int64_t size = a.K - i < block ? a.K - i : block;
    // Rows of U are often a multiple of 4 KiB apart, where few of them fit in the cache together;
    // the parts in use are copied next to each other.
    for (int64_t r = 0; r < size; ++r) {
      copy_floats(a.U + (i + r) * a.K + i + r, size - r, diagonal + r * size + r);
    }
    for (int64_t row = begin; row < end; row += kLanes) {
      const int64_t rows = end - row < kLanes ? end - row : kLanes;
      float* row_errors = errors + (row - begin) * block;
      for (int64_t p = 0; p < size; p += kPanelColumns) {
        const int count = static_cast<int>(size - p < kPanelColumns ? size - p : kPanelColumns);
        float* panel_errors = row_errors + p * kLanes;
        solve_panel(a, row, rows, i + p, count, diagonal + p * size + p, size, panel_errors);
        update(a.W + row * a.K + i + p + count, a.K, diagonal + p * size + p + count, size,
               panel_errors, count, size - p - count, rows);
      }
    }
    for (int64_t right = i + size; right < a.K; right += kPackedColumns) {
      const int64_t width = a.K - right < kPackedColumns ? a.K - right : kPackedColumns;
      pack_tiles(a.U + i * a.K + right, a.K, size, width, tiles);
      for (int64_t j = 0; j < width; j += kUpdateColumns) {
        const int64_t columns = width - j < kUpdateColumns ? width - j : kUpdateColumns;
        for (int64_t row = begin; row < end; row += kLanes) {
          const int64_t rows = end - row < kLanes ? end - row : kLanes;
          update(a.W + row * a.K + right + j, a.K, tiles + j * size, kUpdateColumns,
                 errors + (row - begin) * block, size, columns, rows);
        }
      }
    }
  }
}

int solve_rows(int64_t begin, int64_t end, const void* context) {
  const SolveArguments& a = *static_cast<const SolveArguments*>(context);
  const int64_t block = block_size(a);
  float* scratch = static_cast<float*>(
      thread_scratch((block + kPackedColumns + kRowChunk) * block * sizeof(float)));
  if (!scratch) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  for (int64_t row = begin; row < end; row += kRowChunk) {
    solve_chunk(a, row, end - row < kRowChunk ? end : row + kRowChunk, scratch);
  }
  return HF_GPTQ_OK;
}

int solve(const SolveArguments& a) {
  // Whole groups of lanes, and enough of them to share the packing of U.
  return parallel_for(a.N, 4 * kLanes, solve_rows, &a);
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_SOLVE_H_
