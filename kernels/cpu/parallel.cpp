#include "parallel.h"

#include <atomic>

namespace hf_gptq {
namespace {

std::atomic<hf_gptq_parallel_for_t> registered{nullptr};

struct Loop {
  int (*body)(int64_t, int64_t, const void*);
  const void* context;
  std::atomic<int> error;
};

void run_range(int64_t begin, int64_t end, void* opaque) {
  Loop& loop = *static_cast<Loop*>(opaque);
  const int error = loop.body(begin, end, loop.context);
  if (error != HF_GPTQ_OK) loop.error.store(error, std::memory_order_relaxed);
}

}  // namespace

void set_parallel_for(hf_gptq_parallel_for_t parallel_for) { registered.store(parallel_for); }

int parallel_for(int64_t count, int64_t grain, int (*body)(int64_t, int64_t, const void*),
                 const void* context) {
  const hf_gptq_parallel_for_t loop_over = registered.load();
  if (!loop_over || count <= grain) return count > 0 ? body(0, count, context) : HF_GPTQ_OK;
  Loop loop{body, context, {HF_GPTQ_OK}};
  if (loop_over(0, count, grain, run_range, &loop) != 0) return HF_GPTQ_ERROR_PARALLEL_FOR;
  return loop.error.load();
}

}  // namespace hf_gptq
