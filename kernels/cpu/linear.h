// y = x @ weight^T + bias. Internal linkage, see isa.h.
//
// Few rows: `stream` decodes each word once into registers and uses it for all rows.
//
// Many rows: a task owns some column blocks and some row blocks. It walks K in chunks:
//
//             16 * kGroupBlocks columns
//            +-------+-------+-- ... --+
//   chunk of | panel | panel |         |  decoded to fp32: a panel stays in L1,
//   K        +-------+-------+-- ... --+  a chunk in L2
//                x block (kTileRows or fewer rows) times panel -> `tile`, accumulators in registers
//
// In both a (row, column) pair sees the operations documented for hf_gptq_linear in the same order,
// whatever the number of rows: that is what makes a row's bits independent of the batch.
//
// What is multiplied in one step is a matter of Codes (codes.h): one code and one fp32, or two
// codes and two bf16. x is packed in blocks of `rows` rows: row m of step i at (i * rows + m %
// rows) of block m / rows. Rows that fill up the last block are zero.
#ifndef HF_GPTQ_CPU_LINEAR_H_
#define HF_GPTQ_CPU_LINEAR_H_

#include "codes.h"
#include "parallel.h"
#include "scratch.h"

namespace hf_gptq {
namespace {

// Register blocking: kTileRows x kTileBlocks blocks of accumulators in tile(), and in stream() as
// many blocks as hide the latency of the fma chain.
#if defined(HF_GPTQ_EMULATE)
// Every vector is two: what is fast elsewhere would take minutes to compile.
constexpr int kTileRows = 3, kTileBlocks = 2;
constexpr int kStreamRows = 2;
constexpr int stream_blocks(int /*rows*/) { return 2; }
#elif defined(HF_GPTQ_SIMD_AVX512F)
constexpr int kTileRows = 12, kTileBlocks = 2;
constexpr int kStreamRows = 8;
constexpr int stream_blocks(int rows) { return rows <= 4 ? 4 : 2; }
#elif defined(HF_GPTQ_SIMD_AVX2)
constexpr int kTileRows = 6, kTileBlocks = 1;
constexpr int kStreamRows = 4;
constexpr int stream_blocks(int rows) { return rows <= 2 ? 2 : 1; }
#else
constexpr int kTileRows = 3, kTileBlocks = 1;
constexpr int kStreamRows = 2;
constexpr int stream_blocks(int /*rows*/) { return 1; }
#endif

constexpr int kTileColumns = kTileBlocks * kBlockColumns;
constexpr int kTileVectors = kTileColumns / kLanes;
constexpr int kGroupBlocks = 8;
constexpr int kGroupPanels = kGroupBlocks / kTileBlocks;
// A panel takes kChunk * kTileColumns * 4 bytes, 16 KiB at most.
constexpr int kChunk = 128;
// Runs per chunk: bounds the scales kept beside a chunk.
constexpr int kChunkRuns = 8;
// Row blocks of one task: 240 rows, whose chunk of x stays in L2.
constexpr int64_t kTaskRowBlocks = 240 / kTileRows;
// Row blocks packed at a time: bounds the memory for x.
constexpr int64_t kSlabRowBlocks = 4 * kTaskRowBlocks;
// Tasks wanted, so that an unknown number of threads finishes together.
constexpr int64_t kWantedTasks = 64;
// Runs ahead of the one in use whose scales and zeros stream() prefetches.
constexpr int64_t kPrefetchRuns = 4;
// Multiply-adds that are worth waking a thread for.
constexpr int64_t kWantedWork = int64_t{1} << 18;

struct LinearJob {
  const LinearArguments& a;
  const Stretch* stretches;  // one per run
  int64_t steps;             // of all stretches
  int rows;                  // rows per row block
  int64_t row_begin;         // first row of the slab
  int64_t row_count;         // rows in the slab
  const float* x;            // packed slab
  int64_t task_row_blocks;
};

HF_GPTQ_INLINE int64_t grain_for(int64_t work_per_task) {
  return ceil_div(kWantedWork, work_per_task);
}

struct PackJob {
  const LinearJob& job;
  float* packed;
};

// Packs row blocks [begin, end) of the slab.
template <class Codes>
int pack_x(int64_t begin, int64_t end, const void* context) {
  const LinearJob& job = static_cast<const PackJob*>(context)->job;
  for (int64_t block = begin; block < end; ++block) {
    float* packed = static_cast<const PackJob*>(context)->packed + block * job.steps * job.rows;
    for (int r = 0; r < job.rows; ++r) {
      const int64_t m = block * job.rows + r;
      if (m >= job.row_count) {
        for (int64_t i = 0; i < job.steps; ++i) packed[i * job.rows + r] = 0.0f;
      } else if (!Codes::pack_row(job.a, job.row_begin + m, packed + r, job.rows)) {
        return HF_GPTQ_ERROR_OUT_OF_MEMORY;
      }
    }
  }
  return HF_GPTQ_OK;
}

// Adds the bias to `count` columns of row m and writes them. total has count rounded up to a block.
void write_row(const LinearArguments& a, int64_t m, int64_t column, int64_t count, float* total) {
  if (a.bias) {
    float bias[kTileColumns];
    to_float(a.bias, a.dtype, column, count, bias);
    for (int64_t c = 0; c < count; ++c) total[c] += bias[c];
  }
  from_float(total, count, a.y, a.dtype, m * a.weight.N + column);
}

// All rows (kRows of them) times kBlocks column blocks, `words` with one row stride.
template <class Codes, int kRows, int kBlocks>
void stream(const LinearJob& job, int64_t block, const uint32_t* const (&words)[kBlocks],
            int64_t row_stride) {
  constexpr int kVectors = kBlocks * kBlockVectors;
  const hf_gptq_weight& w = job.a.weight;
  alignas(64) float scale[kBlocks * kBlockColumns];
  alignas(64) float zero[kBlocks * kBlockColumns];
  alignas(64) float total[kRows][kBlocks * kBlockColumns] = {};
  for (int64_t run = 0; run < job.a.runs.count; ++run) {
    const Stretch& r = job.stretches[run];
    if (run + kPrefetchRuns < job.a.runs.count) {
      prefetch_group(w, job.stretches[run + kPrefetchRuns].group, block, kBlocks);
    }
    for (int b = 0; b < kBlocks; ++b) {
      load_group<Codes::kBits>(w, r.group, block + b, scale + b * kBlockColumns,
                               zero + b * kBlockColumns);
    }
    VecF zeros[kVectors];
    HF_GPTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) zeros[v] = load(zero + v * kLanes);
    VecF sum[kRows][kVectors] = {};
    const float* x = job.x + r.begin * kRows;
    Codes::decode(w, words, row_stride, r.code, r.end - r.begin, zeros,
                  [&](int64_t i, const VecF(&values)[kVectors]) __attribute__((always_inline)) {
                    HF_GPTQ_UNROLL
                    for (int m = 0; m < kRows; ++m) {
                      const VecF xm = splat(x[i * kRows + m]);
                      HF_GPTQ_UNROLL
                      for (int v = 0; v < kVectors; ++v) {
                        sum[m][v] = multiply_add<Codes::kCodes>(values[v], xm, sum[m][v]);
                      }
                    }
                  });
    HF_GPTQ_UNROLL
    for (int m = 0; m < kRows; ++m) {
      HF_GPTQ_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        float* t = total[m] + v * kLanes;
        store(t, fmadd(sum[m][v], load(scale + v * kLanes), load(t)));
      }
    }
  }
  for (int b = 0; b < kBlocks; ++b) {
    const int64_t column = (block + b) * kBlockColumns;
    for (int m = 0; m < kRows; ++m) {
      write_row(job.a, job.row_begin + m, column, min64(kBlockColumns, w.N - column),
                total[m] + b * kBlockColumns);
    }
  }
}

