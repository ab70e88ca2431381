// C = A B or C += A B, any strides. Internal linkage, see isa.h.
//
//               columns of a block
//             +---------------------+        A block of B is packed into the panels of
//             outer_tile(),
//   depth     |         B           |        by all threads; A beside it if it is small, else each
//             +---------------------+        task packs what it needs. Then a task owns a square
//             tile
//   +-----+   +------+------+-------+        of C, or some side by side: it loads the tile into
//   |  A  |   | tile | tile |       |        scratch, adds the blocks' product to it in chunks, and
//   |     |   +------+------+  C    |        stores it.
//   +-----+   |      |      |       |        lower: tiles on and below the diagonal; of those on
//   it, all rows  +------+------+-------+        what outer_tile() needs to reach it.
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
// Depth of a block, a multiple of kMatmulChunk: the rows of A that make one tile stay in L2.
// Columns of a block, a multiple of kMatmulTile. Floats of B or of A packed at a time: 7 MB, that a
// shared cache holds.
constexpr int64_t kMatmulDepth = 3 * kMatmulChunk;
constexpr int64_t kMatmulColumns = 12 * kMatmulTile;
constexpr int64_t kMatmulPacked = kMatmulColumns * kMatmulDepth;
// Rows of A up to which it is packed beside B.
constexpr int64_t kMatmulSharedRows = 8 * kMatmulTile;
// Tasks wanted, so that an unknown number of threads finishes together.
constexpr int64_t kMatmulWantedTasks = 64;

struct MatmulJob {
  const MatmulArguments& a;
  // The block in hand: C[:, column .. column + columns], products k .. k + depth.
  int64_t column, columns;
  int64_t k, depth;
  int64_t tile;   // side
  int64_t group;  // tiles per task, side by side
  float* A;       // for each chunk of the depth, panels [chunk, kOuterRows]; or null
  float* B;       // for each chunk of the depth, panels [chunk, kOuterColumns]
};

// Where the panels of column j, a multiple of kPackColumns, begin in the chunk that begins at t:
// the panels that are used together lie together.
int64_t matmul_panels(int64_t columns, int64_t depth, int64_t t, int64_t j) {
  return t * ceil_div(columns, kPackColumns) * kPackColumns + j * min64(kMatmulChunk, depth - t);
}

