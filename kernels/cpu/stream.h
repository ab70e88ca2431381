// The product for few rows, and for any number where decoding costs least: each word is decoded
// into registers and used for all rows of a row block. The words of a column block stay in the
// cache from one row block to the next, so that decoding them again takes less time than a panel's
// way through memory. Internal linkage, see isa.h.
#ifndef HF_GPTQ_CPU_STREAM_H_
#define HF_GPTQ_CPU_STREAM_H_

#include "linear_job.h"

namespace hf_gptq {
namespace {

// Adds the products of one step to the sums of all rows.
template <class Codes, int kRows, int kVectors>
struct Accumulate {
  const float* x;
  VecF (&sum)[kRows][kVectors];
  HF_GPTQ_INLINE void operator()(int64_t i, const VecF (&values)[kVectors]) const {
    HF_GPTQ_UNROLL
    for (int m = 0; m < kRows; ++m) {
      HF_GPTQ_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sum[m][v] = Codes::Products::multiply_add(values[v], x + i * kRows + m, sum[m][v]);
      }
    }
  }
};

// Accumulate for sums of integers in places, see Fixed::walk.
template <class Codes, int kRows, int kVectors, int kPlaces>
struct AccumulateFixed {
  const float* x;
  VecF (&sum)[kPlaces][kRows][kVectors];
  HF_GPTQ_INLINE void operator()(int64_t i, int place, const VecF (&values)[kVectors]) const {
    Accumulate<Codes, kRows, kVectors>{x, sum[kPlaces == 1 ? 0 : place]}(i, values);
  }
};

// The sums of the low parts of one stretch.
template <class Codes, int kRows, int kBlocks>
HF_GPTQ_INLINE void low_sums(const LinearJob& job, const Stretch& s, const float* x,
                             const uint8_t* list, int64_t listed,
                             const uint32_t* const (&words)[kBlocks], int64_t row_stride,
                             VecF (&sum)[1][kRows][kBlocks * kBlockVectors]) {
  constexpr int kVectors = kBlocks * kBlockVectors;
  const hf_gptq_weight& w = job.a.weight;
  const AccumulateFixed<Codes, kRows, kVectors, 1> add{x, sum};
  // Decoding a step by itself takes a few times as long as with its unit.
  if (listed * 4 > s.end - s.begin) {
    Codes::template walk<1>(w, words, row_stride, s.code, s.end - s.begin, add);
    return;
  }
  const int64_t rows = packed_words(w.K, Codes::kBits);
  for (int64_t i = 0; i < listed; ++i) {
    VecF values[kVectors];
    HF_GPTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t* column = words[v / kBlockVectors] + v % kBlockVectors * kLanes;
      values[v] = (VecF)Codes::one(column, row_stride, rows, s.code, list[i]);
    }
    add(list[i], 0, values);
  }
}

// The sums of one stretch for integer activations, in fp32. Zeros are not subtracted from codes but
// from the sums, as zero * (sum of x): exact, as long as they are integers.
template <class Codes, int kRows>
HF_GPTQ_INLINE void fixed_sums(const LinearJob& job, const FixedRows& fixed, int64_t row_block,
                               int64_t stretch, int64_t block, const uint32_t* const (&words)[1],
                               int64_t row_stride, VecF (&sum)[kRows][kBlockVectors]) {
  constexpr int kVectors = kBlockVectors;
  constexpr int kPlaces = kRows <= kTwoPlacesRows ? 2 : 1;
  const hf_gptq_weight& w = job.a.weight;
  const Stretch& s = job.stretches.data[stretch];
  const int64_t first_row = job.rows.begin(row_block);
  const int64_t first = first_row * job.stretches.steps + s.begin * kRows;
  const int64_t number = first_row * job.stretches.count + stretch * kRows;
  const int32_t* sum_x = fixed.sums + number * 2;
  VecF high[kPlaces][kRows][kVectors] = {};
  Codes::template walk<kPlaces>(
      w, words, row_stride, s.code, s.end - s.begin,
      AccumulateFixed<Codes, kRows, kVectors, kPlaces>{fixed.high + first, high});
  VecF low[1][kRows][kVectors] = {};
  const int64_t count = fixed.listed[row_block * job.stretches.count + stretch];
  const bool listed = __builtin_expect(count > 0, 0);
  if (listed) {
    const uint8_t* list = fixed.list + row_block * job.stretches.steps + s.begin;
    low_sums<Codes>(job, s, fixed.low + first, list, count, words, row_stride, low);
  }
  VecF zeros[kVectors] = {};
  if (!Codes::kSymmetric) load_zeros<Codes::kBits>(w, s.group, block, zeros);
  HF_GPTQ_UNROLL
  for (int m = 0; m < kRows; ++m) {
    const VecF scale = splat(fixed.scales[number + m]);
    HF_GPTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      VecF whole = high[0][m][v];
      if (kPlaces == 2) whole = Codes::joined(whole, high[kPlaces - 1][m][v]);
      whole = Codes::less_zeros(whole, zeros[v], sum_x[m]);
      const VecF value =
          listed ? Codes::Products::value(
                       whole, Codes::less_zeros(low[0][m][v], zeros[v], sum_x[kRows + m]))
                 : Codes::Products::value(whole);
      sum[m][v] = value * scale;
    }
  }
}