// Tasks are groups of stream_blocks(kRows) column blocks.
template <class Codes, int kRows>
int stream_groups(int64_t begin, int64_t end, const void* context) {
  constexpr int kBlocks = stream_blocks(kRows);
  const LinearJob& job = *static_cast<const LinearJob*>(context);
  const hf_gptq_weight& w = job.a.weight;
  const int64_t blocks = column_blocks(w.N);
  uint32_t* copy = nullptr;
  if (min64(end * kBlocks, blocks) == blocks && is_ragged(w, blocks - 1)) {
    copy = static_cast<uint32_t*>(thread_scratch(ragged_bytes(w)));
    if (!copy) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  }
  for (int64_t block = begin * kBlocks; block < min64(end * kBlocks, blocks);) {
    if (block + kBlocks <= blocks && !is_ragged(w, block + kBlocks - 1)) {
      const uint32_t* words[kBlocks];
      for (int b = 0; b < kBlocks; ++b) words[b] = block_words(w, block + b, nullptr).words;
      stream<Codes, kRows, kBlocks>(job, block, words, w.row_stride);
      block += kBlocks;
    } else {
      const BlockWords b = block_words(w, block, copy);
      const uint32_t* words[1] = {b.words};
      stream<Codes, kRows, 1>(job, block, words, b.row_stride);
      block += 1;
    }
  }
  return HF_GPTQ_OK;
}

