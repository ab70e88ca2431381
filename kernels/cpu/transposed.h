// y = x @ weight, the product that carries gradients back. Internal linkage, see isa.h.
//
// A task owns some columns and some row blocks of y. It walks the outputs n of the weight in
// chunks:
//
//              kTransposedColumns columns
//            +-------+-------+-- ... --+
//   chunk of | panel | panel |         |  made dense: the panels stay in L2
//   outputs  +-------+-------+-- ... --+
//                x block (kOuterRows or fewer rows) times panel is added to y, in fp32 scratch
//
// so the dense weight exists nowhere. With bf16 the outputs go two at a time, as pairs.
#ifndef HF_GPTQ_CPU_TRANSPOSED_H_
#define HF_GPTQ_CPU_TRANSPOSED_H_

#include "dequantize.h"
#include "interleave.h"
#include "outer.h"
#include "parallel.h"
#include "row_blocks.h"
#include "scratch.h"

namespace hf_gptq {
namespace {

// Steps whose sum is added to y: part of the specification, as kMatmulChunk. A multiple of
// kBlockColumns.
constexpr int64_t kTransposedChunk = 256;
// Columns of a task, a multiple of kOuterColumns: what dequantize_tile() makes at a time.
constexpr int64_t kTransposedColumns = kDequantizeRows;
// Rows of x at a time: a task's y in fp32 stays in L2. Floats of x that are packed at a time, where
// that is more than a row block.
constexpr int64_t kTransposedRows = 480;
constexpr int64_t kTransposedPacked = int64_t{1} << 23;
static_assert(kTransposedChunk % kBlockColumns == 0 && kTransposedColumns % kOuterColumns == 0,
              "whole blocks and panels");
static_assert(kOuterRows <= kLanes, "what interleave() takes");
// Tasks wanted, and the least row blocks that are worth making a weight dense once more.
constexpr int64_t kTransposedTasks = 32, kTransposedTaskBlocks = 8;
#if defined(HF_GPTQ_SIMD_BF16)
constexpr bool kTransposedPairs = true;
#else
constexpr bool kTransposedPairs = false;
#endif

struct TransposedJob {
  const TransposedArguments& a;
  int64_t row_begin;  // first row of the slab
  RowBlocks rows;     // of the slab
  int64_t steps;      // outputs, or pairs of them
  float* x;  // by chunks, in these row blocks one after the other: [steps of the chunk, rows of the
             // block]
  int64_t task_row_blocks;
};

// The chunk's row block in x.
float* transposed_x_at(const TransposedJob& job, int64_t step, int64_t row_block) {
  const int64_t count = min64(kTransposedChunk, job.steps - step);
  return job.x + step * job.rows.all + job.rows.begin(row_block) * count;
}

// Packs row blocks [begin, end) of the slab.
template <bool kPairs>
int transposed_pack(int64_t begin, int64_t end, const void* context) {
  const TransposedJob& job = *static_cast<const TransposedJob*>(context);
  const TransposedArguments& a = job.a;
  constexpr int64_t kNumbers = kPairs ? 2 : 1;  // of a step
  alignas(64) float copy[kOuterRows * kTransposedChunk];
  for (int64_t block = begin; block < end; ++block) {
    const int rows = job.rows.size(block);
    for (int64_t step = 0; step < job.steps; step += kTransposedChunk) {
      const int64_t count = min64(kTransposedChunk, job.steps - step);
      const int64_t numbers = min64(count * kNumbers, a.weight.N - step * kNumbers);
      for (int r = 0; r < rows; ++r) {
        float* row = copy + r * count;
        const int64_t from =
            (job.row_begin + job.rows.begin(block) + r) * a.x_row_stride + step * kNumbers;
        if constexpr (kPairs) {
          row[count - 1] = 0.0f;  // half of it stays so where N is odd
          memcpy(row, static_cast<const uint16_t*>(a.x) + from, numbers * sizeof(uint16_t));
        } else {
          to_float(a.x, a.dtype, from, numbers, row);
        }
      }
      interleave(copy, count, rows, count, transposed_x_at(job, step, block));
    }
  }
  return HF_GPTQ_OK;
}

// Row `step` of the panels, which are `count` rows deep, from one output or from two, rounded.
template <bool kPairs>
HF_GPTQ_INLINE void write_panels(const float* lower, const float* upper, int64_t step,
                                 int64_t count, float* panels) {
  HF_GPTQ_UNROLL
  for (int64_t k = 0; k < kTransposedColumns; k += kLanes) {
    VecF values = load(lower + k);
#if defined(HF_GPTQ_SIMD_BF16)
    if constexpr (kPairs) values = bf16_pairs(values, load(upper + k));
#else
    (void)upper;
#endif
    const int64_t panel = k / kOuterColumns;
    store(panels + (panel * count + step) * kOuterColumns + k % kOuterColumns, values);
  }
}

// The panels of the chunk that begins at `step`, for columns [begin, end). `last`: the words of the
// last column block.
template <int kBits, bool kPairs>
void transposed_panels(const TransposedJob& job, int64_t step, int64_t begin, int64_t end,
                       const BlockWords& last, float* panels) {
  const hf_gptq_weight& w = job.a.weight;
  constexpr int kTogether = kPairs ? 2 : 1;
  const int64_t count = min64(kTransposedChunk, job.steps - step);
  alignas(64) float dense[kBlockColumns][kDequantizeRows];
  if (end - begin < kTransposedColumns) memset(dense, 0, sizeof dense);
  alignas(64) static constexpr float kNothing[kDequantizeRows] = {};
  for (int64_t i = 0; i < count; i += kBlockColumns / kTogether) {
    const int64_t block = (step + i) * kTogether / kBlockColumns;
    if (block == column_blocks(w.N)) break;  // steps may be more than outputs (tile_transposed.h)
    const BlockWords words =
        block == column_blocks(w.N) - 1 ? last : block_words(w, block, nullptr);
    dequantize_tile<kBits>(w, job.a.runs, words, block, begin, end, dense);
    const int64_t left = w.N - block * kBlockColumns;
    for (int64_t c = 0; c < kBlockColumns && c < left; c += kTogether) {
      const float* upper = c + 1 < left ? dense[(c + 1) % kBlockColumns] : kNothing;
      write_panels<kPairs>(dense[c], upper, i + c / kTogether, count, panels);
    }
  }
}

// Task t: columns t / row tasks, row task t % row tasks.
template <int kBits, bool kPairs>
int transposed_tasks(int64_t begin, int64_t end, const void* context) {
  const TransposedJob& job = *static_cast<const TransposedJob*>(context);
  const hf_gptq_weight& w = job.a.weight;
  const int64_t row_tasks = ceil_div(job.rows.count, job.task_row_blocks);
  const int64_t last_block = column_blocks(w.N) - 1;
  constexpr int64_t kPanelFloats = kTransposedChunk * kTransposedColumns;
  const int64_t y_floats =
      min64(job.task_row_blocks * job.rows.largest, job.rows.all) * kTransposedColumns;
  const int64_t copy_bytes = is_ragged(w, last_block) ? ragged_bytes(w) : 0;
  float* panels =
      static_cast<float*>(thread_scratch((kPanelFloats + y_floats) * sizeof(float) + copy_bytes));
  if (!panels) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  float* y = panels + kPanelFloats;
  const BlockWords last = block_words(w, last_block, reinterpret_cast<uint32_t*>(y + y_floats));
  const OuterTile multiply[2] = {outer_tile_for<kPairs>(job.rows.largest),
                                 outer_tile_for<kPairs>(job.rows.largest - 1)};
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
      transposed_panels<kBits, kPairs>(job, step, column, column + columns, last, panels);
      for (int64_t k = 0; k < columns; k += kOuterColumns) {
        for (int64_t block = first; block < after; ++block) {
          multiply[job.rows.size(block) < job.rows.largest](
              transposed_x_at(job, step, block), panels + k * count, count,
              y + (job.rows.begin(block) - first_row) * kTransposedColumns + k, kTransposedColumns);
        }
      }
    }
    for (int64_t m = 0; m < rows; ++m) {
      write_features(w.perm, w.K, job.row_begin + first_row + m, column, columns,
                     y + m * kTransposedColumns, job.a.y, job.a.dtype);
    }
  }
  return HF_GPTQ_OK;
}

