// y = x @ weight^T + bias for bf16 activations, by tiles. Internal linkage, see isa.h.
//
// Codes become pairs of bf16 integers as for vdpbf16ps (codes.h): 16 steps of a column block are a
// tile. A task owns some column blocks and some row tiles of x, and walks K in chunks of whole
// stretches:
//
//             16 * kBlocks columns
//            +------+------+-- ... --+
//   chunk of | tile | tile |         |  decoded, in L1 or L2; padded with zeros at the end of a
//   K        | tile | tile |         |  stretch
//            +------+------+-- ... --+
//                x tiles times these -> the sums of a stretch, which are scaled and added to totals
//
// Any number of rows goes this way, so that a row has the same bits among any others.
#ifndef HF_GPTQ_CPU_TILE_LINEAR_H_
#define HF_GPTQ_CPU_TILE_LINEAR_H_

#include "run_linear.h"
#include "tiles.h"

namespace hf_gptq {
namespace {

// Codes of a stretch: part of the specification.
constexpr int64_t kTileCodes = 256;
constexpr int64_t kTilesOfStretch = kTileCodes / (2 * kTileSide);

template <int kBits, bool kSymmetric>
struct TilePairs : Pairs<kBits, kSymmetric> {
  static constexpr int64_t kMostCodes = kTileCodes;
};

// Column blocks of a task, and tiles of a chunk. One row tile: decoding is most of the work, and
// what is decoded stays in L1. More: x stays in L2 with it.
constexpr int kFewBlocks = 4, kManyBlocks = 8;
constexpr int64_t kFewTiles = kTilesOfStretch, kManyTiles = 2 * kTilesOfStretch;
// Row tiles of a task, and rows packed at a time.
constexpr int64_t kTaskRowTiles = 16;
constexpr int64_t kTileSlabRows = 1024;

struct TileJob {
  const LinearArguments& a;
  Stretches stretches;  // each begins at a tile
  int64_t tiles;        // of a row of x
  int64_t row_begin;    // first row of the slab
  RowBlocks rows;       // row tiles of the slab
  float* x;             // [row tiles, tiles, kTileSide, kTileSide]
  int64_t task_row_tiles;
};

int64_t tile_of(const Stretch& s) { return s.begin / kTileSide; }
int64_t tiles_of(const Stretch& s) { return ceil_div(s.end - s.begin, kTileSide); }

// Packs row tiles [begin, end) of the slab.
template <class Codes>
int pack_row_tiles(int64_t begin, int64_t end, const void* context) {
  const TileJob& job = *static_cast<const TileJob*>(context);
  const LinearArguments& a = job.a;
  const int64_t K = a.weight.K;
  const int32_t* perm = a.weight.perm;
  uint16_t* sorted = nullptr;
  if (perm) {
    sorted = static_cast<uint16_t*>(thread_scratch(K * sizeof(uint16_t)));
    if (!sorted) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  }
  alignas(64) float steps[kTilesOfStretch * kTileSide + kLanes];
  for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
    const int64_t first = job.row_begin + job.rows.begin(row_tile);
    for (int r = 0; r < job.rows.size(row_tile); ++r) {
      const uint16_t* x = static_cast<const uint16_t*>(a.x) + (first + r) * a.x_row_stride;
      if (perm) {
        for (int64_t i = 0; i < K; ++i) sorted[i] = x[perm[i]];
        x = sorted;
      }
      float* out = job.x + row_tile * job.tiles * kTileFloats + r * kTileSide;
      for (int64_t s = 0; s < job.stretches.count; ++s) {
        const Stretch& stretch = job.stretches.data[s];
        const int64_t count = tiles_of(stretch);
        float* packed =
            Codes::pack_run(x, Run{stretch.valid_begin, stretch.valid_end, stretch.group}, steps);
        while (packed < steps + count * kTileSide) *packed++ = 0.0f;
        for (int64_t t = 0; t < count; ++t, out += kTileFloats) {
          memcpy(out, steps + t * kTileSide, kTileSide * sizeof(float));
        }
      }
    }
  }
  return HF_GPTQ_OK;
}

// Scratch of one task.
struct TileScratch {
  float* panels;   // [column blocks, tiles of a chunk, kTileSide, kTileSide]
  float* scales;   // [stretches of a chunk, columns]
  float* sums;     // [row tiles, blocks] of one product, [kTileSide, kTileSide] each
  float* totals;   // [row tiles of the task, kTileSide, columns]
  uint32_t* copy;  // ragged_bytes
};

// Decodes a stretch of one column block to its tiles.
template <class Codes>
void decode_tiles(const hf_gptq_weight& w, const Stretch& s, int64_t block, const BlockWords& words,
                  float* tiles) {
  VecF zeros[kBlockVectors];
  load_zeros<Codes::kBits>(w, s.group, block, zeros);
  const uint32_t* column[1] = {words.words};
  const int64_t steps = s.end - s.begin;
  Codes::decode(w, column, words.row_stride, s.code, steps, zeros,
                [&](int64_t i, const VecF(&values)[kBlockVectors])
                    __attribute__((always_inline)) { store(tiles + i * kTileSide, values[0]); });
  for (int64_t i = steps; i % kTileSide != 0; ++i) store(tiles + i * kTileSide, VecF{});
}

// Stretches [begin, end) of a chunk, which are in `panel`, for kRowTiles row tiles and kBlocks
// column blocks. total: at these columns, `columns` apart.
template <int kRowTiles, int kBlocks>
void multiply_chunk(const TileJob& job, int64_t row_tile, int64_t begin, int64_t end,
                    const float* panel, int64_t panel_apart, const float* scales, int64_t columns,
                    float* sums, float* totals) {
  using Product = TileProduct<kRowTiles, kBlocks>;
  const int64_t apart = job.tiles * kTileFloats;
  const int64_t first_tile = tile_of(job.stretches.data[begin]);
  const float* x = job.x + row_tile * apart;
  for (int64_t s = begin; s < end; ++s, scales += columns) {
    const Stretch& stretch = job.stretches.data[s];
    const int64_t tile = tile_of(stretch), count = tiles_of(stretch);
    Product::zero();
    for (int64_t t = tile; t < tile + count; ++t) {
      Product::add(x + t * kTileFloats, apart, panel + (t - first_tile) * kTileFloats, panel_apart,
                   64);
    }
    Product::store(sums, kBlocks * kTileFloats, kTileFloats, 64);
    VecF scale[kBlocks];
    HF_GPTQ_UNROLL
    for (int b = 0; b < kBlocks; ++b) scale[b] = load(scales + b * kTileSide);
    for (int tile_row = 0; tile_row < kRowTiles; ++tile_row) {
      const int rows = job.rows.size(row_tile + tile_row);
      const float* sum = sums + tile_row * kBlocks * kTileFloats;
      float* total = totals + tile_row * kTileSide * columns;
      for (int r = 0; r < rows; ++r, sum += kTileSide, total += columns) {
        HF_GPTQ_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
          float* at = total + b * kTileSide;
          store(at, fmadd(load(sum + b * kTileFloats), scale[b], load(at)));
        }
      }
    }
  }
}

