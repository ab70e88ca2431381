// Cyclic coordinate descent on the codes. Internal linkage, see isa.h.
//
// A chunk of rows walks the columns in blocks. In a block, one row per lane:
//
//   panel of columns: each step updates the panel's R at once,
//   block:            a panel's steps update the rest of the block's R,
//   other blocks:     the block's steps update them row by row, steps that changed nothing left
//                     out: `push`.
//
// Whatever the blocking, an element of R receives its updates in the same order.
#ifndef HF_GPTQ_CPU_DESCEND_H_
#define HF_GPTQ_CPU_DESCEND_H_

#include "kernels.h"
#include "outer.h"
#include "parallel.h"
#include "scratch.h"

namespace hf_gptq {
namespace {

// Columns per block, and columns of H per partial sum of the first R: part of the specification.
constexpr int64_t kDescendColumns = 128;
constexpr int64_t kDescendPanel = 16;
// Rows per chunk, which share the packing of H; a multiple of kOuterRows and of kLanes.
constexpr int64_t kDescendRows = 240;
// Accumulators of push() and of update_block().
constexpr int kPushVectors = 8;
constexpr int kBlockUpdates = 8;
constexpr int64_t kTilePanelFloats = kDescendColumns * kOuterColumns;

// R[:] = fma(minus_delta, H[column, :], R[:]).
struct Change {
  int32_t column;  // in the block
  float minus_delta;
};

// Rows are counted from the chunk's first.
struct DescendScratch {
  int64_t capacity;  // rows, rounded up to kOuterRows
  float* R;          // [blocks, capacity, kDescendColumns]
  float* errors;     // capacity / kOuterRows panels [kDescendColumns, kOuterRows]
  float* tile;       // panels [kDescendColumns, kOuterColumns] of a block of H
  float* diagonal;   // [kDescendColumns, kDescendColumns], the block of H in hand
  Change* changes;   // [capacity, kDescendColumns], the block's steps of each row
  int32_t* counts;   // [capacity], how many
  int32_t* active;   // [capacity], the rows that still change
  uint8_t* changed;  // [capacity], rows that changed in this round
};

HF_GPTQ_INLINE float* block_rows(const DescendScratch& scratch, int64_t column) {
  return scratch.R + column * scratch.capacity;
}

// w - w_hat.
HF_GPTQ_INLINE float descend_error(const DescendArguments& a, int64_t row, int64_t k) {
  const int64_t g = row * a.G + a.group[k];
  const float code = a.codes[row * a.K + k];
  return a.W[row * a.K + k] - (code - a.zeros[g]) * a.scales[g];
}

// R = (w - w_hat) H.
void first_R(const DescendArguments& a, int64_t begin, int64_t rows,
             const DescendScratch& scratch) {
  memset(scratch.R, 0,
         ceil_div(a.K, kDescendColumns) * scratch.capacity * kDescendColumns * sizeof(float));
  memset(scratch.errors, 0, scratch.capacity * kDescendColumns * sizeof(float));
  for (int64_t k = 0; k < a.K; k += kDescendColumns) {
    const int64_t size = min64(kDescendColumns, a.K - k);
    for (int64_t r = 0; r < rows; ++r) {
      float* panel = scratch.errors + r / kOuterRows * (kDescendColumns * kOuterRows);
      for (int64_t c = 0; c < size; ++c) {
        panel[c * kOuterRows + r % kOuterRows] = descend_error(a, begin + r, k + c);
      }
    }
    for (int64_t j = 0; j < a.K; j += kDescendColumns) {
      const int64_t columns = min64(kDescendColumns, a.K - j);
      pack_panels<kOuterColumns>(a.H + k * a.K + j, a.K, size, columns, scratch.tile,
                                 kTilePanelFloats);
      float* R = block_rows(scratch, j);
      for (int64_t c = 0; c < columns; c += kOuterColumns) {
        for (int64_t r = 0; r < rows; r += kOuterRows) {
          outer_tile(scratch.errors + r * kDescendColumns, scratch.tile + c * kDescendColumns, size,
                     R + r * kDescendColumns + c, kDescendColumns);
        }
      }
    }
  }
}

// Applies the `count` steps of one panel, taken at columns `steps` of the block, to the columns
// outside [panel, panel + kDescendPanel).
void update_block(const float* diagonal, int64_t panel, int64_t columns, const int32_t* steps,
                  int count, const float (*minus_delta)[kLanes], float (*R)[kLanes]) {
  for (int64_t j = 0; j < columns; j += kBlockUpdates) {
    if (j >= panel && j < panel + kDescendPanel) continue;
    VecF r[kBlockUpdates];
    HF_GPTQ_UNROLL
    for (int u = 0; u < kBlockUpdates; ++u) r[u] = load(R[j + u]);
    for (int s = 0; s < count; ++s) {
      const VecF d = load(minus_delta[steps[s]]);
      const float* h = diagonal + steps[s] * kDescendColumns + j;
      HF_GPTQ_UNROLL
      for (int u = 0; u < kBlockUpdates; ++u) r[u] = fmadd(d, splat(h[u]), r[u]);
    }
    HF_GPTQ_UNROLL
    for (int u = 0; u < kBlockUpdates; ++u) store(R[j + u], r[u]);
  }
}

// One round of `lanes` <= kLanes rows over the block of columns [column, column + size). Sets
// used[c] for the columns that changed.
void descend_block(const DescendArguments& a, int64_t begin, const int32_t* rows, int lanes,
                   int64_t column, int64_t size, const DescendScratch& scratch, uint8_t* used) {
  const VecF top = splat(static_cast<float>((1 << a.bits) - 1));
  alignas(64) float R[kDescendColumns][kLanes];
  alignas(64) float codes[kDescendColumns][kLanes];
  alignas(64) float minus_delta[kDescendColumns][kLanes];
  alignas(64) float scale[kLanes];
  alignas(64) float zero[kLanes];
  float* block = block_rows(scratch, column);
  if (lanes < kLanes || size < kDescendColumns) {
    // Lanes without a row hold code 0, zero 0, scale 1 and R 0: they never change.
    memset(R, 0, sizeof R);
    memset(codes, 0, sizeof codes);
  }
  for (int l = 0; l < kLanes; ++l) {
    scale[l] = 1.0f;
    zero[l] = 0.0f;
  }
  for (int l = 0; l < lanes; ++l) {
    const float* src = block + rows[l] * kDescendColumns;
    const uint8_t* src_codes = a.codes + (begin + rows[l]) * a.K + column;
    for (int64_t c = 0; c < size; ++c) {
      R[c][l] = src[c];
      codes[c][l] = src_codes[c];
    }
  }

  int32_t steps[kDescendColumns];
  int step_count = 0;
  int64_t group = -1;
  for (int64_t p = 0; p < size; p += kDescendPanel) {
    const int first_step = step_count;
    for (int64_t c = p; c < min64(p + kDescendPanel, size); ++c) {
      if (a.group[column + c] != group) {
        group = a.group[column + c];
        for (int l = 0; l < lanes; ++l) {
          const int64_t g = (begin + rows[l]) * a.G + group;
          scale[l] = a.scales[g];
          zero[l] = a.zeros[g];
        }
      }
      const VecF s = load(scale);
      const VecF z = load(zero);
      const VecF code = load(codes[c]);
      const float* h = scratch.diagonal + c * kDescendColumns;
      const VecF target = (code - z) * s + load(R[c]) / splat(h[c]);
      const VecF q = quantize(target / s, z, top);
      if (!differs(q, code)) continue;
      const VecF d = (code - q) * s;
      HF_GPTQ_UNROLL
      for (int j = 0; j < kDescendPanel; ++j) {
        store(R[p + j], fmadd(d, splat(h[p + j]), load(R[p + j])));
      }
      store(codes[c], q);
      store(minus_delta[c], d);
      steps[step_count++] = static_cast<int32_t>(c);
    }
    if (step_count == first_step) continue;
    update_block(scratch.diagonal, p, size, steps + first_step, step_count - first_step,
                 minus_delta, R);
  }

  for (int l = 0; l < lanes; ++l) {
    const int64_t row = rows[l];
    Change* changes = scratch.changes + row * kDescendColumns;
    uint8_t* dst_codes = a.codes + (begin + row) * a.K + column;
    int32_t count = 0;
    for (int s = 0; s < step_count; ++s) {
      const int32_t c = steps[s];
      changes[count] = {c, minus_delta[c][l]};
      count += minus_delta[c][l] != 0.0f;
    }
    scratch.counts[row] = count;
    if (count == 0) continue;
    scratch.changed[row] = 1;
    for (int32_t i = 0; i < count; ++i) {
      const int32_t c = changes[i].column;
      dst_codes[c] = static_cast<uint8_t>(codes[c][l]);
      used[c] = 1;
    }
    for (int64_t c = 0; c < size; ++c) block[row * kDescendColumns + c] = R[c][l];
  }
}

// Applies a row's steps to `columns` columns of its R.
void push(const Change* changes, int32_t count, const float* tile, int64_t columns, float* R) {
  for (int64_t j = 0; j < columns; j += kPushVectors * kLanes) {
    VecF r[kPushVectors];
    HF_GPTQ_UNROLL
    for (int v = 0; v < kPushVectors; ++v) r[v] = load(R + j + v * kLanes);
    for (int32_t i = 0; i < count; ++i) {
      const VecF d = splat(changes[i].minus_delta);
      const float* h = tile + j * kDescendColumns + changes[i].column * kOuterColumns;
      HF_GPTQ_UNROLL
      for (int v = 0; v < kPushVectors; ++v) {
        const float* p = h + v / kOuterVectors * kTilePanelFloats + v % kOuterVectors * kLanes;
        r[v] = fmadd(d, load(p), r[v]);
      }
    }
    HF_GPTQ_UNROLL
    for (int v = 0; v < kPushVectors; ++v) store(R + j + v * kLanes, r[v]);
  }
}

// One round of `active` rows.
void descend_round(const DescendArguments& a, int64_t begin, int64_t active,
                   const DescendScratch& scratch) {
  for (int64_t k = 0; k < a.K; k += kDescendColumns) {
    const int64_t size = min64(kDescendColumns, a.K - k);
    for (int64_t c = 0; c < size; ++c) {
      float* row = scratch.diagonal + c * kDescendColumns;
      copy_floats(a.H + (k + c) * a.K + k, size, row);
      for (int64_t j = size; j < kDescendColumns; ++j) row[j] = 0.0f;
    }
    uint8_t used[kDescendColumns] = {};
    for (int64_t i = 0; i < active; i += kLanes) {
      descend_block(a, begin, scratch.active + i, static_cast<int>(min64(kLanes, active - i)), k,
                    size, scratch, used);
    }
    for (int64_t j = 0; j < a.K; j += kDescendColumns) {
      if (j == k) continue;
      const int64_t columns = min64(kDescendColumns, a.K - j);
      for (int64_t c = 0; c < size; ++c) {
        if (!used[c]) continue;
        pack_panels<kOuterColumns>(a.H + (k + c) * a.K + j, a.K, 1, columns,
                                   scratch.tile + c * kOuterColumns, kTilePanelFloats);
      }
      float* R = block_rows(scratch, j);
      for (int64_t i = 0; i < active; ++i) {
        const int64_t row = scratch.active[i];
        if (scratch.counts[row] == 0) continue;
        push(scratch.changes + row * kDescendColumns, scratch.counts[row], scratch.tile, columns,
             R + row * kDescendColumns);
      }
    }
  }
}

// Rows [begin, begin + rows).
void descend_chunk(const DescendArguments& a, int64_t begin, int64_t rows,
                   const DescendScratch& scratch) {
  first_R(a, begin, rows, scratch);
  int64_t active = rows;
  for (int64_t r = 0; r < rows; ++r) scratch.active[r] = static_cast<int32_t>(r);
  for (int64_t round = 0; round < a.rounds && active > 0; ++round) {
    memset(scratch.changed, 0, rows);
    descend_round(a, begin, active, scratch);
    int64_t left = 0;
    for (int64_t i = 0; i < active; ++i) {
      const int32_t row = scratch.active[i];
      if (scratch.changed[row]) scratch.active[left++] = row;
    }
    active = left;
  }
  if (!a.loss) return;
  for (int64_t r = 0; r < rows; ++r) {
    double loss = 0.0;
    for (int64_t k = 0; k < a.K; k += kDescendColumns) {
      const float* R = block_rows(scratch, k) + r * kDescendColumns;
      for (int64_t c = 0; c < min64(kDescendColumns, a.K - k); ++c) {
        loss += static_cast<double>(descend_error(a, begin + r, k + c)) * R[c];
      }
    }
    a.loss[begin + r] = loss;
  }
}

int descend_rows(int64_t begin, int64_t end, const void* context) {
  const DescendArguments& a = *static_cast<const DescendArguments*>(context);
  // Chunks of about equal size: 250 rows are 128 + 122, not 240 + 10.
  const int64_t chunks = ceil_div(end - begin, kDescendRows);
  const int64_t chunk = ceil_div(ceil_div(end - begin, chunks), kLanes) * kLanes;
  const int64_t capacity = ceil_div(min64(chunk, end - begin), kOuterRows) * kOuterRows;
  const int64_t blocks = ceil_div(a.K, kDescendColumns);

  constexpr int64_t kSquare = kDescendColumns * kDescendColumns;
  const int64_t R = blocks * capacity * kDescendColumns;
  const int64_t errors = capacity * kDescendColumns;
  const Buffer buffer((R + errors + 2 * kSquare) * sizeof(float) + errors * sizeof(Change) +
                      2 * capacity * sizeof(int32_t) + capacity);
  float* memory = static_cast<float*>(buffer.data());
  if (!memory) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  DescendScratch scratch;
  scratch.capacity = capacity;
  scratch.R = memory;
  scratch.errors = scratch.R + R;
  scratch.tile = scratch.errors + errors;
  scratch.diagonal = scratch.tile + kSquare;
  scratch.changes = reinterpret_cast<Change*>(scratch.diagonal + kSquare);
  scratch.counts = reinterpret_cast<int32_t*>(scratch.changes + errors);
  scratch.active = scratch.counts + capacity;
  scratch.changed = reinterpret_cast<uint8_t*>(scratch.active + capacity);
  // Columns that a ragged block lacks are computed with the others.
  memset(scratch.tile, 0, kSquare * sizeof(float));

  for (int64_t row = begin; row < end; row += chunk) {
    descend_chunk(a, row, min64(chunk, end - row), scratch);
  }
  return HF_GPTQ_OK;
}

int descend(const DescendArguments& a) {
  if (a.rounds == 0 && !a.loss) return HF_GPTQ_OK;
  // Whole groups of lanes, and enough of them to share the packing of H.
  return parallel_for(a.N, 4 * kLanes, descend_rows, &a);
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_DESCEND_H_
