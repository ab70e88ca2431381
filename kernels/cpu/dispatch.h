#ifndef HF_GPTQ_CPU_DISPATCH_H_
#define HF_GPTQ_CPU_DISPATCH_H_

#include "kernels.h"

namespace hf_gptq {

struct Dispatch {
  const Kernels* kernels;
  Linear linear_int8;  // or null
  const char* error;   // why HF_GPTQ_ISA was not honoured, or null
};

// Chosen at the first call, for the life of the process.
const Dispatch& dispatch();

}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_DISPATCH_H_
