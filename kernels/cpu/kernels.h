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

struct TransposedArguments {
  const hf_gptq_weight& weight;
  Runs runs;
  const void* x;  // [M, N], dtype, rows x_row_stride elements apart
  int dtype;
  int64_t M;  // >= 1
  int64_t x_row_stride;
  void* y;  // [M, K], dtype
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

// C = A B, or C += A B. In fp32, or in bf16 that is multiplied in pairs of adjacent k.
struct MatmulArguments {
  const void* A;  // element (m, k) at m * A_row + k * A_column
  int64_t A_row, A_column;
  const void* B;  // element (k, n) at k * B_row + n * B_column
  int64_t B_row, B_column;
  int64_t M, N;  // >= 1
  int64_t K;     // >= 0; of bf16 the pairs
  float* C;      // [M, N], rows C_row apart
  int64_t C_row;
  bool accumulate;      // C += A B
  bool lower;           // M = N, and C is read and written on and below the diagonal only
  bool mirror;          // with lower: in the end, copy what is below the diagonal to above it
  int64_t numbers = 0;  // of bf16, which A and B then are: how many make the K pairs
};

// As the parameters of hf_gptq_attention.
struct AttentionArguments {
  const void* q;
  int64_t q_head, q_row;
  const void* k;
  int64_t k_head, k_row;
  const void* v;
  int64_t v_head, v_row;
  void* out;
  int64_t out_head, out_row;
  int64_t heads, repeats, Tq, Tk, D;
  float scale;
  bool causal;
};

// As the parameters of hf_gptq_factorize.
struct FactorizeArguments {
  const float* H;
  int64_t K;
  float* U;
};

// As the parameters of hf_gptq_solve_symmetric.
struct SystemsArguments {
  double* A;
  double* b;
  int64_t count, G;
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

// What a task's scratch is meant for.
constexpr int64_t kJointRows = 1024, kJointColumns = 256;

// As the parameters of hf_gptq_joint_solve and, with `changes`, of hf_gptq_joint_descend.
struct JointArguments {
  float* values;
  const float* H;  // [B, B], rows H_row apart
  int64_t H_row;
  const float* metric;
  const float* scales;
  const float* zeros;
  const int32_t* group;
  uint8_t* codes;
  float* changes;
  int64_t N, B, part;
  int bits;
};

using Linear = int (*)(const LinearArguments&);

// Each returns an hf_gptq_error.
struct Kernels {
  const char* isa;
  Linear linear;
  int (*dequantize)(const DequantizeArguments&);
  int (*transposed)(const TransposedArguments&);
  int (*solve)(const SolveArguments&);
  int (*scale_search)(const ScaleSearchArguments&);
  int (*matmul)(const MatmulArguments&);
  int (*attention)(const AttentionArguments&);
  int (*factorize)(const FactorizeArguments&);
  int (*solve_symmetric)(const SystemsArguments&);
  int (*descend)(const DescendArguments&);
  int (*joint)(const JointArguments&);
};

#ifdef HF_GPTQ_X86_64
// `linear` with activations rounded to 8 bits.
int linear_int8_avx512vnni(const LinearArguments&);

#ifdef HF_GPTQ_AMX
// Of the same table as kernels_avx512bf16, but for these.
int linear_amx(const LinearArguments&);
int transposed_amx(const TransposedArguments&);
#endif

extern const Kernels kernels_avx512bf16;
extern const Kernels kernels_avx512f;
extern const Kernels kernels_avx2;
#endif
extern const Kernels kernels_portable;

}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_KERNELS_H_
