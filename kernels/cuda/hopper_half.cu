// The Hopper kernel for fp16 activations; for sm_90a only.
#include "hopper_launch.h"

namespace hf_gptq {

cudaError_t launch_hopper_half(LinearArguments arguments, const Device& device,
                               cudaStream_t stream) {
  return hopper::launch_bits<Half>(arguments, device, stream);
}

cudaError_t load_hopper_half() { return hopper::load<Half>(); }

}  // namespace hf_gptq