// For one row tile, or for two.
template <int kBlocks>
void configure_products(const int (&rows)[2]) {
  if constexpr (kBlocks <= 2) {
    if (rows[1] > 0) {
      TileProduct<2, kBlocks>::configure(rows);
      return;
    }
  }
  TileProduct<1, kBlocks>::configure({rows[0]});
}

// Row tiles [row_begin, row_end) of the slab times column blocks [block, block + blocks), of which
// there may be fewer than kTaskBlocks.
template <class Codes, int kRowTiles, int kBlocks, int kTaskBlocks>
void tile_task(const TileJob& job, int64_t row_begin, int64_t row_end, int64_t block, int blocks,
               int64_t chunk_tiles, const TileScratch& scratch) {
  constexpr int64_t kColumns = kTaskBlocks * kTileSide;
  const hf_gptq_weight& w = job.a.weight;
  const int64_t panel_floats = chunk_tiles * kTileFloats;
  memset(scratch.totals, 0, (row_end - row_begin) * kTileSide * kColumns * sizeof(float));
  BlockWords words[kTaskBlocks];
  for (int b = 0; b < blocks; ++b) words[b] = block_words(w, block + b, scratch.copy);
  // Blocks that are missing in the last product are computed with the others, from zeros.
  const int whole = static_cast<int>(ceil_div(blocks, kBlocks)) * kBlocks;
  if (blocks < whole) {
    memset(scratch.panels + blocks * panel_floats, 0,
           (whole - blocks) * panel_floats * sizeof(float));
    memset(scratch.scales, 0, chunk_tiles * kColumns * sizeof(float));
  }
  int configured[2] = {0, 0};
  for (int64_t begin = 0, end; begin < job.stretches.count; begin = end) {
    int64_t used = 0;
    for (end = begin; end < job.stretches.count; ++end) {
      const Stretch& s = job.stretches.data[end];
      if (used + tiles_of(s) > chunk_tiles) break;
      for (int b = 0; b < blocks; ++b) {
        decode_tiles<Codes>(w, s, block + b, words[b],
                            scratch.panels + b * panel_floats + used * kTileFloats);
        load_scales(w, s.group, block + b,
                    scratch.scales + (end - begin) * kColumns + b * kBlockColumns);
      }
      used += tiles_of(s);
    }
    for (int64_t row = row_begin; row < row_end;) {
      const bool two = kRowTiles > 1 && row + 1 < row_end;
      const int rows[2] = {job.rows.size(row), two ? job.rows.size(row + 1) : 0};
      if (rows[0] != configured[0] || rows[1] != configured[1]) {
        configure_products<kBlocks>(rows);
        configured[0] = rows[0];
        configured[1] = rows[1];
      }
      float* const totals = scratch.totals + (row - row_begin) * kTileSide * kColumns;
      for (int b = 0; b < blocks; b += kBlocks) {
        const float* panel = scratch.panels + b * panel_floats;
        const float* scales = scratch.scales + b * kTileSide;
        float* at = totals + b * kTileSide;
        if (two) {
          multiply_chunk<kRowTiles, kBlocks>(job, row, begin, end, panel, panel_floats, scales,
                                             kColumns, scratch.sums, at);
        } else {
          multiply_chunk<1, kBlocks>(job, row, begin, end, panel, panel_floats, scales, kColumns,
                                     scratch.sums, at);
        }
      }
      row += two ? 2 : 1;
    }
  }
  for (int64_t row = row_begin; row < row_end; ++row) {
    float* const totals = scratch.totals + (row - row_begin) * kTileSide * kColumns;
    for (int64_t c = 0; c < blocks * kBlockColumns; c += kTileColumns) {
      const int64_t column = block * kBlockColumns + c;
      if (column >= w.N) break;
      write_rows(job.a, job.row_begin + job.rows.begin(row), job.rows.size(row), column,
                 min64(kTileColumns, min64(w.N, (block + blocks) * kBlockColumns) - column),
                 totals + c, kColumns);
    }
  }
}

