#define HF_GPTQ_ISA "avx512bf16"
#define HF_GPTQ_KERNELS kernels_avx512bf16
#define HF_GPTQ_SIMD_AVX512F
#define HF_GPTQ_SIMD_BF16
#include "isa.h"
