// C = A B or C += A B, any strides. Internal linkage, see isa.h.
//
//               columns of a block, N
//             +---------------------+        A block of A and one of B are packed into the panels
//             of
//   depth, K  |         B           |        outer_tile(), by all threads. Then a task owns a
//   square
//             +---------------------+        tile of C: it loads the tile into scratch, adds the
//   +-----+   +------+------+-------+        blocks' product to it in chunks, and stores it.
//   |  A  |   | tile | tile |       |
//   |     |   +------+------+  C    |        lower: tiles on and below the diagonal; of those on
//   it,
//   +-----+   |      |      |       |        what outer_tile() needs to reach it.
//    rows, M  +------+------+-------+
//
// An element of C sees the same operations in the same order whatever the tiles, the blocks, the
// threads and the rest of C are.
#ifndef HF_GPTQ_CPU_MATMUL_H_
#define HF_GPTQ_CPU_MATMUL_H_

#include "kernels.h"
#include "outer.h"
#include "parallel.h"
#include "scratch.h"

namespace hf_gptq {
namespace {

// Products whose sum is added to C: part of the specification. A panel of A of this length stays in
// L1, one of B in L1 or L2.
constexpr int64_t kMatmulChunk = 256;
// Sides of a tile, multiples of kPackColumns. A tile of C and the panels of one chunk stay in L2.
constexpr int64_t kMatmulTile = 192;
constexpr int64_t kMatmulSmallTile = 96;
// Sides of a block, multiples of kMatmulTile, and its depth, a multiple of kMatmulChunk: 6 MB of A
// and of B, that a shared cache holds.
constexpr int64_t kMatmulBlock = 8 * kMatmulTile;
constexpr int64_t kMatmulDepth = 4 * kMatmulChunk;
// Tiles wanted, so that an unknown number of threads finishes together.
constexpr int64_t kMatmulWantedTiles = 64;
// Multiply-adds that are worth waking a thread for.
constexpr int64_t kMatmulWantedWork = int64_t{1} << 18;

struct MatmulJob {
  const MatmulArguments& a;
  // The blocks in hand: C[row .. row + rows, column .. column + columns], k .. k + depth.
  int64_t row, rows;
  int64_t column, columns;
  int64_t k, depth;
  int64_t tile;   // side
  float* A;       // for each chunk of the depth, panels [chunk, kOuterRows]
  float* B;       // for each chunk of the depth, panels [chunk, kOuterColumns]
  bool B_packed;  // from an earlier block of rows
};

// Where the panels of column j, a multiple of kPackColumns, begin in the chunk that begins at t:
// the panels that are used together lie together.
int64_t matmul_panels(int64_t columns, int64_t depth, int64_t t, int64_t j) {
  return t * ceil_div(columns, kPackColumns) * kPackColumns + j * min64(kMatmulChunk, depth - t);
}

// Packs kPackColumns columns of one chunk: of the chunks and columns, number `task`. `src` is the
// block's first element; stride: from one k to the next, column_stride: from one column to the
// next.
template <int kWidth>
void matmul_pack_task(const float* src, int64_t stride, int64_t column_stride, int64_t depth,
                      int64_t columns, int64_t task, float* panels) {
  const int64_t packs = ceil_div(columns, kPackColumns);
  const int64_t t = task / packs * kMatmulChunk;
  const int64_t j = task % packs * kPackColumns;
  const int64_t count = min64(kMatmulChunk, depth - t);
  const int64_t width = min64(kPackColumns, columns - j);
  src += t * stride + j * column_stride;
  panels += matmul_panels(columns, depth, t, j);
  if (column_stride == 1) {
    pack_panels<kWidth>(src, stride, count, width, panels, count * kWidth);
  } else {
    pack_panels_transposed<kWidth>(src, stride, column_stride, count, width, panels,
                                   count * kWidth);
  }
}

int64_t matmul_packs(int64_t columns, int64_t depth) {
  return ceil_div(columns, kPackColumns) * ceil_div(depth, kMatmulChunk);
}

// Tasks are those of A, then those of B.
int matmul_pack(int64_t begin, int64_t end, const void* context) {
  const MatmulJob& job = *static_cast<const MatmulJob*>(context);
  const MatmulArguments& a = job.a;
  const int64_t A_packs = matmul_packs(job.rows, job.depth);
  for (int64_t task = begin; task < end; ++task) {
    if (task < A_packs) {
      matmul_pack_task<kOuterRows>(a.A + job.row * a.A_row + job.k * a.A_column, a.A_column,
                                   a.A_row, job.depth, job.rows, task, job.A);
    } else {
      matmul_pack_task<kOuterColumns>(a.B + job.k * a.B_row + job.column * a.B_column, a.B_row,
                                      a.B_column, job.depth, job.columns, task - A_packs, job.B);
    }
  }
  return HF_GPTQ_OK;
}

// C[j, i] = tile[i, j] for i < rows, j < columns; on the diagonal only for j < i.
void store_transposed(const float* tile, int64_t tile_stride, int64_t rows, int64_t columns,
                      bool diagonal, float* C, int64_t C_row) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = diagonal ? j + 1 : 0; i < rows; ++i) {
      C[j * C_row + i] = tile[i * tile_stride + j];
    }
  }
}

