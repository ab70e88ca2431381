// The Hopper kernel for bf16 activations; for sm_90a only.
#include "hopper_launch.h"

namespace hf_gptq {

cudaError_t launch_hopper_bfloat16(LinearArguments arguments, const Device& device,
                                   cudaStream_t stream) {
  return hopper::launch_bits<Bfloat16>(arguments, device, stream);
}

cudaError_t load_hopper_bfloat16() { return hopper::load<Bfloat16>(); }

}  // namespace hf_gptq
