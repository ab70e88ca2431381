#include "parallel.h"

#include <atomic>

namespace hf_gptq {
namespace {

std::atomic<hf_gptq_parallel_for_t> registered{nullptr};

struct Loop {
  int (*body)(int64_t, int64_t, const void*);
  const void* context;
  int64_t count, grain;
  std::atomic<int64_t> next;  // of parallel_tasks(): first index that no thread has taken
  std::atomic<int> error;
};

void run(Loop& loop, int64_t begin, int64_t end) {
  const int error = loop.body(begin, end, loop.context);
  if (error != HF_GPTQ_OK) loop.error.store(error, std::memory_order_relaxed);
}

void run_range(int64_t begin, int64_t end, void* opaque) {
  run(*static_cast<Loop*>(opaque), begin, end);
}

// The range that the loop gave is only a thread to work on.
void run_tasks(int64_t /*begin*/, int64_t /*end*/, void* opaque) {
  Loop& loop = *static_cast<Loop*>(opaque);
  for (;;) {
    const int64_t begin = loop.next.fetch_add(loop.grain, std::memory_order_relaxed);
    if (begin >= loop.count) return;
    run(loop, begin, begin + loop.grain < loop.count ? begin + loop.grain : loop.count);
  }
}

int parallel(int64_t count, int64_t grain, int (*body)(int64_t, int64_t, const void*),
             const void* context, void (*run_on_thread)(int64_t, int64_t, void*)) {
  const hf_gptq_parallel_for_t loop_over = registered.load();
  if (!loop_over || count <= grain) return count > 0 ? body(0, count, context) : HF_GPTQ_OK;
  Loop loop{body, context, count, grain, {0}, {HF_GPTQ_OK}};
  if (loop_over(0, count, grain, run_on_thread, &loop) != 0) return HF_GPTQ_ERROR_PARALLEL_FOR;
  return loop.error.load();
}

}  // namespace

void set_parallel_for(hf_gptq_parallel_for_t parallel_for) { registered.store(parallel_for); }

int parallel_for(int64_t count, int64_t grain, int (*body)(int64_t, int64_t, const void*),
                 const void* context) {
  return parallel(count, grain, body, context, run_range);
}

int parallel_tasks(int64_t count, int64_t grain, int (*body)(int64_t, int64_t, const void*),
                   const void* context) {
  return parallel(count, grain, body, context, run_tasks);
}

}  // namespace hf_gptq
