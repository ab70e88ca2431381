// The linear kernels of one activation type, chosen by bits.
#ifndef HF_GPTQ_INSTANCES_H_
#define HF_GPTQ_INSTANCES_H_

#include "narrow.h"
#include "wide.h"

namespace hf_gptq {

template <class T>
struct Instances {
  static cudaError_t narrow(LinearArguments p, const Device& device, cudaStream_t stream) {
    switch (p.bits) {
      case 2:
        return launch_narrow<T, 2>(p, device, stream);
      case 3:
        return launch_narrow<T, 3>(p, device, stream);
      case 4:
        return launch_narrow<T, 4>(p, device, stream);
      default:
        return launch_narrow<T, 8>(p, device, stream);
    }
  }

  static cudaError_t wide(LinearArguments p, const Device& device, cudaStream_t stream) {
    switch (p.bits) {
      case 2:
        return launch_wide<T, 2>(p, device, stream);
      case 3:
        return launch_wide<T, 3>(p, device, stream);
      case 4:
        return launch_wide<T, 4>(p, device, stream);
      default:
        return launch_wide<T, 8>(p, device, stream);
    }
  }

  template <int Bits>
  static cudaError_t load_bits() {
    const void* const kernels[] = {reinterpret_cast<const void*>(narrow_kernel<T, Bits, true>),
                                   reinterpret_cast<const void*>(narrow_kernel<T, Bits, false>),
                                   reinterpret_cast<const void*>(wide_kernel<T, Bits, 1>),
                                   reinterpret_cast<const void*>(wide_kernel<T, Bits, 2>),
                                   reinterpret_cast<const void*>(wide_kernel<T, Bits, 4>),
                                   reinterpret_cast<const void*>(wide_kernel<T, Bits, 8>)};
    for (const void* kernel : kernels) {
      const cudaError_t error = hf_gptq_load(kernel);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }

  // Loads every kernel now: loading one inside a graph capture would fail.
  static cudaError_t load() {
    cudaError_t error = load_bits<2>();
    if (error == cudaSuccess) error = load_bits<3>();
    if (error == cudaSuccess) error = load_bits<4>();
    if (error == cudaSuccess) error = load_bits<8>();
    return error;
  }
};

}  // namespace hf_gptq

#endif  // HF_GPTQ_INSTANCES_H_