// The sums of one stretch for activations of 8 bits, in fp32.
template <class Codes, int kRows, int kBlocks>
HF_GPTQ_INLINE void byte_sums(const LinearJob& job, int64_t row_block, int64_t stretch,
                              const uint32_t* const (&words)[kBlocks], int64_t row_stride,
                              const VecF (&zeros)[kBlocks * kBlockVectors],
                              VecF (&sum)[kRows][kBlocks * kBlockVectors]) {
  constexpr int kVectors = kBlocks * kBlockVectors;
  const Stretch& s = job.stretches.data[stretch];
  const int64_t first_row = job.rows.begin(row_block);
  const float* x = job.x + first_row * job.stretches.steps + s.begin * kRows;
  const int64_t number = first_row * job.stretches.count + stretch * kRows;
  const float* offsets = job.bytes.offsets + number;
  const float* scales = job.bytes.scales + number;
  HF_GPTQ_UNROLL
  for (int m = 0; m < kRows; ++m) {
    HF_GPTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[m][v] = Codes::begin(offsets + m);
  }
  Codes::walk(job.a.weight, words, row_stride, s.code, s.end - s.begin,
              Accumulate<Codes, kRows, kVectors>{x, sum});
  HF_GPTQ_UNROLL
  for (int m = 0; m < kRows; ++m) {
    HF_GPTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      sum[m][v] = Codes::less_zeros(sum[m][v], zeros[v], offsets + m) * splat(scales[m]);
    }
  }
}

// The kRows rows of a row block times kBlocks column blocks, `words` with one row stride.
template <class Codes, int kRows, int kBlocks>
void stream(const LinearJob& job, int64_t row_block, int64_t block,
            const uint32_t* const (&words)[kBlocks], int64_t row_stride) {
  constexpr int kVectors = kBlocks * kBlockVectors;
  constexpr int64_t kColumns = kBlocks * kBlockColumns;
  const hf_gptq_weight& w = job.a.weight;
  const int64_t first_row = job.rows.begin(row_block);
  const float* x = job.x + first_row * job.stretches.steps;
  const FixedRows fixed = job.fixed;  // once: GCC would read it again after every store
  // Scales of several blocks come into registers when the sums have left theirs. Those of one wait
  // in memory, where every row finds them.
  const uint16_t* const fp16 = kBlocks > 1 ? fp16_scales(w, block, kBlocks) : nullptr;
  alignas(64) float copied[kColumns];
  // Whether there are registers for totals beside sums, words and codes.
  constexpr bool kKept = 2 * kRows * kVectors + 3 * kVectors + 2 <= kRegisters;
  VecF kept[kRows][kVectors] = {};
  alignas(64) float total[kRows][kColumns];
  if (!kKept) memset(total, 0, sizeof total);
  for (int64_t run = 0; run < job.stretches.count; ++run) {
    const Stretch& r = job.stretches.data[run];
    prefetch_group(w, r.group, block + kBlocks, kBlocks);
    if (!fp16) {
      for (int b = 0; b < kBlocks; ++b) {
        load_scales(w, r.group, block + b, copied + b * kBlockColumns);
      }
    }
    VecF sum[kRows][kVectors] = {};
    if constexpr (Codes::kFixed) {
      fixed_sums<Codes, kRows>(job, fixed, row_block, run, block, words, row_stride, sum);
    } else {
      VecF zeros[kVectors];
      HF_GPTQ_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        load_zeros<Codes::kBits>(w, r.group, block + b, zeros + b * kBlockVectors);
      }
      if constexpr (Codes::kBytes) {
        byte_sums<Codes, kRows, kBlocks>(job, row_block, run, words, row_stride, zeros, sum);
      } else {
        Codes::decode(w, words, row_stride, r.code, r.end - r.begin, zeros,
                      Accumulate<Codes, kRows, kVectors>{x + r.begin * kRows, sum});
      }
    }
    VecF scales[kVectors];  // for kBlocks > 1
    const uint16_t* of_group = fp16 ? fp16 + r.group * w.N : nullptr;
    HF_GPTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      scales[v] = fp16 ? load_fp16(of_group + v * kLanes) : load(copied + v * kLanes);
    }
    auto scale_of = [&](int v) __attribute__((always_inline)) {
      return kBlocks > 1 ? scales[v] : load(copied + v * kLanes);
    };
    // Totals that find no registers stay in memory: GCC would keep some of them in both.
    float* totals = total[0];
    if constexpr (!kKept) __asm__("" : "+r"(totals));
    HF_GPTQ_UNROLL
    for (int m = 0; m < kRows; ++m) {
      HF_GPTQ_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (kKept) {
          kept[m][v] = fmadd(sum[m][v], scale_of(v), kept[m][v]);
        } else {
          float* t = totals + m * kColumns + v * kLanes;
          store(t, fmadd(sum[m][v], scale_of(v), load(t)));
        }
      }
    }
  }
  if constexpr (kKept) {
    HF_GPTQ_UNROLL
    for (int m = 0; m < kRows; ++m) {
      HF_GPTQ_UNROLL
      for (int v = 0; v < kVectors; ++v) store(total[m] + v * kLanes, kept[m][v]);
    }
  }
  for (int b = 0; b < kBlocks; ++b) {
    const int64_t column = (block + b) * kBlockColumns;
    write_rows(job.a, job.row_begin + first_row, kRows, column, min64(kBlockColumns, w.N - column),
               total[0] + b * kBlockColumns, kColumns);
  }
}

