// The product for few rows: each word is decoded once into registers and used for all rows.
// Internal linkage, see isa.h.
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
      const VecF xm = splat(x[i * kRows + m]);
      HF_GPTQ_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sum[m][v] = Codes::Products::multiply_add(values[v], xm, sum[m][v]);
      }
    }
  }
};

// The sums of one stretch for integer activations, in fp32. Zeros are not subtracted from codes but
// from the sums, as zero * (sum of x): exact, as long as they are integers.
template <class Codes, int kRows, int kBlocks>
HF_GPTQ_INLINE void fixed_sums(const LinearJob& job, int64_t row_block, int64_t stretch,
                               const uint32_t* const (&words)[kBlocks], int64_t row_stride,
                               const VecF (&zeros)[kBlocks * kBlockVectors],
                               VecF (&sum)[kRows][kBlocks * kBlockVectors]) {
  constexpr int kVectors = kBlocks * kBlockVectors;
  const hf_gptq_weight& w = job.a.weight;
  const Stretch& s = job.stretches.data[stretch];
  const int64_t steps = s.end - s.begin;
  const int64_t first = row_block * job.stretches.steps + s.begin;
  const int64_t x_at = first * kRows;
  const int64_t number = row_block * job.stretches.count + stretch;
  const VecU none[kVectors] = {};
  Codes::template walk<false, kBlocks>(w, words, row_stride, s.code, steps, none,
                                       Accumulate<Codes, kRows, kVectors>{job.x + x_at, sum});
  VecF low[kRows][kVectors] = {};
  const int64_t listed = job.fixed.listed[number];
  const float* low_x = job.fixed.low + x_at;
  const Accumulate<Codes, kRows, kVectors> add_low{low_x, low};
  // Decoding a step by itself takes a few times as long as with its unit.
  if (listed * 4 > steps) {
    Codes::template walk<false, kBlocks>(w, words, row_stride, s.code, steps, none, add_low);
  } else {
    const int64_t rows = packed_words(w.K, Codes::kBits);
    for (int64_t i = 0; i < listed; ++i) {
      const int64_t step = job.fixed.list[first + i];
      VecF values[kVectors];
      HF_GPTQ_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const uint32_t* column = words[v / kBlockVectors] + v % kBlockVectors * kLanes;
        values[v] = (VecF)Codes::one(column, row_stride, rows, s.code, step);
      }
      add_low(step, values);
    }
  }
  const int32_t* sum_x = job.fixed.sums + number * 2 * kRows;
  HF_GPTQ_UNROLL
  for (int m = 0; m < kRows; ++m) {
    const VecF scale = splat(job.fixed.scales[number * kRows + m]);
    HF_GPTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (listed > 0) low[m][v] = Codes::less_zeros(low[m][v], zeros[v], sum_x[kRows + m]);
      sum[m][v] = Codes::less_zeros(sum[m][v], zeros[v], sum_x[m]);
      sum[m][v] = Codes::Products::value(sum[m][v], low[m][v]) * scale;
    }
  }
}

// The kRows rows of a row block times kBlocks column blocks, `words` with one row stride.
template <class Codes, int kRows, int kBlocks>
void stream(const LinearJob& job, int64_t row_block, int64_t block,
            const uint32_t* const (&words)[kBlocks], int64_t row_stride) {
  constexpr int kVectors = kBlocks * kBlockVectors;
  const hf_gptq_weight& w = job.a.weight;
  alignas(64) float scale[kBlocks * kBlockColumns];
  alignas(64) float zero[kBlocks * kBlockColumns];
  alignas(64) float total[kRows][kBlocks * kBlockColumns] = {};
  for (int64_t run = 0; run < job.stretches.count; ++run) {
    const Stretch& r = job.stretches.data[run];
    if (run + kPrefetchRuns < job.stretches.count) {
      prefetch_group(w, job.stretches.data[run + kPrefetchRuns].group, block, kBlocks);
    }
    for (int b = 0; b < kBlocks; ++b) {
      load_group<Codes::kBits>(w, r.group, block + b, scale + b * kBlockColumns,
                               zero + b * kBlockColumns);
    }
    VecF zeros[kVectors];
    HF_GPTQ_UNROLL
    for (int v = 0; v < kVectors; ++v) zeros[v] = load(zero + v * kLanes);
    VecF sum[kRows][kVectors] = {};
    if constexpr (Codes::kFixed) {
      fixed_sums<Codes, kRows, kBlocks>(job, row_block, run, words, row_stride, zeros, sum);
    } else {
      Codes::decode(w, words, row_stride, r.code, r.end - r.begin, zeros,
                    Accumulate<Codes, kRows, kVectors>{
                        job.x + (row_block * job.stretches.steps + r.begin) * kRows, sum});
    }
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
    for (int m = 0; m < min64(kRows, job.row_count - row_block * kRows); ++m) {
      write_row(job.a, job.row_begin + row_block * kRows + m, column,
                min64(kBlockColumns, w.N - column), total[m] + b * kBlockColumns);
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
  const int64_t row_blocks = ceil_div(job.row_count, kRows);
  uint32_t* copy = nullptr;
  if (min64(end * kBlocks, blocks) == blocks && is_ragged(w, blocks - 1)) {
    copy = static_cast<uint32_t*>(thread_scratch(ragged_bytes(w)));
    if (!copy) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  }
  for (int64_t block = begin * kBlocks; block < min64(end * kBlocks, blocks);) {
    if (block + kBlocks <= blocks && !is_ragged(w, block + kBlocks - 1)) {
      const uint32_t* words[kBlocks];
      for (int b = 0; b < kBlocks; ++b) words[b] = block_words(w, block + b, nullptr).words;
      for (int64_t r = 0; r < row_blocks; ++r) {
        stream<Codes, kRows, kBlocks>(job, r, block, words, w.row_stride);
      }
      block += kBlocks;
    } else {
      const BlockWords b = block_words(w, block, copy);
      const uint32_t* words[1] = {b.words};
      for (int64_t r = 0; r < row_blocks; ++r) {
        stream<Codes, kRows, 1>(job, r, block, words, b.row_stride);
      }
      block += 1;
    }
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
                      grain_for(job.stretches.steps * job.row_count * kBlocks * kBlockColumns),
                      stream_groups<Codes, kRows>, &job);
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_STREAM_H_
