#include "instances.h"

namespace hf_gptq {

cudaError_t launch_narrow_bfloat16(LinearArguments p, const Device& device, cudaStream_t stream) {
  return Instances<Bfloat16>::narrow(p, device, stream);
}

cudaError_t launch_wide_bfloat16(LinearArguments p, const Device& device, cudaStream_t stream) {
  return Instances<Bfloat16>::wide(p, device, stream);
}

cudaError_t load_bfloat16() { return Instances<Bfloat16>::load(); }

}  // namespace hf_gptq