// Row blocks [row_begin, row_end), of kRows rows or one less, times column blocks [block, end):
// kBlocks of them at a time, then half as many.
template <class Codes, int kRows, int kBlocks>
void stream_columns(const LinearJob& job, int64_t row_begin, int64_t row_end, int64_t block,
                    int64_t end, uint32_t* copy) {
  const hf_gptq_weight& w = job.a.weight;
  for (; block + kBlocks <= end; block += kBlocks) {
    if (kBlocks > 1 && is_ragged(w, block + kBlocks - 1)) break;
    const uint32_t* words[kBlocks];
    int64_t row_stride = 0;
    for (int b = 0; b < kBlocks; ++b) {
      const BlockWords found = block_words(w, block + b, copy);
      words[b] = found.words;
      row_stride = found.row_stride;
    }
    for (int64_t r = row_begin; r < row_end; ++r) {
      if (kRows == 1 || job.rows.size(r) == kRows) {
        stream<Codes, kRows, kBlocks>(job, r, block, words, row_stride);
      } else {
        stream<Codes, kRows - (kRows > 1), kBlocks>(job, r, block, words, row_stride);
      }
    }
  }
  if constexpr (kBlocks > 1) {
    if (block < end) {
      stream_columns<Codes, kRows, kBlocks / 2>(job, row_begin, row_end, block, end, copy);
    }
  }
}

// Task t: group t % groups of stream_blocks(kRows) column blocks, row task t / groups.
template <class Codes, int kRows>
int stream_tasks(int64_t begin, int64_t end, const void* context) {
  constexpr int kBlocks = stream_blocks<Codes>(kRows);
  const LinearJob& job = *static_cast<const LinearJob*>(context);
  const hf_gptq_weight& w = job.a.weight;
  const int64_t blocks = column_blocks(w.N);
  const int64_t groups = ceil_div(blocks, kBlocks);
  uint32_t* copy = nullptr;
  if (is_ragged(w, blocks - 1)) {
    copy = static_cast<uint32_t*>(thread_scratch(ragged_bytes(w)));
    if (!copy) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  }
  for (int64_t t = begin; t < end; ++t) {
    const int64_t row_begin = t / groups * job.task_row_blocks;
    const int64_t block = t % groups * kBlocks;
    if (t == begin) {  // what stream() fetches a block ahead
      for (int64_t r = 0; r < job.stretches.count; ++r) {
        prefetch_group(w, job.stretches.data[r].group, block, kBlocks);
      }
    }
    stream_columns<Codes, kRows, kBlocks>(job, row_begin,
                                          min64(row_begin + job.task_row_blocks, job.rows.count),
                                          block, min64(block + kBlocks, blocks), copy);
  }
  return HF_GPTQ_OK;
}

template <class Codes, int kRows>
int run_stream(LinearJob job) {
  if constexpr (kRows > 1) {
    if (job.rows.largest < kRows) return run_stream<Codes, kRows - 1>(job);
  }
  constexpr int kBlocks = stream_blocks<Codes>(kRows);
  job.task_row_blocks = kStreamedFloats / (job.stretches.steps * kRows) + 1;
  const int64_t row_tasks = ceil_div(job.rows.count, job.task_row_blocks);
  const int64_t rows = min64(job.task_row_blocks * kRows, job.rows.all);
  const int64_t groups = ceil_div(column_blocks(job.a.weight.N), kBlocks);
  const int64_t grain = grain_for(job.stretches.steps * rows * kBlocks * kBlockColumns);
  if (row_tasks == 1) return parallel_for(groups, grain, stream_tasks<Codes, kRows>, &job);
  // The last row task is smaller: threads take a part of one whenever they are done with another.
  const int64_t part = ceil_div(groups, 4);
  return parallel_tasks(groups * row_tasks, part > grain ? part : grain, stream_tasks<Codes, kRows>,
                        &job);
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_STREAM_H_