using TransposedBody = int (*)(int64_t, int64_t, const void*);

// Slab after slab: `pack` for row blocks of at most `side` rows, then `tasks`. steps: see
// TransposedJob.
int run_transposed(const TransposedArguments& a, int64_t steps, int side, TransposedBody pack,
                   TransposedBody tasks) {
  const int64_t packed = kTransposedPacked / steps;
  const int64_t most = min64(kTransposedRows, packed > side ? packed : side);
  const int64_t slab = ceil_div(a.M, ceil_div(a.M, most));
  const Buffer buffer(ceil_div(slab, side) * side * steps * sizeof(float));
  if (!buffer.data()) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  for (int64_t row = 0; row < a.M; row += slab) {
    TransposedJob job{
        a, row, {min64(slab, a.M - row), side}, steps, static_cast<float*>(buffer.data()), 0};
    const int64_t column_tasks = ceil_div(a.weight.K, kTransposedColumns);
    const int64_t row_tasks = min64(ceil_div(kTransposedTasks, column_tasks),
                                    ceil_div(job.rows.count, kTransposedTaskBlocks));
    job.task_row_blocks = ceil_div(job.rows.count, row_tasks);
    const int64_t row_work = steps * job.rows.largest;
    int error = parallel_for(job.rows.count, ceil_div(kWantedWork, 16 * row_work), pack, &job);
    if (error != HF_GPTQ_OK) return error;
    error = parallel_tasks(column_tasks * ceil_div(job.rows.count, job.task_row_blocks), 1, tasks,
                           &job);
    if (error != HF_GPTQ_OK) return error;
  }
  return HF_GPTQ_OK;
}

template <int kBits, bool kPairs>
int transposed_by_steps(const TransposedArguments& a) {
  return run_transposed(a, ceil_div(a.weight.N, kPairs ? 2 : 1), kOuterRows,
                        transposed_pack<kPairs>, transposed_tasks<kBits, kPairs>);
}

template <int kBits>
int transposed_bits(const TransposedArguments& a) {
  if constexpr (kTransposedPairs) {
    if (a.dtype == HF_GPTQ_BF16) return transposed_by_steps<kBits, true>(a);
  }
  return transposed_by_steps<kBits, false>(a);
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_TRANSPOSED_H_
