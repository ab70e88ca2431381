// C += A^T B. Internal linkage, see isa.h.
//
// A slab of rows of A and B is packed into the panels of outer_tile(), once for all. Then a task
// owns a square tile of C: it loads the tile into scratch, adds the slab to it in chunks, and
// stores it.
//
//        j ->                        B == NULL: tiles on and above the diagonal; on the diagonal,
//      +-----+-----+-----+           only what outer_tile() needs to reach it. With the last slab a
//   i  |  \  |     |     |           tile is also stored transposed:
//   |  +-----+-----+-----+                C[i, j] above  ->  C[j, i] below
//   v        |  \  |     |
//            +-----+-----+           An element of C sees the same operations in the same order
//                  |  \  |           whatever the tiles and the threads are.
//                  +-----+
#ifndef HF_GPTQ_CPU_GRAM_H_
#define HF_GPTQ_CPU_GRAM_H_

#include "kernels.h"
#include "outer.h"
#include "parallel.h"
#include "scratch.h"

namespace hf_gptq {
namespace {

// Rows of A and B whose sum is added to C: part of the specification. A panel of B of this length
// stays in L1.
constexpr int64_t kGramChunk = 256;
// Rows packed at a time: bounds the memory.
constexpr int64_t kGramSlab = 2 * kGramChunk;
// Sides of a tile, multiples of kPackColumns. A tile of C and the panels of one chunk stay in L2.
constexpr int64_t kGramTile = 192;
constexpr int64_t kGramSmallTile = 96;
// Tiles wanted, so that an unknown number of threads finishes together.
constexpr int64_t kGramWantedTiles = 64;
// Multiply-adds that are worth waking a thread for.
constexpr int64_t kGramWantedWork = int64_t{1} << 18;

struct GramJob {
  const GramArguments& a;
  int64_t tile;  // side
  int64_t row_tiles, column_tiles;
  int64_t t, count;  // first row of the slab, rows in it
  float* A;          // panels [count, kOuterRows]
  float* B;          // panels [count, kOuterColumns]
};

// Tasks are kPackColumns columns of A, and if B is not A, then those of B.
int gram_pack(int64_t begin, int64_t end, const void* context) {
  const GramJob& job = *static_cast<const GramJob*>(context);
  const GramArguments& a = job.a;
  const int64_t A_tasks = ceil_div(a.Ka, kPackColumns);
  for (int64_t task = begin; task < end; ++task) {
    const bool is_A = task < A_tasks;
    const int64_t column = (is_A ? task : task - A_tasks) * kPackColumns;
    const int64_t columns = min64(kPackColumns, (is_A ? a.Ka : a.Kb) - column);
    const int64_t stride = is_A ? a.A_stride : a.B_stride;
    const float* src = (is_A ? a.A : a.B) + job.t * stride + column;
    if (is_A) {
      pack_panels<kOuterRows>(src, stride, job.count, columns, job.A + column * job.count,
                              job.count * kOuterRows);
    }
    if (!is_A || !a.B) {
      pack_panels<kOuterColumns>(src, stride, job.count, columns, job.B + column * job.count,
                                 job.count * kOuterColumns);
    }
  }
  return HF_GPTQ_OK;
}

// C[j, i] = tile[i, j] for i < rows, j < columns; on the diagonal only for i < j.
void store_transposed(const float* tile, int64_t tile_stride, int64_t rows, int64_t columns,
                      bool diagonal, float* C, int64_t C_stride) {
  for (int64_t j = 0; j < columns; ++j) {
    const int64_t end = diagonal ? j : rows;
    for (int64_t i = 0; i < end; ++i) C[j * C_stride + i] = tile[i * tile_stride + j];
  }
}

// The tile with its first element at C[row, column].
void gram_tile(const GramJob& job, int64_t row, int64_t column, float* scratch) {
  const GramArguments& a = job.a;
  const int64_t rows = min64(job.tile, a.Ka - row);
  const int64_t columns = min64(job.tile, a.Kb - column);
  const bool diagonal = !a.B && row == column;
  // An odd number of cache lines: the columns that store_transposed() reads spread over the cache.
  const int64_t stride = job.tile + 16;
  if (diagonal || rows < job.tile || columns < job.tile) {
    memset(scratch, 0, job.tile * stride * sizeof(float));
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t first = diagonal ? i : 0;
    copy_floats(a.C + (row + i) * a.Kb + column + first, columns - first,
                scratch + i * stride + first);
  }
  for (int64_t t = 0; t < job.count; t += kGramChunk) {
    const int64_t count = min64(kGramChunk, job.count - t);
    for (int64_t j = 0; j < columns; j += kOuterColumns) {
      const float* B = job.B + (column + j) * job.count + t * kOuterColumns;
      for (int64_t i = 0; i < (diagonal ? min64(rows, j + kOuterColumns) : rows); i += kOuterRows) {
        const float* A = job.A + (row + i) * job.count + t * kOuterRows;
        outer_tile(A, B, count, scratch + i * stride + j, stride);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t first = diagonal ? i : 0;
    copy_floats(scratch + i * stride + first, columns - first,
                a.C + (row + i) * a.Kb + column + first);
  }
  if (!a.B && job.t + job.count == a.T) {
    store_transposed(scratch, stride, rows, columns, diagonal, a.C + column * a.Kb + row, a.Kb);
  }
}

// Tiles [begin, end) in row-major order; of the square, or if B is A, of the upper triangle.
int gram_tiles(int64_t begin, int64_t end, const void* context) {
  const GramJob& job = *static_cast<const GramJob*>(context);
  float* scratch = static_cast<float*>(thread_scratch(job.tile * (job.tile + 16) * sizeof(float)));
  if (!scratch) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  int64_t task = 0;
  for (int64_t i = 0; i < job.row_tiles && task < end; ++i) {
    for (int64_t j = job.a.B ? 0 : i; j < job.column_tiles; ++j, ++task) {
      if (task >= begin && task < end) gram_tile(job, i * job.tile, j * job.tile, scratch);
    }
  }
  return HF_GPTQ_OK;
}

int64_t gram_tile_count(const GramArguments& a, int64_t side) {
  const int64_t row_tiles = ceil_div(a.Ka, side);
  return a.B ? row_tiles * ceil_div(a.Kb, side) : row_tiles * (row_tiles + 1) / 2;
}

int gram(const GramArguments& a) {
  const int64_t A_columns = ceil_div(a.Ka, kPackColumns) * kPackColumns;
  const int64_t B_columns = ceil_div(a.Kb, kPackColumns) * kPackColumns;
  const Buffer buffer((A_columns + B_columns) * min64(kGramSlab, a.T) * sizeof(float));
  float* panels = static_cast<float*>(buffer.data());
  if (!panels) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  const int64_t tile =
      gram_tile_count(a, kGramTile) >= kGramWantedTiles ? kGramTile : kGramSmallTile;
  const int64_t packs = (a.B ? A_columns + B_columns : A_columns) / kPackColumns;

  for (int64_t t = 0; t < a.T; t += kGramSlab) {
    const int64_t count = min64(kGramSlab, a.T - t);
    const GramJob job{a,     tile,   ceil_div(a.Ka, tile),      ceil_div(a.Kb, tile), t,
                      count, panels, panels + A_columns * count};
    // Packing a number takes about as long as 16 multiply-adds.
    int error =
        parallel_for(packs, ceil_div(kGramWantedWork, 16 * kPackColumns * count), gram_pack, &job);
    if (error != HF_GPTQ_OK) return error;
    error = parallel_for(gram_tile_count(a, tile), ceil_div(kGramWantedWork, tile * tile * count),
                         gram_tiles, &job);
    if (error != HF_GPTQ_OK) return error;
  }
  return HF_GPTQ_OK;
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_GRAM_H_