// Task t: column group t / row tasks, row task t % row tasks.
template <class Codes, int kRowTiles, int kBlocks, int kTaskBlocks>
int tile_tasks(int64_t begin, int64_t end, const void* context) {
  const TileJob& job = *static_cast<const TileJob*>(context);
  const hf_gptq_weight& w = job.a.weight;
  constexpr int64_t kColumns = kTaskBlocks * kTileSide;
  const int64_t chunk = kRowTiles > 1 ? kManyTiles : kFewTiles;
  const int64_t blocks = column_blocks(w.N);
  const int64_t row_tasks = ceil_div(job.rows.count, job.task_row_tiles);
  const int64_t panels = kTaskBlocks * chunk * kTileFloats, scales = chunk * kColumns;
  const int64_t sums = 4 * kTileFloats, totals = job.task_row_tiles * kTileSide * kColumns;
  const int64_t copy = is_ragged(w, blocks - 1) ? ragged_bytes(w) : 0;
  float* memory =
      static_cast<float*>(thread_scratch((panels + scales + sums + totals) * sizeof(float) + copy));
  if (!memory) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  TileScratch scratch;
  scratch.panels = memory;
  scratch.scales = scratch.panels + panels;
  scratch.sums = scratch.scales + scales;
  scratch.totals = scratch.sums + sums;
  scratch.copy = reinterpret_cast<uint32_t*>(scratch.totals + totals);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t block = t / row_tasks * kTaskBlocks;
    const int64_t row = t % row_tasks * job.task_row_tiles;
    tile_task<Codes, kRowTiles, kBlocks, kTaskBlocks>(
        job, row, min64(row + job.task_row_tiles, job.rows.count), block,
        static_cast<int>(min64(kTaskBlocks, blocks - block)), chunk, scratch);
  }
  release_tiles();  // a thread that holds tiles is slower to switch from
  return HF_GPTQ_OK;
}

