// y = x @ weight, the product that carries gradients back. Internal linkage, see isa.h.
//
// A few hundred outputs of the weight at a time are made dense and multiplied by matmul(), so the
// dense weight as a whole exists nowhere.
#ifndef HF_GPTQ_CPU_TRANSPOSED_H_
#define HF_GPTQ_CPU_TRANSPOSED_H_

#include "dequantize.h"
#include "matmul.h"

namespace hf_gptq {
namespace {

// Outputs made dense at a time, a multiple of kMatmulChunk.
constexpr int64_t kTransposedDepth = 2 * kMatmulChunk;
// Rows of x at a time: bounds the memory for y in fp32.
constexpr int64_t kTransposedRows = 2048;
#if defined(HF_GPTQ_SIMD_BF16)
constexpr bool kTransposedPairs = true;
#else
constexpr bool kTransposedPairs = false;
#endif

struct TransposedJob {
  const TransposedArguments& a;
  int64_t row;           // first of the slab
  int64_t begin, depth;  // outputs in hand
  const float* weight;   // [depth, K]
  float* x;              // [rows, depth], or pairs [rows, ceil(depth / 2)]
  float* pairs;          // [ceil(depth / 2), K]
  const float* y;        // [rows, K]
};

// Rows [begin, end) of x in fp32.
int transposed_x(int64_t begin, int64_t end, const void* context) {
  const TransposedJob& job = *static_cast<const TransposedJob*>(context);
  for (int64_t m = begin; m < end; ++m) {
    to_float(job.a.x, job.a.dtype, (job.row + m) * job.a.x_row_stride + job.begin, job.depth,
             job.x + m * job.depth);
  }
  return HF_GPTQ_OK;
}

// Rows [begin, end) of x as pairs of bf16.
int transposed_x_pairs(int64_t begin, int64_t end, const void* context) {
  const TransposedJob& job = *static_cast<const TransposedJob*>(context);
  const int64_t width = ceil_div(job.depth, 2);
  for (int64_t m = begin; m < end; ++m) {
    const uint16_t* x =
        static_cast<const uint16_t*>(job.a.x) + (job.row + m) * job.a.x_row_stride + job.begin;
    float* row = job.x + m * width;
    if (job.depth % 2 != 0) row[width - 1] = bits_float(x[job.depth - 1]);
    memcpy(row, x, job.depth / 2 * sizeof(float));
  }
  return HF_GPTQ_OK;
}

// Pairs of outputs [begin, end) of the dense weight, rounded to bf16.
int transposed_weight_pairs(int64_t begin, int64_t end, const void* context) {
  const TransposedJob& job = *static_cast<const TransposedJob*>(context);
  const int64_t K = job.a.weight.K;
  for (int64_t i = begin; i < end; ++i) {
    const float* lower = job.weight + 2 * i * K;
    const bool single = 2 * i + 1 == job.depth;
    for (int64_t k = 0; k < K; ++k) {
      const uint32_t upper = single ? 0 : float_to_bf16(lower[K + k]);
      job.pairs[i * K + k] = bits_float(float_to_bf16(lower[k]) | upper << 16);
    }
  }
  return HF_GPTQ_OK;
}

// Rows [begin, end) of y.
int transposed_y(int64_t begin, int64_t end, const void* context) {
  const TransposedJob& job = *static_cast<const TransposedJob*>(context);
  const int64_t K = job.a.weight.K;
  for (int64_t m = begin; m < end; ++m) {
    from_float(job.y + m * K, K, job.a.y, job.a.dtype, (job.row + m) * K);
  }
  return HF_GPTQ_OK;
}

int transposed(const TransposedArguments& a) {
  const hf_gptq_weight& w = a.weight;
  const int64_t slab = min64(kTransposedRows, a.M);
  const int64_t most = min64(kTransposedDepth, w.N);
  const bool pairs = kTransposedPairs && a.dtype == HF_GPTQ_BF16;
  const bool in_place = a.dtype == HF_GPTQ_FP32;
  const Buffer weight_buffer(most * w.K * sizeof(float));
  const Buffer pair_buffer(pairs ? ceil_div(most, 2) * w.K * sizeof(float) : 0);
  const Buffer x_buffer(in_place ? 0 : slab * most * sizeof(float));
  const Buffer y_buffer(in_place ? 0 : slab * w.K * sizeof(float));
  if (!weight_buffer.data() || !pair_buffer.data() || !x_buffer.data() || !y_buffer.data()) {
    return HF_GPTQ_ERROR_OUT_OF_MEMORY;
  }
  float* dense = static_cast<float*>(weight_buffer.data());
  float* x_slab = static_cast<float*>(x_buffer.data());
  float* pair_slab = static_cast<float*>(pair_buffer.data());
  for (int64_t row = 0; row < a.M; row += slab) {
    const int64_t rows = min64(slab, a.M - row);
    float* y =
        in_place ? static_cast<float*>(a.y) + row * w.K : static_cast<float*>(y_buffer.data());
    const int64_t row_grain = ceil_div(kMatmulWantedWork, 16 * (most > w.K ? most : w.K));
    for (int64_t n = 0; n < w.N; n += kTransposedDepth) {
      const int64_t depth = min64(kTransposedDepth, w.N - n);
      const TransposedJob job{a, row, n, depth, dense, x_slab, pair_slab, y};
      int error = dequantize(
          {w, a.runs, dense, HF_GPTQ_FP32, w.K, n / kBlockColumns, ceil_div(depth, kBlockColumns)});
      if (error == HF_GPTQ_OK && pairs) {
        error = parallel_for(ceil_div(depth, 2), ceil_div(kMatmulWantedWork, 16 * w.K),
                             transposed_weight_pairs, &job);
      }
      if (error == HF_GPTQ_OK && !in_place) {
        error = parallel_for(rows, row_grain, pairs ? transposed_x_pairs : transposed_x, &job);
      }
      if (error != HF_GPTQ_OK) return error;
      const float* x =
          in_place ? static_cast<const float*>(a.x) + row * a.x_row_stride + n : x_slab;
      const int64_t count = pairs ? ceil_div(depth, 2) : depth;
      error = matmul({x, in_place ? a.x_row_stride : count, 1, pairs ? pair_slab : dense, w.K, 1,
                      rows, w.K, count, y, w.K, n > 0, false, false, pairs});
      if (error != HF_GPTQ_OK) return error;
    }
    const TransposedJob job{a, row, 0, 0, dense, x_slab, pair_slab, y};
    if (in_place) continue;
    const int error = parallel_for(rows, row_grain, transposed_y, &job);
    if (error != HF_GPTQ_OK) return error;
  }
  return HF_GPTQ_OK;
}

}  // namespace
}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_TRANSPOSED_H_
