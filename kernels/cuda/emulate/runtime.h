// The few names of the CUDA runtime that the host code uses, for the emulated build.
#ifndef HF_GPTQ_EMULATE_RUNTIME_H_
#define HF_GPTQ_EMULATE_RUNTIME_H_

#include "emulator.h"

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulate::Settings& device = emulate::settings;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.compute_capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.compute_capability % 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_bytes;
      break;
  }
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulate::error.c_str() : "invalid argument";
}

// hf_gptq_launch(kernel, grid, block, shared bytes, stream, arguments...)
template <class... Parameters, class... Arguments>
cudaError_t hf_gptq_launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                           cudaStream_t, Arguments... arguments) {
  emulate::run(grid, block, shared, [=] { kernel(arguments...); });
  return emulate::error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

inline cudaError_t hf_gptq_load(const void*) { return cudaSuccess; }

#endif  // HF_GPTQ_EMULATE_RUNTIME_H_