// Packs kPackColumns columns of one chunk: of the chunks and columns, number `task`. `matrix` is A
// or B, whose columns are packed from `first` on; stride: from one k to the next, column_stride:
// from one column to the next.
template <int kWidth>
void matmul_pack_task(const MatmulJob& job, const void* matrix, int64_t stride,
                      int64_t column_stride, int64_t first, int64_t columns, int64_t task,
                      float* panels) {
  const int64_t depth = job.depth;
  const int64_t packs = ceil_div(columns, kPackColumns);
  const int64_t t = task / packs * kMatmulChunk;
  const int64_t j = task % packs * kPackColumns;
  const int64_t count = min64(kMatmulChunk, depth - t);
  const int64_t width = min64(kPackColumns, columns - j);
  panels += matmul_panels(columns, depth, t, j);
  if (job.a.numbers > 0) {
    const int64_t number = 2 * (job.k + t);
    const uint16_t* src =
        static_cast<const uint16_t*>(matrix) + number * stride + (first + j) * column_stride;
    pack_panels_of_pairs<kWidth>(src, stride, column_stride,
                                 min64(2 * count, job.a.numbers - number), width, panels,
                                 count * kWidth);
    return;
  }
  const float* src =
      static_cast<const float*>(matrix) + (job.k + t) * stride + (first + j) * column_stride;
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

void matmul_pack_A(const MatmulJob& job, int64_t row, int64_t rows, int64_t task, float* panels) {
  const MatmulArguments& a = job.a;
  matmul_pack_task<kOuterRows>(job, a.A, a.A_column, a.A_row, row, rows, task, panels);
}

// Tasks are those of B, then those of A.
int matmul_pack(int64_t begin, int64_t end, const void* context) {
  const MatmulJob& job = *static_cast<const MatmulJob*>(context);
  const MatmulArguments& a = job.a;
  const int64_t B_packs = matmul_packs(job.columns, job.depth);
  for (int64_t task = begin; task < end; ++task) {
    if (task < B_packs) {
      matmul_pack_task<kOuterColumns>(job, a.B, a.B_row, a.B_column, job.column, job.columns, task,
                                      job.B);
    } else {
      matmul_pack_A(job, 0, a.M, task - B_packs, job.A);
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

// The tile that begins at C[row, column]. A: the panels of `A_rows` rows, of which the tile's are
// those from A_row on.
void matmul_tile(const MatmulJob& job, int64_t row, int64_t column, const float* A, int64_t A_rows,
                 int64_t A_row, float* scratch) {
  const MatmulArguments& a = job.a;
  const int64_t rows = min64(job.tile, a.M - row);
  const int64_t columns = min64(job.tile, job.column + job.columns - column);
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
    const float* chunk_A = A + matmul_panels(A_rows, job.depth, t, A_row);
    const float* chunk_B = job.B + matmul_panels(job.columns, job.depth, t, column - job.column);
    for (int64_t j = 0; j < columns; j += kOuterColumns) {
      for (int64_t i = diagonal ? j / kOuterRows * kOuterRows : 0; i < rows; i += kOuterRows) {
        const float* A_panel = chunk_A + i * count;
        const float* B_panel = chunk_B + j * count;
        float* corner = scratch + i * stride + j;
        if (a.numbers > 0) {
          outer_tile<true>(A_panel, B_panel, count, corner, stride);
        } else {
          outer_tile<false>(A_panel, B_panel, count, corner, stride);
        }
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

// How many tiles of the block the row of tiles at `row` has.
int64_t matmul_row_tiles(const MatmulJob& job, int64_t row) {
  const int64_t all = ceil_div(job.columns, job.tile);
  if (!job.a.lower) return all;
  return row < job.column ? 0 : min64(all, (row - job.column) / job.tile + 1);
}

int64_t matmul_task_count(const MatmulJob& job) {
  int64_t count = 0;
  for (int64_t row = 0; row < job.a.M; row += job.tile) {
    count += ceil_div(matmul_row_tiles(job, row), job.group);
  }
  return count;
}

constexpr int64_t kMatmulTileFloats = kMatmulTile * (kMatmulTile + 16);

// One task of the tiles at `row`: `tiles` of them from `column` on.
void matmul_group(const MatmulJob& job, int64_t row, int64_t column, int64_t tiles,
                  float* scratch) {
  const int64_t rows = min64(job.tile, job.a.M - row);
  float* panels = scratch + kMatmulTileFloats;
  if (!job.A) {
    for (int64_t task = 0; task < matmul_packs(rows, job.depth); ++task) {
      matmul_pack_A(job, row, rows, task, panels);
    }
  }
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t tile_column = column + i * job.tile;
    if (job.A) {
      matmul_tile(job, row, tile_column, job.A, job.a.M, row, scratch);
    } else {
      matmul_tile(job, row, tile_column, panels, rows, 0, scratch);
    }
  }
}

// Tasks [begin, end), by rows of tiles.
int matmul_tasks(int64_t begin, int64_t end, const void* context) {
  const MatmulJob& job = *static_cast<const MatmulJob*>(context);
  const int64_t panels = job.A ? 0 : kMatmulTile * job.depth;
  float* scratch =
      static_cast<float*>(thread_scratch((kMatmulTileFloats + panels) * sizeof(float)));
  if (!scratch) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  int64_t task = 0;
  for (int64_t row = 0; row < job.a.M && task < end; row += job.tile) {
    const int64_t tiles = matmul_row_tiles(job, row);
    const int64_t groups = ceil_div(tiles, job.group);
    for (int64_t g = task < begin ? begin - task : 0; g < min64(groups, end - task); ++g) {
      const int64_t first = g * job.group;
      matmul_group(job, row, job.column + first * job.tile, min64(job.group, tiles - first),
                   scratch);
    }
    task += groups;
  }
  return HF_GPTQ_OK;
}

// Adds the block's product to C.
int matmul_block(MatmulJob& job) {
  const int64_t packs =
      matmul_packs(job.columns, job.depth) + (job.A ? matmul_packs(job.a.M, job.depth) : 0);
  // Packing a number takes about as long as 16 multiply-adds.
  const int64_t pack_work = 16 * kPackColumns * min64(kMatmulChunk, job.depth);
  const int error = parallel_tasks(packs, ceil_div(kWantedWork, pack_work), matmul_pack, &job);
  if (error != HF_GPTQ_OK) return error;

  job.tile = kMatmulTile;
  job.group = 1;
  if (job.A) {
    if (matmul_task_count(job) < kMatmulWantedTasks) job.tile = kMatmulSmallTile;
  } else {
    // The more tiles a task has, the more often it uses the rows of A that it packs.
    job.group = kMatmulColumns / kMatmulTile;
    while (job.group > 2 && matmul_task_count(job) < kMatmulWantedTasks) --job.group;
  }
  const int64_t work = job.tile * job.tile * job.group * job.depth;
  return parallel_tasks(matmul_task_count(job), ceil_div(kWantedWork, work), matmul_tasks, &job);
}

int matmul(const MatmulArguments& a) {
  if (a.K == 0) {
    for (int64_t m = 0; m < a.M && !a.accumulate; ++m) {
      memset(a.C + m * a.C_row, 0, a.N * sizeof(float));
    }
    return HF_GPTQ_OK;
  }
  const int64_t columns = ceil_div(min64(kMatmulColumns, a.N), kPackColumns) * kPackColumns;
  const int64_t rows = a.M <= kMatmulSharedRows ? ceil_div(a.M, kPackColumns) * kPackColumns : 0;
  int64_t block_depth = kMatmulDepth;
  if (rows > 0) {
    // The deeper a block, the fewer times threads wait for each other.
    const int64_t wider = rows > columns ? rows : columns;
    block_depth = kMatmulPacked / wider / kMatmulChunk * kMatmulChunk;
  }
  const int64_t depth = min64(block_depth, a.K);
  const Buffer buffer((columns + rows) * depth * sizeof(float));
  float* panels = static_cast<float*>(buffer.data());
  if (!panels) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  float* A = rows > 0 ? panels + columns * depth : nullptr;

  for (int64_t n = 0; n < a.N; n += kMatmulColumns) {
    for (int64_t k = 0; k < a.K; k += depth) {
      MatmulJob job{a, n,     min64(kMatmulColumns, a.N - n), k, min64(depth, a.K - k), 0, 0,
                    A, panels};
      if (const int error = matmul_block(job)) return error;
    }
  }
  return HF_GPTQ_OK;
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_MATMUL_H_
