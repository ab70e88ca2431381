// The interface between the exported functions (api.cpp) and the kernels, of which each instruction
// set has a copy. Arguments are validated before a kernel sees them.
#ifndef HF_GPTQ_CPU_KERNELS_H_
#define HF_GPTQ_CPU_KERNELS_H_

#include <stdint.h>

#include "hf_gptq.h"

namespace hf_gptq {

// Rows [begin, end) of the codes, all of one group.
struct Run {
  int64_t begin, end, group;
};

struct Runs {
  const Run* data;
  int64_t count;
};

struct LinearArguments {
  const hf_gptq_weight& weight;
  Runs runs;
  const void* x;  // [M, K], dtype, rows x_row_stride elements apart
  int dtype;
  int64_t M;  // >= 1
  int64_t x_row_stride;
  const void* bias;  // [N], dtype, or null
  void* y;           // [M, N], dtype
};

struct DequantizeArguments {
  const hf_gptq_weight& weight;
  Runs runs;
  void* out;  // [N, K], dtype, rows out_row_stride elements apart
  int dtype;
  int64_t out_row_stride;
};

// As the parameters of hf_gptq_solve.
struct SolveArguments {
  float* W;
  const float* U;
  const float* scales;
  const float* zeros;
  const int32_t* group;
  uint8_t* codes;
  double* loss;
  int64_t N, K, G;
  int bits;
  int64_t blocksize;
};

// As the parameters of hf_gptq_scale_search.
struct ScaleSearchArguments {
  const float* W;
  const float* h;
  const int32_t* group_start;
  int64_t N, K, G;
  int bits;
  bool sym;
  const float* shrink;
  int64_t T;
  int scale_dtype;
  float* scales;
  float* zeros;
  int zero_min;
};

// As the parameters of hf_gptq_gram.
struct GramArguments {
  const float* A;
  int64_t A_stride;
  const float* B;
  int64_t B_stride;
  int64_t T, Ka, Kb;  // T >= 1
  float* C;
};

// As the parameters of hf_gptq_descend.
struct DescendArguments {
  const float* W;
  const float* H;
  const float* scales;
  const float* zeros;
  const int32_t* group;
  uint8_t* codes;
  double* loss;
  int64_t N, K, G;
  int bits;
  int64_t rounds;
};

// Each returns an hf_gptq_error.
struct Kernels {
  const char* isa;
  int (*linear)(const LinearArguments&);
  int (*dequantize)(const DequantizeArguments&);
  int (*solve)(const SolveArguments&);
  int (*scale_search)(const ScaleSearchArguments&);
  int (*gram)(const GramArguments&);
  int (*descend)(const DescendArguments&);
};

#ifdef HF_GPTQ_X86_64
extern const Kernels kernels_avx512f;
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_portable;

}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_KERNELS_H_