// The tile with its first element at (m, n) of the block.
void matmul_tile(const MatmulJob& job, int64_t m, int64_t n, float* scratch) {
  const MatmulArguments& a = job.a;
  const int64_t rows = min64(job.tile, job.rows - m);
  const int64_t columns = min64(job.tile, job.columns - n);
  const int64_t row = job.row + m;
  const int64_t column = job.column + n;
  const bool diagonal = a.lower && row == column;
  // An odd number of cache lines: the columns that store_transposed() reads spread over the cache.
  const int64_t stride = job.tile + 16;
  const bool load_C = a.accumulate || job.k > 0;
  if (!load_C || diagonal || rows < job.tile || columns < job.tile) {
    memset(scratch, 0, job.tile * stride * sizeof(float));
  }
  for (int64_t i = 0; i < rows && load_C; ++i) {
    copy_floats(a.C + (row + i) * a.C_row + column, diagonal ? i + 1 : columns,
                scratch + i * stride);
  }
  for (int64_t t = 0; t < job.depth; t += kMatmulChunk) {
    const int64_t count = min64(kMatmulChunk, job.depth - t);
    const float* A = job.A + matmul_panels(job.rows, job.depth, t, m);
    const float* B = job.B + matmul_panels(job.columns, job.depth, t, n);
    for (int64_t j = 0; j < columns; j += kOuterColumns) {
      for (int64_t i = diagonal ? j / kOuterRows * kOuterRows : 0; i < rows; i += kOuterRows) {
        outer_tile(A + i * count, B + j * count, count, scratch + i * stride + j, stride);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    copy_floats(scratch + i * stride, diagonal ? i + 1 : columns,
                a.C + (row + i) * a.C_row + column);
  }
  if (a.mirror && job.k + job.depth == a.K) {
    store_transposed(scratch, stride, rows, columns, diagonal, a.C + column * a.C_row + row,
                     a.C_row);
  }
}

// How many of a block's columns, counted in tiles, the row of tiles at m has.
int64_t matmul_row_tiles(const MatmulJob& job, int64_t m) {
  const int64_t all = ceil_div(job.columns, job.tile);
  if (!job.a.lower) return all;
  const int64_t to_diagonal = (job.row + m - job.column) / job.tile + 1;
  return to_diagonal < all ? to_diagonal : all;
}

int64_t matmul_tile_count(const MatmulJob& job) {
  int64_t count = 0;
  for (int64_t m = 0; m < job.rows; m += job.tile) count += matmul_row_tiles(job, m);
  return count;
}

// Tiles [begin, end) of the block in row-major order.
int matmul_tiles(int64_t begin, int64_t end, const void* context) {
  const MatmulJob& job = *static_cast<const MatmulJob*>(context);
  float* scratch = static_cast<float*>(thread_scratch(job.tile * (job.tile + 16) * sizeof(float)));
  if (!scratch) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  int64_t first = 0;
  for (int64_t m = 0; m < job.rows && first < end; m += job.tile) {
    const int64_t tiles = matmul_row_tiles(job, m);
    for (int64_t j = first < begin ? begin - first : 0; j < min64(tiles, end - first); ++j) {
      matmul_tile(job, m, j * job.tile, scratch);
    }
    first += tiles;
  }
  return HF_GPTQ_OK;
}

// Packs the blocks in hand and adds their product to C.
int matmul_block(MatmulJob& job) {
  const int64_t packs =
      matmul_packs(job.rows, job.depth) + (job.B_packed ? 0 : matmul_packs(job.columns, job.depth));
  // Packing a number takes about as long as 16 multiply-adds.
  const int64_t chunk = min64(kMatmulChunk, job.depth);
  const int error = parallel_for(packs, ceil_div(kMatmulWantedWork, 16 * kPackColumns * chunk),
                                 matmul_pack, &job);
  if (error != HF_GPTQ_OK) return error;
  job.tile = kMatmulTile;
  if (matmul_tile_count(job) < kMatmulWantedTiles) job.tile = kMatmulSmallTile;
  return parallel_for(matmul_tile_count(job),
                      ceil_div(kMatmulWantedWork, job.tile * job.tile * job.depth), matmul_tiles,
                      &job);
}

int matmul(const MatmulArguments& a) {
  if (a.K == 0) {
    for (int64_t m = 0; m < a.M && !a.accumulate; ++m) {
      memset(a.C + m * a.C_row, 0, a.N * sizeof(float));
    }
    return HF_GPTQ_OK;
  }
  const int64_t depth = min64(kMatmulDepth, a.K);
  const int64_t A_rows = ceil_div(min64(kMatmulBlock, a.M), kPackColumns) * kPackColumns;
  const int64_t B_columns = ceil_div(min64(kMatmulBlock, a.N), kPackColumns) * kPackColumns;
  const Buffer buffer((A_rows + B_columns) * depth * sizeof(float));
  float* panels = static_cast<float*>(buffer.data());
  if (!panels) return HF_GPTQ_ERROR_OUT_OF_MEMORY;

  for (int64_t n = 0; n < a.N; n += kMatmulBlock) {
    const int64_t columns = min64(kMatmulBlock, a.N - n);
    for (int64_t k = 0; k < a.K; k += kMatmulDepth) {
      const int64_t first = a.lower ? n : 0;
      for (int64_t m = first; m < a.M; m += kMatmulBlock) {
        MatmulJob job{a,
                      m,
                      min64(kMatmulBlock, a.M - m),
                      n,
                      columns,
                      k,
                      min64(kMatmulDepth, a.K - k),
                      0,
                      panels,
                      panels + A_rows * depth,
                      m != first};
        if (const int error = matmul_block(job)) return error;
      }
    }
  }
  return HF_GPTQ_OK;
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_MATMUL_H_
