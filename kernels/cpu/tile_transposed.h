// y = x @ weight for bf16, by tiles: as transposed.h, whose panels it takes 16 steps and 16 columns
// at a time. Internal linkage, see isa.h.
#ifndef HF_GPTQ_CPU_TILE_TRANSPOSED_H_
#define HF_GPTQ_CPU_TILE_TRANSPOSED_H_

#include "tiles.h"
#include "transposed.h"

namespace hf_gptq {
namespace {

constexpr int64_t kTilesOfChunk = kTransposedChunk / kTileSide;
static_assert(kTransposedChunk % kTileSide == 0 && kOuterColumns == 2 * kTileSide,
              "whole tiles; a panel is two of them wide");

// The tiles of a row tile in x, [steps / kTileSide, kTileSide, kTileSide].
float* row_tile_at(const TransposedJob& job, int64_t row_tile) {
  return job.x + row_tile * job.steps * kTileSide;
}

// Packs row tiles [begin, end) of the slab.
int pack_transposed_tiles(int64_t begin, int64_t end, const void* context) {
  const TransposedJob& job = *static_cast<const TransposedJob*>(context);
  const TransposedArguments& a = job.a;
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int r = 0; r < job.rows.size(tile); ++r) {
      const uint16_t* x = static_cast<const uint16_t*>(a.x) +
                          (job.row_begin + job.rows.begin(tile) + r) * a.x_row_stride;
      float* out = row_tile_at(job, tile) + r * kTileSide;
      for (int64_t n = 0; n < 2 * job.steps; n += 2 * kTileSide, out += kTileFloats) {
        const int64_t numbers = min64(2 * kTileSide, a.weight.N - n);
        if (numbers < 2 * kTileSide) memset(out, 0, kTileSide * sizeof(float));
        if (numbers > 0) memcpy(out, x + n, numbers * sizeof(uint16_t));
      }
    }
  }
  return HF_GPTQ_OK;
}

// Adds the product of kRowTiles row tiles and a panel of `count` steps, a multiple of kTileSide, to
// y, whose rows are kTransposedColumns apart. x: at the chunk.
template <int kRowTiles>
void add_tile_products(const float* x, int64_t x_apart, const float* panel, int64_t count,
                       const int (&rows)[2], float* sums, float* y) {
  using Product = TileProduct<kRowTiles, 2>;
  Product::zero();
  for (int64_t t = 0; t < count; t += kTileSide) {
    Product::add(x + t * kTileSide, x_apart, panel + t * kOuterColumns, kTileSide,
                 kOuterColumns * sizeof(float));
  }
  Product::store(sums, 2 * kTileFloats, kTileSide, kOuterColumns * sizeof(float));
  for (int tile = 0; tile < kRowTiles; ++tile) {
    const float* sum = sums + tile * 2 * kTileFloats;
    for (int r = 0; r < rows[tile]; ++r, sum += kOuterColumns, y += kTransposedColumns) {
      HF_GPTQ_UNROLL
      for (int v = 0; v < kOuterColumns; v += kLanes) store(y + v, load(y + v) + load(sum + v));
    }
  }
}

// Task t: columns t / row tasks, row task t % row tasks.
template <int kBits>
int tile_transposed_tasks(int64_t begin, int64_t end, const void* context) {
  const TransposedJob& job = *static_cast<const TransposedJob*>(context);
  const hf_gptq_weight& w = job.a.weight;
  const int64_t row_tasks = ceil_div(job.rows.count, job.task_row_blocks);
  const int64_t last_block = column_blocks(w.N) - 1;
  constexpr int64_t kPanelFloats = kTransposedChunk * kTransposedColumns;
  constexpr int64_t kSumFloats = 4 * kTileFloats;
  const int64_t y_floats =
      min64(job.task_row_blocks * job.rows.largest, job.rows.all) * kTransposedColumns;
  const int64_t copy_bytes = is_ragged(w, last_block) ? ragged_bytes(w) : 0;
  float* panels = static_cast<float*>(
      thread_scratch((kPanelFloats + kSumFloats + y_floats) * sizeof(float) + copy_bytes));
  if (!panels) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  float* sums = panels + kPanelFloats;
  float* y = sums + kSumFloats;
  const BlockWords last = block_words(w, last_block, reinterpret_cast<uint32_t*>(y + y_floats));
  const int64_t apart = job.steps * kTileSide;
  int configured[2] = {0, 0};
  for (int64_t t = begin; t < end; ++t) {
    const int64_t column = t / row_tasks * kTransposedColumns;
    const int64_t columns = min64(kTransposedColumns, w.K - column);
    const int64_t first = t % row_tasks * job.task_row_blocks;
    const int64_t after = min64(first + job.task_row_blocks, job.rows.count);
    const int64_t first_row = job.rows.begin(first);
    const int64_t rows = job.rows.begin(after) - first_row;
    memset(y, 0, rows * kTransposedColumns * sizeof(float));
    for (int64_t step = 0; step < job.steps; step += kTransposedChunk) {
      const int64_t count = min64(kTransposedChunk, job.steps - step);
      // Steps beyond the outputs are zeros in x, and must be numbers here.
      if ((step + count) * 2 > w.N) memset(panels, 0, kPanelFloats * sizeof(float));
      transposed_panels<kBits, true>(job, step, column, column + columns, last, panels);
      for (int64_t tile = first; tile < after; tile += 2) {
        const int sizes[2] = {job.rows.size(tile), tile + 1 < after ? job.rows.size(tile + 1) : 0};
        if (sizes[0] != configured[0] || sizes[1] != configured[1]) {
          if (sizes[1] > 0) {
            TileProduct<2, 2>::configure(sizes);
          } else {
            TileProduct<1, 2>::configure({sizes[0]});
          }
          configured[0] = sizes[0];
          configured[1] = sizes[1];
        }
        const float* x = row_tile_at(job, tile) + step * kTileSide;
        float* out = y + (job.rows.begin(tile) - first_row) * kTransposedColumns;
        for (int64_t k = 0; k < columns; k += kOuterColumns) {
          const auto add = sizes[1] > 0 ? add_tile_products<2> : add_tile_products<1>;
          add(x, apart, panels + k * count, count, sizes, sums, out + k);
        }
      }
    }
    for (int64_t m = 0; m < rows; ++m) {
      write_features(w.perm, w.K, job.row_begin + first_row + m, column, columns,
                     y + m * kTransposedColumns, job.a.y, job.a.dtype);
    }
  }
  release_tiles();
  return HF_GPTQ_OK;
}

template <int kBits>
int tile_transposed(const TransposedArguments& a) {
  return run_transposed(a, ceil_div(a.weight.N, 2 * kTileSide) * kTileSide, kTileSide,
                        pack_transposed_tiles, tile_transposed_tasks<kBits>);
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_TILE_TRANSPOSED_H_
