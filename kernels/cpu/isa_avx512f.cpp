#define HF_GPTQ_ISA "avx512f"
#define HF_GPTQ_KERNELS kernels_avx512f
#define HF_GPTQ_SIMD_AVX512F
#include "isa.h"
