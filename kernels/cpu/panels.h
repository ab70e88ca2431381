// The product for many rows. Internal linkage, see isa.h.
//
// A task owns some column blocks and some row blocks. It walks K in chunks:
//
//             16 * kGroupBlocks columns
//            +-------+-------+-- ... --+
//   chunk of | panel | panel |         |  decoded: a panel stays in L1, a chunk in L2
//   K        +-------+-------+-- ... --+
//                x block (kTileRows or fewer rows) times panel -> `tile`, accumulators in registers
#ifndef HF_GPTQ_CPU_PANELS_H_
#define HF_GPTQ_CPU_PANELS_H_

#include "linear_job.h"

namespace hf_gptq {
namespace {

// The part of a stretch that lies in a chunk.
struct Segment {
  int64_t begin, end;  // steps
  int64_t code, group;
  bool first, last;  // whether it holds the stretch's begin and end
};

// Adds the products of one step: x [kRows], panel [kTileColumns].
template <class Products, int kRows>
HF_GPTQ_INLINE void add_step(const float* x, const float* panel, VecF (&sum)[kRows][kTileVectors]) {
  VecF values[kTileVectors];
  HF_GPTQ_UNROLL
  for (int v = 0; v < kTileVectors; ++v) values[v] = load(panel + v * kLanes);
  HF_GPTQ_UNROLL
  for (int m = 0; m < kRows; ++m) {
    HF_GPTQ_UNROLL
    for (int v = 0; v < kTileVectors; ++v) {
      sum[m][v] = Products::multiply_add(values[v], x + m, sum[m][v]);
    }
  }
}

// Continues the sums of kRows rows over `count` steps, and folds them into total at the end of the
// stretch. x: packed rows at the segment's begin; panel: [count, kTileColumns]; sum and total:
// [kRows, kTileColumns].
template <class Products, int kRows>
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
    add_step<Products>(x, panel, acc);
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
  load_scales(w, segment.group, group_block + b, scales + b * kBlockColumns);
  VecF zeros[kBlockVectors];
  load_zeros<Codes::kBits>(w, segment.group, group_block + b, zeros);
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

template <class Products, int kRows>
Tile tile_for(int rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_for<Products, kRows - 1>(rows);
  }
  return tile<Products, kRows>;
}

// Row blocks [row_begin, row_end) of the slab times column blocks [block, block + blocks).
template <class Codes>
void panel_task(const LinearJob& job, int64_t row_begin, int64_t row_end, int64_t block, int blocks,
                const PanelScratch& scratch) {
  const hf_gptq_weight& w = job.a.weight;
  using Products = typename Codes::Products;
  const Tile multiply[2] = {tile_for<Products, kTileRows>(job.rows.largest),
                            tile_for<Products, kTileRows>(job.rows.largest - 1)};
  const int panels = static_cast<int>(ceil_div(blocks, kTileBlocks));
  const int64_t tile_floats = int64_t{job.rows.largest} * kTileColumns;
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
  while (step < job.stretches.steps) {
    Segment segments[kChunkRuns];
    int count = 0;
    const int64_t chunk_begin = step;
    while (count < kChunkRuns && step < job.stretches.steps && step < chunk_begin + kChunk) {
      const Stretch& r = job.stretches.data[run];
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
        const int rows = job.rows.size(row_block);
        for (int s = 0; s < count; ++s) {
          const Segment& segment = segments[s];
          const int64_t x_at =
              job.rows.begin(row_block) * job.stretches.steps + segment.begin * rows;
          const float* panel =
              scratch.panels + p * kPanelFloats + (segment.begin - chunk_begin) * kTileColumns;
          const float* scale = scratch.scales + s * kGroupColumns + p * kTileColumns;
          const int64_t steps = segment.end - segment.begin;
          multiply[rows < job.rows.largest](job.x + x_at, panel, steps, scale, segment.first,
                                            segment.last, scratch.sums + tile_at,
                                            scratch.totals + tile_at);
        }
      }
    }
  }

  for (int64_t row_block = row_begin; row_block < row_end; ++row_block) {
    for (int p = 0; p < panels; ++p) {
      const int64_t column = block * kBlockColumns + p * kTileColumns;
      write_rows(job.a, job.row_begin + job.rows.begin(row_block), job.rows.size(row_block), column,
                 min64(kTileColumns, w.N - column),
                 scratch.totals + ((row_block - row_begin) * kGroupPanels + p) * tile_floats,
                 kTileColumns);
    }
  }
}

// Task t: column group t / row tasks, row task t % row tasks.
template <class Codes>
int panel_tasks(int64_t begin, int64_t end, const void* context) {
  const LinearJob& job = *static_cast<const LinearJob*>(context);
  const hf_gptq_weight& w = job.a.weight;
  const int64_t row_blocks = job.rows.count;
  const int64_t row_tasks = ceil_div(row_blocks, job.task_row_blocks);
  const int64_t blocks = column_blocks(w.N);

  const int64_t panels = kGroupPanels * kPanelFloats;
  const int64_t scales = kChunkRuns * kGroupColumns;
  const int64_t sums = job.task_row_blocks * job.rows.largest * kGroupColumns;
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

template <class Codes>
int run_panels(LinearJob job) {
  const int64_t row_blocks = job.rows.count;
  const int64_t groups = ceil_div(column_blocks(job.a.weight.N), kGroupBlocks);
  job.task_row_blocks = row_blocks_of_task(row_blocks, groups, kTaskRowBlocks);
  const int64_t row_tasks = ceil_div(row_blocks, job.task_row_blocks);
  return parallel_for(
      groups * row_tasks,
      grain_for(job.stretches.steps * kGroupColumns * job.task_row_blocks * job.rows.largest),
      panel_tasks<Codes>, &job);
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_PANELS_H_
