// One way to launch a kernel, for nvcc and for the emulator.
#ifndef HF_GPTQ_LAUNCH_H_
#define HF_GPTQ_LAUNCH_H_

#include "ptx.h"

#ifndef HF_GPTQ_EMULATE
// Also grants dynamic shared memory beyond 48 KiB.
template <class... Parameters, class... Arguments>
static cudaError_t hf_gptq_launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                  size_t shared, cudaStream_t stream, Arguments... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) {
      cudaGetLastError();
      return error;
    }
  }
  kernel<<<grid, block, shared, stream>>>(arguments...);
  return cudaGetLastError();
}

// Loads a kernel's code onto the current device.
static inline cudaError_t hf_gptq_load(const void* kernel) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}
#endif

#endif  // HF_GPTQ_LAUNCH_H_
