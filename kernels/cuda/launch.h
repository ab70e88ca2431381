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
    // All that the device has, not what this launch takes: another thread may launch the kernel
    // with more at the same time.
    int device, most;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
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
