// The dense weight. Internal linkage, see isa.h.
#ifndef HF_GPTQ_CPU_DEQUANTIZE_H_
#define HF_GPTQ_CPU_DEQUANTIZE_H_

#include "decode.h"
#include "interleave.h"
#include "parallel.h"
#include "scratch.h"

namespace hf_gptq {
namespace {

// Rows of codes decoded at a time: [16, kDequantizeRows] floats, 8 KiB.
constexpr int64_t kDequantizeRows = 128;

// Writes what belongs to rows [begin, begin + count) of the codes, at most kDequantizeRows, to row
// `row` of out [.., stride]: out[row, perm ? perm[i] : i] = values[i - begin].
void write_features(const int32_t* perm, int64_t stride, int64_t row, int64_t begin, int64_t count,
                    const float* values, void* out, int dtype) {
  if (!perm) {
    from_float(values, count, out, dtype, row * stride + begin);
    return;
  }
  if (dtype == HF_GPTQ_FP32) {
    float* to = static_cast<float*>(out) + row * stride;
    for (int64_t i = 0; i < count; ++i) to[perm[begin + i]] = values[i];
    return;
  }
  uint16_t half[kDequantizeRows];
  from_float(values, count, half, dtype, 0);
  uint16_t* to = static_cast<uint16_t*>(out) + row * stride;
  for (int64_t i = 0; i < count; ++i) to[perm[begin + i]] = half[i];
}

// dense[c, i - begin] of the columns c of a block for rows [begin, end) of the codes, at most
// kDequantizeRows; up to a multiple of kLanes, rows beyond are 0.
template <int kBits>
void dequantize_tile(const hf_gptq_weight& w, const Runs& runs, const BlockWords& b, int64_t block,
                     int64_t begin, int64_t end, float (&dense)[kBlockColumns][kDequantizeRows]) {
  alignas(64) float values[kDequantizeRows][kBlockColumns];
  const uint32_t* words[1] = {b.words};
  // The run that holds row `begin`.
  int64_t low = 0, high = runs.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (runs.data[middle].begin <= begin ? low : high) = middle;
  }
  for (int64_t from = begin; from < end; ++low) {
    const Run& r = runs.data[low];
    const int64_t to = min64(r.end, end);
    alignas(64) float scale[kBlockColumns];
    load_scales(w, r.group, block, scale);
    VecF zeros[kBlockVectors];
    load_zeros<kBits>(w, r.group, block, zeros);
    float (*rows)[kBlockColumns] = values + (from - begin);
    decode<kBits>(words, b.row_stride, from, to, zeros,
                  [&](int64_t i, const VecF(&decoded)[kBlockVectors])
                      __attribute__((always_inline)) {
                        HF_GPTQ_UNROLL
                        for (int v = 0; v < kBlockVectors; ++v) {
                          store(rows[i] + v * kLanes, decoded[v] * load(scale + v * kLanes));
                        }
                      });
    from = to;
  }
  const int64_t count = end - begin, whole = ceil_div(count, kLanes) * kLanes;
  memset(values + count, 0, (whole - count) * sizeof values[0]);
  for (int64_t i = 0; i < whole; i += kLanes) {
    HF_GPTQ_UNROLL
    for (int v = 0; v < kBlockVectors; ++v) {
      VecF square[kLanes];
      HF_GPTQ_UNROLL
      for (int l = 0; l < kLanes; ++l) square[l] = load(&values[i + l][v * kLanes]);
      transpose(square);
      HF_GPTQ_UNROLL
      for (int l = 0; l < kLanes; ++l) store(&dense[v * kLanes + l][i], square[l]);
    }
  }
}

template <int kBits>
int dequantize_blocks(int64_t begin, int64_t end, const void* context) {
  const DequantizeArguments& a = *static_cast<const DequantizeArguments*>(context);
  const hf_gptq_weight& w = a.weight;
  uint32_t* copy = nullptr;
  if (end == column_blocks(w.N) && is_ragged(w, end - 1)) {
    copy = static_cast<uint32_t*>(thread_scratch(ragged_bytes(w)));
    if (!copy) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  }
  alignas(64) float dense[kBlockColumns][kDequantizeRows];
  for (int64_t block = begin; block < end; ++block) {
    const BlockWords words = block_words(w, block, copy);
    const int64_t columns = min64(kBlockColumns, w.N - block * kBlockColumns);
    for (int64_t row = 0; row < w.K; row += kDequantizeRows) {
      const int64_t rows = min64(kDequantizeRows, w.K - row);
      dequantize_tile<kBits>(w, a.runs, words, block, row, row + rows, dense);
      for (int64_t c = 0; c < columns; ++c) {
        write_features(w.perm, a.out_row_stride, block * kBlockColumns + c, row, rows, dense[c],
                       a.out, a.dtype);
      }
    }
  }
  return HF_GPTQ_OK;
}

template <int kBits>
int dequantize_bits(const DequantizeArguments& a) {
  // About 2^15 weights per range: below that a thread costs more than it saves.
  return parallel_for(column_blocks(a.weight.N),
                      ceil_div(int64_t{1} << 15, a.weight.K * kBlockColumns),
                      dequantize_blocks<kBits>, &a);
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_DEQUANTIZE_H_
