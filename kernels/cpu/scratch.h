#ifndef HF_GPTQ_CPU_SCRATCH_H_
#define HF_GPTQ_CPU_SCRATCH_H_

#include <stddef.h>

namespace hf_gptq {

// At least `bytes` bytes, aligned to 64, that belong to the calling thread until its next call, or
// null if there is no memory. The memory is kept for reuse and freed with the thread, so kernels
// ask for bounded amounts (a few megabytes).
void* thread_scratch(size_t bytes);

// A 64-byte aligned allocation for the length of one call; data() is null if there is no memory.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

}  // namespace hf_gptq

#endif  // HF_GPTQ_CPU_SCRATCH_H_