// Lets every stretch begin at a tile; returns the tiles of all.
int64_t align_stretches(const Stretches& found, Stretch* stretches) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < found.count; ++i) {
    const int64_t steps = stretches[i].end - stretches[i].begin;
    stretches[i].begin = tiles * kTileSide;
    stretches[i].end = stretches[i].begin + steps;
    tiles += ceil_div(steps, kTileSide);
  }
  return tiles;
}

template <class Codes>
int run_tile_linear(const LinearArguments& a, const Stretches& stretches, int64_t tiles) {
  const int64_t slab_rows = ceil_div(a.M, ceil_div(a.M, kTileSlabRows));
  const Buffer buffer(ceil_div(slab_rows, kTileSide) * tiles * kTileFloats * sizeof(float));
  if (!buffer.data()) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  for (int64_t begin = 0; begin < a.M; begin += slab_rows) {
    const RowBlocks rows(min64(slab_rows, a.M - begin), kTileSide);
    TileJob job{a, stretches, tiles, begin, rows, static_cast<float*>(buffer.data()), 1};
    const int64_t work = 16 * tiles * kTileSide * rows.largest;
    int error = parallel_for(rows.count, grain_for(work), pack_row_tiles<Codes>, &job);
    if (error != HF_GPTQ_OK) return error;
    const bool few = rows.count == 1;
    const int task_blocks = few ? kFewBlocks : kManyBlocks;
    const int64_t groups = ceil_div(column_blocks(a.weight.N), task_blocks);
    job.task_row_tiles = row_blocks_of_task(rows.count, groups, kTaskRowTiles);
    const int64_t row_tasks = ceil_div(rows.count, job.task_row_tiles);
    const int64_t grain =
        grain_for(tiles * kTileFloats * task_blocks * job.task_row_tiles * rows.largest / 8);
    error =
        few ? parallel_for(groups, grain, tile_tasks<Codes, 1, kFewBlocks, kFewBlocks>, &job)
            : parallel_for(groups * row_tasks, grain, tile_tasks<Codes, 2, 2, kManyBlocks>, &job);
    if (error != HF_GPTQ_OK) return error;
  }
  return HF_GPTQ_OK;
}

// False where the weight is not for tiles: its groups change so often that more is padding or
// decoded twice than not.
template <int kBits>
bool tile_linear(const LinearArguments& a, int* error) {
  using Any = TilePairs<kBits, false>;
  using Symmetric = TilePairs<kBits, kBits != 8>;
  const Buffer buffer(most_stretches(a) * sizeof(Stretch));
  Stretch* stretches = static_cast<Stretch*>(buffer.data());
  if (!stretches) {
    *error = HF_GPTQ_ERROR_OUT_OF_MEMORY;
    return true;
  }
  const Stretches found = find_stretches<Any>(a.runs, stretches);
  if (found.steps > a.weight.K) return false;
  const int64_t tiles = align_stretches(found, stretches);
  if (tiles * kTileSide > a.weight.K) return false;
  *error = a.weight.qzeros ? run_tile_linear<Any>(a, found, tiles)
                           : run_tile_linear<Symmetric>(a, found, tiles);
  return true;
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_TILE_LINEAR_H_
