#include "instances.h"

namespace hf_gptq {

cudaError_t launch_narrow_half(LinearArguments p, const Device& device, cudaStream_t stream) {
  return Instances<Half>::narrow(p, device, stream);
}

cudaError_t launch_wide_half(LinearArguments p, const Device& device, cudaStream_t stream) {
  return Instances<Half>::wide(p, device, stream);
}

cudaError_t load_half() { return Instances<Half>::load(); }

}  // namespace hf_gptq