// The part of a stretch that lies in a chunk.
struct Segment {
  int64_t begin, end;  // steps
  int64_t code, group;
  bool first, last;  // whether it holds the stretch's begin and end
};

// Continues the sums of kRows rows over `count` steps, and folds them into total at the end of the
// stretch. x: packed rows at the segment's begin; panel: [count, kTileColumns]; sum and total:
// [kRows, kTileColumns].
template <int kCodes, int kRows>
void tile(const float* x, const float* panel, int64_t count, const float* scale, bool first,
          bool last, float* sum, float* total) {
  VecF acc[kRows][kTileVectors];
  HF_GPTQ_UNROLL
  for (int m = 0; m < kRows; ++m) {
    HF_GPTQ_UNROLL
    for (int v = 0; v < kTileVectors; ++v) {
      acc[m][v] = first ? VecF{} : load(sum + m * kTileColumns + v * kLanes);
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    VecF values[kTileVectors];
    HF_GPTQ_UNROLL
    for (int v = 0; v < kTileVectors; ++v) values[v] = load(panel + v * kLanes);
    HF_GPTQ_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const VecF xm = splat(x[m]);
      HF_GPTQ_UNROLL
      for (int v = 0; v < kTileVectors; ++v) {
        acc[m][v] = multiply_add<kCodes>(values[v], xm, acc[m][v]);
      }
    }
    panel += kTileColumns;
    x += kRows;
  }
  HF_GPTQ_UNROLL
  for (int m = 0; m < kRows; ++m) {
    HF_GPTQ_UNROLL
    for (int v = 0; v < kTileVectors; ++v) {
      float* t = total + m * kTileColumns + v * kLanes;
      if (last) {
        store(t, fmadd(acc[m][v], load(scale + v * kLanes), load(t)));
      } else {
        store(sum + m * kTileColumns + v * kLanes, acc[m][v]);
      }
    }
  }
}

// Scratch of one task.
struct PanelScratch {
  float* panels;   // [kGroupPanels, kChunk, kTileColumns]
  float* scales;   // [kChunkRuns, kGroupPanels, kTileColumns]
  float* sums;     // [row blocks, kGroupPanels, rows, kTileColumns]
  float* totals;   // as sums
  uint32_t* copy;  // ragged_bytes
};

constexpr int64_t kPanelFloats = int64_t{kChunk} * kTileColumns;
constexpr int64_t kGroupColumns = kGroupBlocks * kBlockColumns;

// Decodes one segment of column block `b` of the group into its panel, at row `at` of the chunk.
template <class Codes>
void decode_segment(const hf_gptq_weight& w, const Segment& segment, int64_t group_block, int b,
                    const BlockWords& block, int64_t at, float* scales,
                    const PanelScratch& scratch) {
  alignas(64) float zero[kBlockColumns];
  load_group<Codes::kBits>(w, segment.group, group_block + b, scales + b * kBlockColumns, zero);
  VecF zeros[kBlockVectors];
  HF_GPTQ_UNROLL
  for (int v = 0; v < kBlockVectors; ++v) zeros[v] = load(zero + v * kLanes);
  const uint32_t* words[1] = {block.words};
  float* panel = scratch.panels + b / kTileBlocks * kPanelFloats + at * kTileColumns +
                 b % kTileBlocks * kBlockColumns;
  Codes::decode(w, words, block.row_stride, segment.code, segment.end - segment.begin, zeros,
                [&](int64_t i, const VecF(&values)[kBlockVectors]) __attribute__((always_inline)) {
                  float* p = panel + i * kTileColumns;
                  HF_GPTQ_UNROLL
                  for (int v = 0; v < kBlockVectors; ++v) store(p + v * kLanes, values[v]);
                });
}

using Tile = void (*)(const float*, const float*, int64_t, const float*, bool, bool, float*,
                      float*);

template <int kCodes, int kRows>
Tile tile_for(int rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_for<kCodes, kRows - 1>(rows);
  }
  return tile<kCodes, kRows>;
}

