#include "scratch.h"

#include <stdlib.h>

namespace hf_gptq {
namespace {

constexpr size_t kAlignment = 64;

// aligned_alloc wants a multiple of the alignment; zero bytes still give a valid pointer.
void* allocate(size_t bytes) {
  return aligned_alloc(kAlignment, (bytes / kAlignment + 1) * kAlignment);
}

struct ThreadScratch {
  void* data = nullptr;
  size_t size = 0;
  ~ThreadScratch() { free(data); }
};

thread_local ThreadScratch scratch;

}  // namespace

void* thread_scratch(size_t bytes) {
  if (!scratch.data || bytes > scratch.size) {
    free(scratch.data);
    scratch.data = allocate(bytes);
    scratch.size = scratch.data ? bytes : 0;
  }
  return scratch.data;
}

Buffer::Buffer(size_t bytes) : data_(allocate(bytes)) {}
Buffer::~Buffer() { free(data_); }

}  // namespace hf_gptq
