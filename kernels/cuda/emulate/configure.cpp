// What a test sets before a call, in the emulated library only.
#include "emulator.h"
#include "hf_gptq.h"

extern "C" {

// The order in which threads and blocks meet, and the device that the library believes to be on.
HF_GPTQ_API void hf_gptq_emulate_configure(uint64_t seed, int32_t resident_blocks,
                                           int32_t compute_capability, int32_t shared_bytes,
                                           int32_t multiprocessors) {
  emulate::settings.seed = seed;
  emulate::settings.resident = resident_blocks;
  emulate::settings.compute_capability = compute_capability;
  emulate::settings.shared_bytes = shared_bytes;
  emulate::settings.multiprocessors = multiprocessors;
}
}