// Row blocks [row_begin, row_end) of the slab times column blocks [block, block + blocks).
template <class Codes>
void panel_task(const LinearJob& job, int64_t row_begin, int64_t row_end, int64_t block, int blocks,
                const PanelScratch& scratch) {
  const hf_gptq_weight& w = job.a.weight;
  const int rows = job.rows;
  const Tile tile_rows = tile_for<Codes::kCodes, kTileRows>(rows);
  const int panels = static_cast<int>(ceil_div(blocks, kTileBlocks));
  const int64_t tile_floats = int64_t{rows} * kTileColumns;
  memset(scratch.totals, 0, (row_end - row_begin) * kGroupPanels * tile_floats * sizeof(float));
  if (blocks % kTileBlocks != 0) {
    // The missing block of the last panel is computed with the others, from zeros.
    memset(scratch.panels + (panels - 1) * kPanelFloats, 0, kPanelFloats * sizeof(float));
    memset(scratch.scales, 0, kChunkRuns * kGroupColumns * sizeof(float));
  }
  BlockWords words[kGroupBlocks];
  for (int b = 0; b < blocks; ++b) words[b] = block_words(w, block + b, scratch.copy);

  int64_t run = 0;
  int64_t step = 0;
  while (step < job.steps) {
    Segment segments[kChunkRuns];
    int count = 0;
    const int64_t chunk_begin = step;
    while (count < kChunkRuns && step < job.steps && step < chunk_begin + kChunk) {
      const Stretch& r = job.stretches[run];
      const int64_t end = min64(r.end, chunk_begin + kChunk);
      const int64_t code = r.code + (step - r.begin) * Codes::kCodes;
      segments[count++] = {step, end, code, r.group, step == r.begin, end == r.end};
      if (end == r.end) ++run;
      step = end;
    }
    for (int s = 0; s < count; ++s) {
      for (int b = 0; b < blocks; ++b) {
        decode_segment<Codes>(w, segments[s], block, b, words[b], segments[s].begin - chunk_begin,
                              scratch.scales + s * kGroupColumns, scratch);
      }
    }
    for (int p = 0; p < panels; ++p) {
      for (int64_t row_block = row_begin; row_block < row_end; ++row_block) {
        const int64_t tile_at = ((row_block - row_begin) * kGroupPanels + p) * tile_floats;
        for (int s = 0; s < count; ++s) {
          const Segment& segment = segments[s];
          tile_rows(
              job.x + (row_block * job.steps + segment.begin) * rows,
              scratch.panels + p * kPanelFloats + (segment.begin - chunk_begin) * kTileColumns,
              segment.end - segment.begin, scratch.scales + s * kGroupColumns + p * kTileColumns,
              segment.first, segment.last, scratch.sums + tile_at, scratch.totals + tile_at);
        }
      }
    }
  }

  for (int64_t row_block = row_begin; row_block < row_end; ++row_block) {
    for (int r = 0; r < rows; ++r) {
      const int64_t m = row_block * rows + r;
      if (m >= job.row_count) break;
      for (int p = 0; p < panels; ++p) {
        const int64_t column = block * kBlockColumns + p * kTileColumns;
        write_row(job.a, job.row_begin + m, column, min64(kTileColumns, w.N - column),
                  scratch.totals + ((row_block - row_begin) * kGroupPanels + p) * tile_floats +
                      r * kTileColumns);
      }
    }
  }
}

// Task t: column group t / row tasks, row task t % row tasks.
template <class Codes>
int panel_tasks(int64_t begin, int64_t end, const void* context) {
  const LinearJob& job = *static_cast<const LinearJob*>(context);
  const hf_gptq_weight& w = job.a.weight;
  const int64_t row_blocks = ceil_div(job.row_count, job.rows);
  const int64_t row_tasks = ceil_div(row_blocks, job.task_row_blocks);
  const int64_t blocks = column_blocks(w.N);

  const int64_t panels = kGroupPanels * kPanelFloats;
  const int64_t scales = kChunkRuns * kGroupColumns;
  const int64_t sums = job.task_row_blocks * job.rows * kGroupColumns;
  const int64_t copy = is_ragged(w, blocks - 1) ? ragged_bytes(w) : 0;
  float* memory =
      static_cast<float*>(thread_scratch((panels + scales + 2 * sums) * sizeof(float) + copy));
  if (!memory) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  PanelScratch scratch;
  scratch.panels = memory;
  scratch.scales = scratch.panels + panels;
  scratch.sums = scratch.scales + scales;
  scratch.totals = scratch.sums + sums;
  scratch.copy = reinterpret_cast<uint32_t*>(scratch.totals + sums);

  for (int64_t t = begin; t < end; ++t) {
    const int64_t block = t / row_tasks * kGroupBlocks;
    const int64_t row_block = t % row_tasks * job.task_row_blocks;
    panel_task<Codes>(job, row_block, min64(row_block + job.task_row_blocks, row_blocks), block,
                      static_cast<int>(min64(kGroupBlocks, blocks - block)), scratch);
  }
  return HF_GPTQ_OK;
}

