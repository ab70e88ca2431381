#define HF_GPTQ_ISA "avx2"
#define HF_GPTQ_KERNELS kernels_avx2
#define HF_GPTQ_SIMD_AVX2
#include "isa.h"
