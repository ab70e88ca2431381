// The dense weight. Internal linkage, see isa.h.
#ifndef HF_GPTQ_CPU_DEQUANTIZE_H_
#define HF_GPTQ_CPU_DEQUANTIZE_H_

#include "decode.h"
#include "parallel.h"
#include "scratch.h"

namespace hf_gptq {
namespace {

// Rows of codes decoded at a time: [16, kDequantizeRows] floats, 8 KiB.
constexpr int64_t kDequantizeRows = 128;

typedef float Vec4 __attribute__((vector_size(16)));

// dst[j, i] = src[i, j] for i, j < 4.
HF_GPTQ_INLINE void transpose(const float* src, int64_t src_stride, float* dst,
                              int64_t dst_stride) {
  Vec4 r[4];
  for (int i = 0; i < 4; ++i) memcpy(&r[i], src + i * src_stride, sizeof r[i]);
  const Vec4 a = {r[0][0], r[1][0], r[0][1], r[1][1]}, b = {r[2][0], r[3][0], r[2][1], r[3][1]};
  const Vec4 c = {r[0][2], r[1][2], r[0][3], r[1][3]}, d = {r[2][2], r[3][2], r[2][3], r[3][3]};
  const Vec4 t[4] = {{a[0], a[1], b[0], b[1]},
                     {a[2], a[3], b[2], b[3]},
                     {c[0], c[1], d[0], d[1]},
                     {c[2], c[3], d[2], d[3]}};
  for (int i = 0; i < 4; ++i) memcpy(dst + i * dst_stride, &t[i], sizeof t[i]);
}

// Writes rows [begin, begin + count) of the codes of one output: out[n, feature(i)].
void write_features(const DequantizeArguments& a, int64_t n, int64_t begin, int64_t count,
                    const float* values) {
  const int64_t row = (n - a.first_block * kBlockColumns) * a.out_row_stride;
  const int32_t* perm = a.weight.perm;
  if (!perm) {
    from_float(values, count, a.out, a.dtype, row + begin);
    return;
  }
  if (a.dtype == HF_GPTQ_FP32) {
    float* out = static_cast<float*>(a.out) + row;
    for (int64_t i = 0; i < count; ++i) out[perm[begin + i]] = values[i];
    return;
  }
  uint16_t half[kDequantizeRows];
  from_float(values, count, half, a.dtype, 0);
  uint16_t* out = static_cast<uint16_t*>(a.out) + row;
  for (int64_t i = 0; i < count; ++i) out[perm[begin + i]] = half[i];
}

template <int kBits>
int dequantize_blocks(int64_t begin, int64_t end, const void* context) {
  const DequantizeArguments& a = *static_cast<const DequantizeArguments*>(context);
  const hf_gptq_weight& w = a.weight;
  begin += a.first_block;
  end += a.first_block;
  uint32_t* copy = nullptr;
  if (end == column_blocks(w.N) && is_ragged(w, end - 1)) {
    copy = static_cast<uint32_t*>(thread_scratch(ragged_bytes(w)));
    if (!copy) return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  }
  // Zeros, because the last rows are transposed by fours.
  alignas(64) float values[kDequantizeRows][kBlockColumns] = {};
  for (int64_t block = begin; block < end; ++block) {
    const BlockWords b = block_words(w, block, copy);
    const uint32_t* words[1] = {b.words};
    const int64_t column = block * kBlockColumns;
    const int64_t left = w.N - column;
    const int64_t columns = left < kBlockColumns ? left : kBlockColumns;
    for (int64_t run = 0; run < a.runs.count; ++run) {
      const Run& r = a.runs.data[run];
      alignas(64) float scale[kBlockColumns];
      alignas(64) float zero[kBlockColumns];
      load_group<kBits>(w, r.group, block, scale, zero);
      VecF zeros[kBlockVectors];
      HF_GPTQ_UNROLL
      for (int v = 0; v < kBlockVectors; ++v) zeros[v] = load(zero + v * kLanes);
      for (int64_t from = r.begin; from < r.end; from += kDequantizeRows) {
        const int64_t count = r.end - from < kDequantizeRows ? r.end - from : kDequantizeRows;
        decode<kBits>(words, b.row_stride, from, from + count, zeros,
                      [&](int64_t i, const VecF(&decoded)[kBlockVectors])
                          __attribute__((always_inline)) {
                            HF_GPTQ_UNROLL
                            for (int v = 0; v < kBlockVectors; ++v) {
                              store(values[i] + v * kLanes, decoded[v] * load(scale + v * kLanes));
                            }
                          });
        alignas(64) float transposed[kBlockColumns][kDequantizeRows];
        for (int64_t i = 0; i < count; i += 4) {
          for (int c = 0; c < kBlockColumns; c += 4) {
            transpose(&values[i][c], kBlockColumns, &transposed[c][i], kDequantizeRows);
          }
        }
        for (int64_t c = 0; c < columns; ++c) {
          write_features(a, column + c, from, count, transposed[c]);
        }
      }
    }
  }
  return HF_GPTQ_OK;
}

template <int kBits>
int dequantize_bits(const DequantizeArguments& a) {
  // About 2^15 weights per range: below that a thread costs more than it saves.
  return parallel_for(a.blocks, ceil_div(int64_t{1} << 15, a.weight.K * kBlockColumns),
                      dequantize_blocks<kBits>, &a);
}

int dequantize(const DequantizeArguments& a) {
  switch (a.weight.bits) {
    case 2:
      return dequantize_bits<2>(a);
    case 3:
      return dequantize_bits<3>(a);
    case 4:
      return dequantize_bits<4>(a);
    default:
      return dequantize_bits<8>(a);
  }
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_DEQUANTIZE_H_
