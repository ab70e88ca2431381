#define HF_GPTQ_ISA "portable"
#define HF_GPTQ_KERNELS kernels_portable
#include "isa.h"