template <class Codes, int kRows>
int run_stream(const LinearJob& job) {
  if constexpr (kRows > 1) {
    if (job.rows < kRows) return run_stream<Codes, kRows - 1>(job);
  }
  constexpr int kBlocks = stream_blocks(kRows);
  return parallel_for(ceil_div(column_blocks(job.a.weight.N), kBlocks),
                      grain_for(job.steps * kRows * kBlocks * kBlockColumns),
                      stream_groups<Codes, kRows>, &job);
}

template <class Codes>
int run_panels(LinearJob job) {
  const int64_t row_blocks = ceil_div(job.row_count, job.rows);
  const int64_t groups = ceil_div(column_blocks(job.a.weight.N), kGroupBlocks);
  // Enough row tasks for the wanted number in all, of at least 4 row blocks each so that decoding
  // stays a small part, of equal size, and within what a task's scratch is meant for.
  int64_t row_tasks = min64(ceil_div(kWantedTasks, groups), ceil_div(row_blocks, 4));
  const int64_t least = ceil_div(row_blocks, kTaskRowBlocks);
  if (row_tasks < least) row_tasks = least;
  job.task_row_blocks = ceil_div(row_blocks, row_tasks);
  row_tasks = ceil_div(row_blocks, job.task_row_blocks);
  return parallel_for(groups * row_tasks,
                      grain_for(job.steps * kGroupColumns * job.task_row_blocks * job.rows),
                      panel_tasks<Codes>, &job);
}

// Writes the stretch of each run; returns their steps.
template <class Codes>
int64_t find_stretches(const Runs& runs, Stretch* stretches) {
  int64_t step = 0;
  for (int64_t i = 0; i < runs.count; ++i) {
    const Run& run = runs.data[i];
    const int64_t end = step + Codes::steps(run);
    stretches[i] = {step, end, Codes::first(run), run.group};
    step = end;
  }
  return step;
}

template <class Codes>
int run_linear(const LinearArguments& a, const Stretch* stretches, int64_t steps) {
  // Row blocks of equal size: 13 rows are 7 + 6, not 12 + 1.
  const int rows = static_cast<int>(ceil_div(a.M, ceil_div(a.M, kTileRows)));
  if (Codes::kCodes == 1 && a.M == 1 && a.dtype == HF_GPTQ_FP32 && !a.weight.perm) {
    const float* x = static_cast<const float*>(a.x);
    return run_stream<Codes, 1>({a, stretches, steps, 1, 0, 1, x, 1});
  }
  const int64_t slab_rows = min64(kSlabRowBlocks * rows, ceil_div(a.M, rows) * rows);
  const Buffer buffer(slab_rows * steps * sizeof(float));
  float* packed = static_cast<float*>(buffer.data());
  if (!packed) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  for (int64_t begin = 0; begin < a.M; begin += slab_rows) {
    const int64_t count = min64(slab_rows, a.M - begin);
    const LinearJob job{a, stretches, steps, rows, begin, count, packed, 1};
    const PackJob pack{job, packed};
    int error =
        parallel_for(ceil_div(count, rows), grain_for(16 * steps * rows), pack_x<Codes>, &pack);
    if (error != HF_GPTQ_OK) return error;
    error = a.M <= kStreamRows ? run_stream<Codes, kStreamRows>(job) : run_panels<Codes>(job);
    if (error != HF_GPTQ_OK) return error;
  }
  return HF_GPTQ_OK;
}

template <int kBits>
int linear_bits(const LinearArguments& a) {
  const Buffer buffer(a.runs.count * sizeof(Stretch));
  Stretch* stretches = static_cast<Stretch*>(buffer.data());
  if (!stretches) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
#if defined(HF_GPTQ_SIMD_BF16)
  if (a.dtype == HF_GPTQ_BF16) {
    using Any = Pairs<kBits, false>;
    using Symmetric = Pairs<kBits, kBits == 2 || kBits == 4>;
    const int64_t steps = find_stretches<Any>(a.runs, stretches);
    // Where groups change within units, units are decoded more than once.
    if (steps <= a.weight.K) {
      return a.weight.qzeros ? run_linear<Any>(a, stretches, steps)
                             : run_linear<Symmetric>(a, stretches, steps);
    }
  }
#endif
  const int64_t steps = find_stretches<Floats<kBits>>(a.runs, stretches);
  return run_linear<Floats<kBits>>(a, stretches, steps);
}

int linear(const LinearArguments& a) {
  switch (a.weight.bits) {
    case 2:
      return linear_bits<2>(a);
    case 3:
      return linear_bits<3>(a);
    case 4:
      return linear_bits<4>(a);
    default:
      return linear_bits<8>(a);
  }
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_LINEAR_H_
